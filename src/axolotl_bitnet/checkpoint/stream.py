"""Safetensors checkpoints tensor by tensor: bounded memory, whole folders or none.

A reader opens a file anew for every tensor, since pages of a mapped file count as memory until it is closed.
A writer needs all shapes first (they make the header) and then takes one tensor at a time; the safetensors
package can only write a file whose tensors are all in memory, and the format is a length, a JSON header and
the bytes.
"""

from __future__ import annotations

import json
import math
import os
import shutil
import tempfile
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from types import TracebackType
from typing import Any

import torch
from safetensors import safe_open
from torch import Tensor

from .progress import begin

SINGLE = "model.safetensors"
INDEX = "model.safetensors.index.json"

DTYPES: dict[str, torch.dtype] = {
    "BOOL": torch.bool,
    "U8": torch.uint8,
    "I8": torch.int8,
    "I16": torch.int16,
    "I32": torch.int32,
    "I64": torch.int64,
    "U32": torch.uint32,
    "F16": torch.float16,
    "BF16": torch.bfloat16,
    "F32": torch.float32,
    "F64": torch.float64,
}
_NAMES = {dtype: name for name, dtype in DTYPES.items()}


class CheckpointError(ValueError):
    """A checkpoint cannot be read or written; the message names the file and what to do."""


@dataclass(frozen=True)
class Entry:
    """Name, dtype and shape of a stored tensor."""

    name: str
    dtype: torch.dtype
    shape: tuple[int, ...]

    @property
    def numel(self) -> int:
        return math.prod(self.shape)

    @property
    def nbytes(self) -> int:
        return self.numel * self.dtype.itemsize


