"""Full fine-tuning of ternary (1.58-bit, BitNet) language models, and the proof that the stored model is the
trained one.

The public names are imported when first used, so that ``import axolotl_bitnet`` costs next to nothing and
needs neither axolotl nor triton nor a GPU.
"""

from __future__ import annotations

import importlib
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from .formats.export import export_gguf, open_checkpoint, pack_checkpoint, revert_checkpoint
    from .formats.restore import restore_latents
    from .layers.bitlinear import BitLinear
    from .layers.weight_codes import weights_unchanged
    from .model.convert import convert_to_bitlinear
    from .plugin.plugin import BitNetPlugin
    from .serving.load_packed import load_packed
    from .ternary import quantize_activations, ternarize
    from .training.monitor.figures import observe
    from .training.ramp import set_ramp
    from .verify.report import VerificationReport
    from .verify.verify import verify_checkpoint

__version__ = "0.2.0"

_HOMES = {
    "BitLinear": "layers.bitlinear",
    "BitNetPlugin": "plugin.plugin",
    "VerificationReport": "verify.report",
    "convert_to_bitlinear": "model.convert",
    "export_gguf": "formats.export",
    "load_packed": "serving.load_packed",
    "observe": "training.monitor.figures",
    "open_checkpoint": "formats.export",
    "pack_checkpoint": "formats.export",
    "quantize_activations": "ternary",
    "restore_latents": "formats.restore",
    "revert_checkpoint": "formats.export",
    "set_ramp": "training.ramp",
    "ternarize": "ternary",
    "weights_unchanged": "layers.weight_codes",
    "verify_checkpoint": "verify.verify",
}

__all__ = [
    "BitLinear",
    "BitNetPlugin",
    "VerificationReport",
    "convert_to_bitlinear",
    "export_gguf",
    "load_packed",
    "observe",
    "open_checkpoint",
    "pack_checkpoint",
    "quantize_activations",
    "restore_latents",
    "revert_checkpoint",
    "set_ramp",
    "ternarize",
    "verify_checkpoint",
    "weights_unchanged",
]


def __getattr__(name: str) -> Any:
    if name not in _HOMES:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    value = getattr(importlib.import_module(f".{_HOMES[name]}", __name__), name)
    globals()[name] = value
    return value
