"""Which format a stored model has."""

from __future__ import annotations

from pathlib import Path

from ..convert import CONFIG_KEY
from .dense import DenseCheckpoint
from .foreign import ForeignPackedCheckpoint
from .latent import LatentCheckpoint
from .mlx import MLXCheckpoint
from .packed import PackedCheckpoint
from .source import TernaryCheckpoint, is_dense
from .stream import CheckpointError, read_json


def open_checkpoint(path: str | Path) -> TernaryCheckpoint:
    """A ternary model of any format that this package writes, or a packed one of others.

    Args:
        path: a folder: latents (what training saves), a packed, dense or MLX model.

    Raises:
        CheckpointError: there is no ternary model.
    """
    folder = Path(path)
    if not folder.is_dir():
        raise CheckpointError(f"{folder} is not a folder with a model")
    config = read_json(folder / "config.json") if (folder / "config.json").exists() else {}
    if "quantization_config" in config:
        return PackedCheckpoint(folder) if CONFIG_KEY in config else ForeignPackedCheckpoint(folder)
    if "quantization" in config:
        return MLXCheckpoint(folder)
    if is_dense(config):
        return DenseCheckpoint(folder)
    return LatentCheckpoint(folder)
