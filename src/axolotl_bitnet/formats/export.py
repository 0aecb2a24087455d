"""The public functions: open a stored ternary model, and write it in another format."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import replace
from pathlib import Path
from typing import Any

from ..storage.atomic import CheckpointError, read_json, require_space
from .checkpoint import TernaryCheckpoint
from .format import Format, Proof
from .latent import LatentCheckpoint
from .recognize import recognize
from .registry import FORMATS


def open_checkpoint(path: str | Path) -> TernaryCheckpoint:
    """A ternary model of any format that this package writes, or a third party's: packed, or floating-point
    matrices whose config lists no ternary layers (then a warning counts those that are taken).

    Args:
        path: a folder (latents, as training saves them, or an artifact), a GGUF file, or a folder with one.

    Raises:
        CheckpointError: there is no ternary model.
    """
    path = Path(path)
    if (file := _gguf_in(path)) is not None:
        return FORMATS["gguf-tq2_0"].format.open(file)  # the file names its type
    if not path.is_dir():
        if not path.exists():
            raise CheckpointError(f"{path} does not exist")
        raise CheckpointError(f"{path} is neither a folder with a model nor a GGUF file")
    if not (path / "config.json").exists():
        return LatentCheckpoint(path)  # whose config may be beside it
    config = read_json(path / "config.json")
    kind = recognize(config).kind
    if kind in FORMATS:
        return FORMATS[kind].format.open(path, config)
    if kind == "latents":
        return LatentCheckpoint(path, config)
    from .third_party import ThirdPartyPackedCheckpoint, UnlistedCheckpoint

    lists_nothing = kind in ("unlisted", "online")
    return UnlistedCheckpoint(path, config) if lists_nothing else ThirdPartyPackedCheckpoint(path, config)


def export(
    name: str, src: str | Path, dst: str | Path, overwrite: bool = False, check: Proof | None = None
) -> Path:
    """Write a stored ternary model in the format that :data:`~.registry.FORMATS` calls ``name``; see the
    functions below."""
    return FORMATS[name].format.write(open_checkpoint(src), dst, overwrite, check)


def export_all(src: str | Path, targets: Mapping[str, Path], overwrite: bool = False) -> None:
    """Write a stored ternary model in several formats: all of them, or none.

    What a format refuses without reading a weight is raised before the first is written; what only the
    weights can tell, before any gets its name.

    Args:
        src: a ternary model of any format.
        targets: the folder or file to make, by the format's name.
        overwrite: replace targets that exist.

    Raises:
        CheckpointError: as for the functions below.
        ImportError: a package that writes one of the formats is missing.
    """
    source = open_checkpoint(src)
    formats = [(FORMATS[name].format, target) for name, target in targets.items()]
    needed: dict[int, int] = {}
    for format, target in formats:
        nbytes = format.require_writable(source, target, overwrite)
        folder = next(folder for folder in target.absolute().parents if folder.is_dir())
        disk = folder.stat().st_dev
        needed[disk] = needed.get(disk, 0) + nbytes
        require_space(folder, needed[disk])
    _write_all(source, formats, overwrite)


def _write_all(source: TernaryCheckpoint, formats: list[tuple[Format, Path]], overwrite: bool) -> None:
    """Each is written while the one before it waits, complete, for its name: a failure leaves none."""
    if formats:
        (format, target), *others = formats
        format.write(source, target, overwrite, lambda _: _write_all(source, others, overwrite))


def pack_checkpoint(
    src: str | Path, dst: str | Path, overwrite: bool = False, check: Proof | None = None
) -> Path:
    """Pack a ternary model to 2 bits per weight.

    Works tensor by tensor: memory stays below twice the largest tensor plus 300 MiB. The folder appears when
    it is complete, or not at all.

    Args:
        src: folder of latents, as training saves it: config.json, safetensors (single or sharded), tokenizer;
            or a ternary model in any other format that this package reads.
        dst: folder to make.
        overwrite: replace ``dst`` if it exists.
        check: called with the finished folder before it gets its name; if it raises, nothing is left behind.

    Returns:
        ``dst``.

    Raises:
        CheckpointError: the source cannot be read or packed, or the target exists.
    """
    return export("packed", src, dst, overwrite, check)


def revert_checkpoint(
    src: str | Path, dst: str | Path, overwrite: bool = False, check: Proof | None = None
) -> Path:
    """Write a ternary model as a dense bfloat16 one: ``codes / s``, each weight within 0.4 %.

    Training quantized activations and this model does not, so its logits are near those of the ternary model,
    not equal. Arguments and errors as for :func:`pack_checkpoint`.

    Raises:
        CheckpointError: also if a scale would not be recoverable.
    """
    return export("dense", src, dst, overwrite, check)


def export_mlx(src: str | Path, dst: str | Path, overwrite: bool = False, check: Proof | None = None) -> Path:
    """Write a ternary model for mlx-lm, at 2.25 bits per weight. Needs no MLX. Arguments and errors as for
    :func:`pack_checkpoint`.

    Raises:
        CheckpointError: also if mlx-lm cannot run it as it was trained, or a scale would not be recoverable.
    """
    return export("mlx", src, dst, overwrite, check)


def export_gguf(
    src: str | Path,
    file: str | Path,
    type: str = "tq2_0",
    overwrite: bool = False,
    check: Proof | None = None,
    embeddings: str = "bf16",
) -> Path:
    """Write a ternary model as one GGUF file.

    Works tensor by tensor: memory stays below twice the largest tensor plus 300 MiB. The file appears when it
    is complete, or not at all. A ternary layer whose rows are no multiple of 256 (q2_0: of 64) is written as
    F16, with the same values; a warning names it.

    Args:
        src: a ternary model of any format, with its tokenizer.
        file: file to make.
        type: of the ternary layers: tq2_0, tq1_0 (smaller, slower), both quick on CPUs, or q2_0 (for GPUs).
        overwrite: replace ``file`` if it exists.
        check: called with the finished file before it gets its name; if it raises, nothing is left behind.
        embeddings: type of embedding and head: bf16 (as packed), f16 or q8_0 (smaller, not exact).

    Returns:
        ``file``.

    Raises:
        CheckpointError: the source cannot be read, llama.cpp cannot run it as it was trained (architecture,
            RoPE scaling, tokenizer), or the target exists.
        ImportError: the gguf package is missing.
    """
    row = FORMATS.get(f"gguf-{type}")
    if row is None:
        raise CheckpointError(f"type '{type}': the types are {', '.join(gguf_types())}")
    written: Any = row.format
    target: Path = replace(written, embeddings=embeddings).write(open_checkpoint(src), file, overwrite, check)
    return target


def gguf_types() -> list[str]:
    """What ``type`` can be for :func:`export_gguf`."""
    return [name.removeprefix("gguf-") for name in FORMATS if name.startswith("gguf-")]


def _gguf_in(path: Path) -> Path | None:
    if path.is_file():
        return path
    if not path.is_dir() or (path / "config.json").exists():
        return None
    files = sorted(path.glob("*.gguf"))
    if len(files) > 1:
        raise CheckpointError(f"{path} holds {len(files)} GGUF files: name one, such as {files[0]}")
    return files[0] if files else None
