"""Back to trainable latents: from any ternary model, matrices that quantize to exactly its codes and scales.

So a packed model from a hub can be fine-tuned. The latents hold nothing more than the codes did (two adjacent
magnitudes a matrix), but they train.
"""

from __future__ import annotations

import logging
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from ..storage.atomic import CheckpointError, read_json
from ..storage.safetensors_stream import Entry
from ..ternary import EPSILON, latents_of, scale_of
from .checkpoint import TernaryCheckpoint
from .export import open_checkpoint
from .folder_writer import MatrixFormat
from .format import Proof
from .latent import LatentCheckpoint
from .recognize import recognize
from .third_party import open_unlisted

_LOG = logging.getLogger(__name__)


def restore_latents(
    src: str | Path,
    dst: str | Path,
    overwrite: bool = False,
    check: Proof | None = None,
) -> Path:
    """Write latents, to train, from a model that is stored ternary.

    A scale that is not ``bf16(1 / bf16(g))`` of any ``g``, which no training by the definition gives, becomes
    the nearest that is, at most 0.6 % away; a warning on this module's logger counts them. Tensors beside the
    ternary weights are copied as they are.

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
    written = Latents()
    result = written.write(source, dst, overwrite, check)
    if written.moved:
        _LOG.warning(
            "%s: latents cannot carry the scales of %d of %d matrices exactly; they got the nearest ones, at "
            "most %.2f %% away (%s)",
            src,
            len(written.moved),
            len(source.names.converted),
            100 * max(written.moved.values()),
            ", ".join(list(written.moved)[:3]) + (", ..." if len(written.moved) > 3 else ""),
        )
    return result


def _open(path: Path) -> TernaryCheckpoint:
    if (path / "config.json").is_file():
        config = read_json(path / "config.json")
        if recognize(config).kind == "unlisted":
            return open_unlisted(path, config)  # it reads all matrices, which open_checkpoint does not
    return open_checkpoint(path)


class Latents(MatrixFormat):
    """Written, not exported to: it has no row in the registry.

    Attributes:
        moved: by weight, how far its scale had to move, relative.
    """

    rest = None

    def __init__(self) -> None:
        self.moved: dict[str, float] = {}

    def open(self, path: str | Path, config: Mapping[str, Any] | None = None) -> TernaryCheckpoint:
        return LatentCheckpoint(path, config)

    def config_of(self, source: TernaryCheckpoint) -> dict[str, Any]:
        """In the source's dtype, but for float16, whose range is too small for latents."""
        dtype = source.config.get("dtype") or source.config.get("torch_dtype")
        kept = {key: value for key, value in source.config.items() if key != "torch_dtype"}
        return kept | {"dtype": "float32" if dtype in ("float16", "float32") else "bfloat16"}

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