class CheckpointReader:
    """The tensors of a checkpoint folder: ``model.safetensors``, or the shards of
    ``model.safetensors.index.json``.

    Raises:
        CheckpointError: no safetensors there, a shard or a tensor of the index is missing, or the index
            points outside the folder.
    """

    def __init__(self, folder: str | Path):
        self.folder = Path(folder)
        self._files = _locate(self.folder)
        found: dict[str, Entry] = {}
        for path in set(self._files.values()):
            with _open(path) as file:
                inside = (name for name, place in self._files.items() if place == path)
                found |= {name: _entry(file, name, path) for name in inside}
        self.entries = dict(sorted(found.items()))

    def tensor(self, name: str) -> Tensor:
        """A whole tensor, on the CPU."""
        with _open(self._file(name)) as file:
            return file.get_tensor(name)

    def row_blocks(self, name: str, elements: int = 1 << 20) -> Iterator[Tensor]:
        """A matrix as blocks of whole rows of at most about ``elements`` elements, on the CPU."""
        rows, columns = self.entries[name].shape
        step = max(1, elements // max(1, columns))
        for start in range(0, rows, step):
            with _open(self._file(name)) as file:
                yield file.get_slice(name)[start : start + step]

    def _file(self, name: str) -> Path:
        if name not in self._files:
            raise CheckpointError(f"{self.folder} holds no tensor '{name}'")
        return self._files[name]


class SafetensorsWriter:
    """Writes one safetensors file, a tensor at a time, in the order of ``entries``."""

    def __init__(self, path: str | Path, entries: list[Entry]):
        self._expected = iter(entries)
        header: dict[str, Any] = {"__metadata__": {"format": "pt"}}
        offset = 0
        for entry in entries:
            offsets = [offset, offset + entry.nbytes]
            header[entry.name] = {
                "dtype": _NAMES[entry.dtype],
                "shape": list(entry.shape),
                "data_offsets": offsets,
            }
            offset = offsets[1]
        encoded = json.dumps(header, separators=(",", ":")).encode()
        encoded += b" " * (-len(encoded) % 8)
        require_space(Path(path).parent, 8 + len(encoded) + offset)
        self._advance = begin(f"writing {Path(path).name}", offset)
        self._file = Path(path).open("wb")  # noqa: SIM115 (closed in __exit__)
        self._file.write(len(encoded).to_bytes(8, "little") + encoded)

    def write(self, name: str, tensor: Tensor) -> None:
        """Append the next tensor.

        Raises:
            CheckpointError: it is not the one that the header announces here.
        """
        entry = next(self._expected, None)
        if entry != Entry(name, tensor.dtype, tuple(tensor.shape)):
            raise CheckpointError(
                f"tensor '{name}' {tensor.dtype} {tuple(tensor.shape)} was announced as {entry}"
            )
        flat = tensor.detach().cpu().contiguous().reshape(-1)
        self._file.write(flat.view(torch.uint8).numpy().data if flat.numel() else b"")
        self._advance(entry.nbytes)

    def __enter__(self) -> SafetensorsWriter:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        if kind is None:
            self._file.flush()
            os.fsync(self._file.fileno())
        self._file.close()
        missing = next(self._expected, None)
        if kind is None and missing is not None:
            raise CheckpointError(f"tensor '{missing.name}' was announced but never written")


def require_space(folder: Path, needed: int) -> None:
    """Make sure that a disk can take what is about to be written.

    Raises:
        CheckpointError: ``needed`` bytes do not fit into what is free for this user.
    """
    free = shutil.disk_usage(folder).free
    if free < needed:
        raise CheckpointError(
            f"no space for it in {folder}: {needed:,} bytes are needed ({needed / 2**30:.2f} GiB), "
            f"{free:,} are free ({free / 2**30:.2f} GiB)"
        )


@contextmanager
def whole_folder(target: str | Path, overwrite: bool = False) -> Iterator[Path]:
    """A folder that appears at ``target`` when everything in it is written, and not at all on an error.

    Yields:
        A temporary folder beside the target; it is renamed at the end.

    Raises:
        CheckpointError: the target exists, and ``overwrite`` was not asked for.
    """
    target = Path(target)
    if target.exists() and not overwrite:
        raise CheckpointError(f"{target} exists: name another folder, or overwrite it (--overwrite)")
    target.parent.mkdir(parents=True, exist_ok=True)
    work = Path(tempfile.mkdtemp(prefix=f".{target.name}.partial-", dir=target.parent))
    work.chmod(0o755)  # mkdtemp's 0700 would travel with the model
    try:
        yield work
        _replace_folder(target, work)
    except BaseException:
        shutil.rmtree(work, ignore_errors=True)
        raise


def _replace_folder(target: Path, work: Path) -> None:
    """Give ``work`` the name ``target``; what had it is deleted afterwards, or gets it back on an error."""
    if not target.exists():
        work.rename(target)
        return
    old = work.with_name(work.name.replace(".partial-", ".old-"))
    target.rename(old)
    try:
        work.rename(target)
    except BaseException:
        old.rename(target)
        raise
    shutil.rmtree(old, ignore_errors=True)


def read_json(path: str | Path) -> dict[str, Any]:
    """A JSON object from a file.

    Raises:
        CheckpointError: there is none, or it cannot be parsed.
    """
    try:
        data = json.loads(Path(path).read_text(encoding="utf-8"))
    except FileNotFoundError:
        raise CheckpointError(f"{path} does not exist") from None
    except (OSError, ValueError) as error:
        raise CheckpointError(f"{path} cannot be read: {error}") from error
    if not isinstance(data, dict):
        raise CheckpointError(f"{path} holds no JSON object")
    return data


def write_json(path: str | Path, data: dict[str, Any]) -> None:
    """Write a JSON object, whole or not at all."""
    path = Path(path)
    work = path.with_name(f".{path.name}.partial")
    work.write_text(json.dumps(data, indent=2, ensure_ascii=False) + "\n", encoding="utf-8")
    work.replace(path)


def _entry(file: Any, name: str, path: Path) -> Entry:
    view = file.get_slice(name)
    dtype = DTYPES.get(view.get_dtype())
    if dtype is None:
        raise CheckpointError(f"{path}: tensor '{name}' has the unsupported dtype {view.get_dtype()}")
    return Entry(name, dtype, tuple(view.get_shape()))


def _locate(folder: Path) -> dict[str, Path]:
    """The file of every tensor."""
    index, single = folder / INDEX, folder / SINGLE
    if index.exists():
        return _locate_by_index(folder, index)
    if single.exists():
        with _open(single) as file:
            return dict.fromkeys(file.keys(), single)
    other = sorted(path.name for path in folder.glob("*.bin")) if folder.is_dir() else []
    hint = f" ({', '.join(other)} is pickle and not read: save it as safetensors)" if other else ""
    raise CheckpointError(f"{folder} holds neither {SINGLE} nor {INDEX}{hint}")


def _locate_by_index(folder: Path, index: Path) -> dict[str, Path]:
    weight_map = read_json(index).get("weight_map")
    if not isinstance(weight_map, dict) or not weight_map:
        raise CheckpointError(f"{index} is damaged: it has no weight_map of tensors and files")
    for name in weight_map.values():
        if not isinstance(name, str) or Path(name).name != name or not name.endswith(".safetensors"):
            raise CheckpointError(f"{index} names '{name}', which is not a safetensors file of this folder")
    for shard in sorted(set(weight_map.values())):
        if not (folder / shard).is_file():
            raise CheckpointError(f"{folder / shard} is missing: the index names it")
        with _open(folder / shard) as file:
            promised = {name for name, place in weight_map.items() if place == shard}
            if missing := promised - set(file.keys()):
                raise CheckpointError(
                    f"{folder / shard} lacks the tensor '{min(missing)}', which {INDEX} places there"
                )
    return {name: folder / shard for name, shard in weight_map.items()}


@contextmanager
def _open(path: Path) -> Iterator[Any]:
    try:
        context = safe_open(path, framework="pt", device="cpu")
    except Exception as error:  # safetensors' own error type, OSError
        raise CheckpointError(f"{path} cannot be read as safetensors: {error}") from error
    with context as file:
        yield file
