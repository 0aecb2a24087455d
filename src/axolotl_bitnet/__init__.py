"""Full fine-tuning of ternary (1.58-bit, BitNet) language models, and the proof that what ships is what
trained.

The public names are imported when first used, so that ``import axolotl_bitnet`` costs next to nothing and
needs neither axolotl nor triton nor a GPU.
"""

from __future__ import annotations

import importlib
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from .bitlinear import BitLinear
    from .checkpoint.dense import revert_checkpoint
    from .checkpoint.gguf import export_gguf
    from .checkpoint.packed import pack_checkpoint
    from .checkpoint.restore import restore_latents
    from .checkpoint.verdict import VerificationReport
    from .checkpoint.verify import verify_checkpoint
    from .convert import convert_to_bitlinear
    from .integration.plugin import BitNetPlugin
    from .ternary import quantize_activations, ternarize
    from .training.ramp import set_ramp

__version__ = "0.1.0"

_HOMES = {
    "BitLinear": "bitlinear",
    "BitNetPlugin": "integration.plugin",
    "VerificationReport": "checkpoint.verdict",
    "convert_to_bitlinear": "convert",
    "export_gguf": "checkpoint.gguf",
    "pack_checkpoint": "checkpoint.packed",
    "quantize_activations": "ternary",
    "restore_latents": "checkpoint.restore",
    "revert_checkpoint": "checkpoint.dense",
    "set_ramp": "training.ramp",
    "ternarize": "ternary",
    "verify_checkpoint": "checkpoint.verify",
}

__all__ = [
    "BitLinear",
    "BitNetPlugin",
    "VerificationReport",
    "convert_to_bitlinear",
    "export_gguf",
    "pack_checkpoint",
    "quantize_activations",
    "restore_latents",
    "revert_checkpoint",
    "set_ramp",
    "ternarize",
    "verify_checkpoint",
]


def __getattr__(name: str) -> Any:
    if name not in _HOMES:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    value = getattr(importlib.import_module(f".{_HOMES[name]}", __name__), name)
    globals()[name] = value
    return value
