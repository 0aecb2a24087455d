"""Which format a stored model has."""

from __future__ import annotations

from pathlib import Path

from .latent import LatentCheckpoint
from .packed import PackedCheckpoint
from .source import TernaryCheckpoint
from .stream import CheckpointError, read_json


def open_checkpoint(path: str | Path) -> TernaryCheckpoint:
    """A ternary model of any format that this package writes.

    Args:
        path: a folder: latents (what training saves) or a packed model.

    Raises:
        CheckpointError: there is no ternary model.
    """
    folder = Path(path)
    if not folder.is_dir():
        raise CheckpointError(f"{folder} is not a folder with a model")
    if (folder / "config.json").exists() and "quantization_config" in read_json(folder / "config.json"):
        return PackedCheckpoint(folder)
    return LatentCheckpoint(folder)
