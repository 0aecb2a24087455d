"""The one table of formats: what each is called, where a run puts it, who writes it and who reads it.

Writers and readers are imported when they are first used: GGUF needs a package that not everybody has.
"""

from __future__ import annotations

import importlib
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, cast

from ..storage.atomic import CheckpointError, read_json
from .checkpoint import TernaryCheckpoint
from .config_json import _kind
from .latent import LatentCheckpoint

Check = Callable[[Path], None]


@dataclass(frozen=True)
class Format:
    """A format that ternary models are exported to.

    Attributes:
        name: what `bitnet.export` and `bitnet.json` call it.
        path: where a run puts it, below its output folder: a folder, or a file in one.
        title: what it is, in a few words.
        command: what writes it, after ``axolotl bitnet``.
        module: the module of this package that knows it.
        writer: its function ``(src, dst, overwrite=False, check=None, **options)``.
        reader: its class, a :class:`TernaryCheckpoint`.
        options: keywords for the writer.
    """

    name: str
    path: str
    title: str
    command: str
    module: str
    writer: str
    reader: str
    options: Mapping[str, Any] = field(default_factory=dict)

    @property
    def folder(self) -> str:
        """The folder below the output folder that it, or its file, is in."""
        return Path(self.path).parts[0]

    def write(
        self,
        src: str | Path,
        dst: str | Path,
        overwrite: bool = False,
        check: Check | None = None,
        **options: Any,
    ) -> Path:
        """Write a stored ternary model in this format; see the writer for what it raises."""
        writer = getattr(importlib.import_module(".export", __package__), self.writer)
        return cast(Path, writer(src, dst, overwrite=overwrite, check=check, **{**self.options, **options}))

    def open(self, path: str | Path) -> TernaryCheckpoint:
        """Read what :meth:`write` wrote.

        Raises:
            CheckpointError: it is not of this format.
        """
        reader = getattr(importlib.import_module(f".{self.module}", __package__), self.reader)
        return cast(TernaryCheckpoint, reader(path))


def _gguf(kind: str) -> Format:
    name = kind.upper()
    return Format(
        f"gguf-{kind}",
        f"gguf/model-{name}.gguf",
        f"GGUF, {name}",
        f"gguf --type {kind}",
        "gguf.writer",
        "export_gguf",
        "GGUFCheckpoint",
        {"type": kind},
    )


_ALL = (
    Format("packed", "packed", "2 bits a weight", "pack", "packed", "pack_checkpoint", "PackedCheckpoint"),
    _gguf("tq2_0"),
    _gguf("tq1_0"),
    Format("dense", "dense", "dense bfloat16", "revert", "dense", "revert_checkpoint", "DenseCheckpoint"),
    Format("mlx", "mlx", "2 bits, for MLX", "mlx", "mlx", "export_mlx", "MLXCheckpoint"),
)

FORMATS: dict[str, Format] = {entry.name: entry for entry in _ALL}
"""By name, in the order in which a run makes them."""

FOLDERS = tuple(dict.fromkeys(entry.folder for entry in FORMATS.values()))
"""The folders below an output folder that artifacts are in."""


def open_checkpoint(path: str | Path) -> TernaryCheckpoint:
    """A ternary model of any format that this package writes, or a packed one of others.

    Args:
        path: a folder (latents, as training saves them, or an artifact), a GGUF file, or a folder with one.

    Raises:
        CheckpointError: there is no ternary model.
    """
    path = Path(path)
    if (file := _gguf_in(path)) is not None:
        return FORMATS["gguf-tq2_0"].open(file)  # either type: the file says which
    if not path.is_dir():
        if not path.exists():
            raise CheckpointError(f"{path} does not exist")
        raise CheckpointError(f"{path} is neither a folder with a model nor a GGUF file")
    kind = _kind(read_json(path / "config.json")) if (path / "config.json").exists() else None
    if kind == "foreign":
        from .third_party import ForeignPackedCheckpoint

        return ForeignPackedCheckpoint(path)
    return LatentCheckpoint(path) if kind is None else FORMATS[kind].open(path)


def format_of(checkpoint: TernaryCheckpoint) -> str:
    """What a model that was opened is called in :data:`FORMATS`; or "latents", or "foreign": packed by
    others."""
    if isinstance(checkpoint, LatentCheckpoint):
        return "latents"
    reader = type(checkpoint).__name__
    return next((name for name, entry in FORMATS.items() if entry.reader == reader), "foreign")


def _gguf_in(path: Path) -> Path | None:
    if path.is_file():
        return path
    if not path.is_dir() or (path / "config.json").exists():
        return None
    files = sorted(path.glob("*.gguf"))
    if len(files) > 1:
        raise CheckpointError(f"{path} holds {len(files)} GGUF files: name one, such as {files[0]}")
    return files[0] if files else None
