"""Back to trainable latents: from any ternary model, matrices that quantize to exactly its codes and scales.

So a packed model from a hub can be fine-tuned. The latents hold nothing more than the codes did (two adjacent
magnitudes a matrix), but they train.
"""

from __future__ import annotations

import logging
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from ..model.layer_plan import CONFIG_KEY
from ..storage.atomic import CheckpointError, read_json
from ..storage.safetensors_stream import Entry
from ..ternary import EPSILON, latents_of, scale_of
from .checkpoint import TernaryCheckpoint
from .folder_writer import WholeMatrices, rewrite
from .latent import LatentCheckpoint
from .third_party import open_foreign_dense

_LOG = logging.getLogger(__name__)


def restore_latents(
    src: str | Path,
    dst: str | Path,
    overwrite: bool = False,
    check: Callable[[Path], None] | None = None,
) -> Path:
    """Write latents, to train, from a model that is stored ternary.

    A scale that is not ``bf16(1 / bf16(g))`` of any ``g``, which no training by the definition gives, becomes
    the nearest that is, at most 0.6 % away; a warning on this module's logger says how many did. Tensors
    beside the ternary weights are copied as they are.

    Args:
        src: a packed folder (this package's, onebitllms's, transformers' or Microsoft's), a dense ternary
            one (a revert, or a "prequantized" model), an MLX folder or a GGUF file.
        dst: folder to make.
        overwrite: replace ``dst`` if it exists.
        check: called with the finished folder before it gets its name; if it raises, nothing is left behind.

    Returns:
        ``dst``.

    Raises:
        CheckpointError: the source cannot be read or holds latents already, there are no latents for one of
            its matrices, or the target exists.
    """
    source = _open(Path(src))
    if isinstance(source, LatentCheckpoint):
        raise CheckpointError(f"{src} holds latents already: nothing to restore, train from it")
    layout = _LatentLayout()
    result = rewrite(source, dst, layout, _latent_config(source), overwrite, check)
    if layout.moved:
        _LOG.warning(
            "%s: latents cannot carry the scales of %d of %d matrices exactly; they got the nearest ones, at "
            "most %.2f %% away (%s)",
            src,
            len(layout.moved),
            len(source.names.converted),
            100 * max(layout.moved.values()),
            ", ".join(list(layout.moved)[:3]) + (", ..." if len(layout.moved) > 3 else ""),
        )
    return result


def _open(path: Path) -> TernaryCheckpoint:
    from .registry import open_checkpoint  # whose readers do not need this module

    if (path / "config.json").is_file():
        config = read_json(path / "config.json")
        if not config.keys() & {CONFIG_KEY, "quantization_config", "quantization"}:
            return open_foreign_dense(path)  # not for open_checkpoint: it reads the whole model to find out
    return open_checkpoint(path)


class _LatentLayout(WholeMatrices):
    rest = None

    def __init__(self) -> None:
        self.moved: dict[str, float] = {}

    def entries(self, weight: Entry) -> list[Entry]:
        return [Entry(weight.name, torch.bfloat16, weight.shape)]

    def tensors(self, weight: Entry, codes: Tensor, s: Tensor) -> list[Tensor]:
        carried = scale_of(s.to(torch.float32).reciprocal())
        if not torch.equal(carried, s):
            self.moved[weight.name] = abs(float(carried) / float(s) - 1)
        if not bool(codes.any()):
            if not torch.equal(carried, scale_of(torch.tensor(EPSILON))):
                raise ValueError(f"all its codes are zero: no latents carry its scale {float(s):g}")
            return [codes.to(torch.bfloat16)]
        return [latents_of(codes, carried)]


def _latent_config(source: TernaryCheckpoint) -> Mapping[str, Any]:
    """In the source's dtype, but for float16, whose range is too small for latents."""
    dtype = source.config.get("dtype") or source.config.get("torch_dtype")
    kept = {key: value for key, value in source.config.items() if key != "torch_dtype"}
    return kept | {"dtype": "float32" if dtype in ("float16", "float32") else "bfloat16"}
