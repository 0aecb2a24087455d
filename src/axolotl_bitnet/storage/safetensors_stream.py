"""Safetensors checkpoints tensor by tensor: bounded memory, whole folders or none.

The safetensors package checks a file's header, and maps the file to read it: pages that were touched count
as memory. So bytes are read plainly here, from any thread. A writer needs all shapes first (they make the
header) and then takes one tensor, or one block of it, at a time; the package can only write a file whose
tensors are all in memory. The format is a length, a JSON header and the bytes.
"""

from __future__ import annotations

import json
import math
import os
from collections.abc import Callable, Iterable, Iterator
from concurrent.futures import Future, ThreadPoolExecutor
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from types import TracebackType
from typing import Any

import torch
from safetensors import safe_open
from torch import Tensor

from .atomic import CheckpointError, read_json, require_space
from .parallel import row_ranges
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


FLUSH = 64 << 20
"""Bytes after which a writer begins to flush them to the disk, so that little is left at the end."""


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


@dataclass(frozen=True)
class _Place:
    """Where in which file a tensor's bytes begin."""

    entry: Entry
    path: Path
    start: int


class CheckpointReader:
    """The tensors of a checkpoint folder: ``model.safetensors``, or the shards of
    ``model.safetensors.index.json``.

    Raises:
        CheckpointError: no safetensors there, a shard or a tensor of the index is missing, a tensor is there
            twice, or the index points outside the folder.
    """

    def __init__(self, folder: str | Path):
        self.folder = Path(folder)
        self._places = dict(sorted(_locate(self.folder).items()))
        self.entries = {name: place.entry for name, place in self._places.items()}

    def tensor(self, name: str) -> Tensor:
        """A whole tensor, on the CPU."""
        place = self._place(name)
        return _read(place, 0, place.entry.numel).reshape(place.entry.shape)

    def elements(self, name: str, start: int, stop: int) -> Tensor:
        """Elements ``start`` to ``stop`` of a tensor of any shape, flat, on the CPU."""
        return _read(self._place(name), start, stop)

    def rows(self, name: str, start: int, stop: int) -> Tensor:
        """Rows ``start`` to ``stop`` of a matrix, on the CPU."""
        columns = self._place(name).entry.shape[1]
        return self.elements(name, start * columns, stop * columns).reshape(stop - start, columns)

    def row_blocks(self, name: str) -> Iterator[Tensor]:
        """A matrix as blocks of whole rows, on the CPU."""
        rows, columns = self._place(name).entry.shape
        return (self.rows(name, *ends) for ends in row_ranges(rows, columns))

    def _place(self, name: str) -> _Place:
        if name not in self._places:
            raise CheckpointError(f"{self.folder} holds no tensor '{name}'")
        return self._places[name]


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
        self._advance = begin(f"writing {Path(path).name}", 8 + len(encoded) + offset)
        self._file = Path(path).open("wb", buffering=0)  # noqa: SIM115 (closed in __exit__)
        self._flusher = ThreadPoolExecutor(1)
        self._flushed: Future[None] | None = None
        self._unflushed = 0
        self._put(len(encoded).to_bytes(8, "little") + encoded)

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
        self._put(_bytes(tensor))

    def write_blocks(self, name: str, blocks: Iterable[Tensor]) -> None:
        """Append the next tensor in pieces, whose elements one after the other are the tensor's.

        Raises:
            CheckpointError: the header announces another tensor here, or another dtype or size.
        """
        entry = next(self._expected, None)
        if entry is None or entry.name != name:
            raise CheckpointError(f"tensor '{name}' was announced as {entry}")
        count = 0
        for block in blocks:
            if block.dtype != entry.dtype:
                raise CheckpointError(f"tensor '{name}' is {block.dtype}, and was announced as {entry}")
            self._put(_bytes(block))
            count += block.numel()
        if count != entry.numel:
            raise CheckpointError(f"tensor '{name}' has {count} elements, and was announced as {entry}")

    def _put(self, data: bytes | memoryview) -> None:
        """Write, and let a thread flush to the disk what the system has buffered."""
        size = len(data)
        while len(data):  # a call writes 2 GiB at most, and less on a disk that fills up
            data = data[self._file.write(data) :]
        self._advance(size)
        self._unflushed += size
        if self._unflushed > FLUSH and (self._flushed is None or self._flushed.done()):
            self._unflushed = 0
            self._flushed = self._flusher.submit(_flush, self._file.fileno())

    def __enter__(self) -> SafetensorsWriter:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self._flusher.shutdown()
        try:
            if kind is None:
                os.fsync(self._file.fileno())
                if self._flushed is not None:
                    self._flushed.result()  # the system reports a failed write once, maybe there
        finally:
            self._file.close()
        missing = next(self._expected, None)
        if kind is None and missing is not None:
            raise CheckpointError(f"tensor '{missing.name}' was announced but never written")


def _bytes(tensor: Tensor) -> bytes | memoryview:
    flat = tensor.detach().cpu().contiguous().reshape(-1)
    return flat.view(torch.uint8).numpy().data if flat.numel() else b""


def _places_in(path: Path) -> dict[str, _Place]:
    """A file's tensors as its header lists them, and where their bytes begin."""
    with _open(path):
        pass  # the package compares the header with the file's size, and positions with one another
    with path.open("rb") as file:
        length = int.from_bytes(file.read(8), "little")
        header = json.loads(file.read(length), object_pairs_hook=lambda pairs: _unique(pairs, path))
    header.pop("__metadata__", None)
    return {name: _place(path, 8 + length, name, described) for name, described in header.items()}


def _unique(pairs: list[tuple[str, Any]], path: Path) -> dict[str, Any]:
    found = dict(pairs)
    if len(found) < len(pairs):
        twice = next(name for name, _ in pairs if sum(name == other for other, _ in pairs) > 1)
        raise CheckpointError(f"{path} lists '{twice}' twice in its header: save it again")
    return found


def _place(path: Path, start: int, name: str, described: dict[str, Any]) -> _Place:
    dtype = DTYPES.get(described["dtype"])
    if dtype is None:
        raise CheckpointError(f"{path}: tensor '{name}' has the unsupported dtype {described['dtype']}")
    return _Place(Entry(name, dtype, tuple(described["shape"])), path, start + described["data_offsets"][0])


def _read(place: _Place, start: int, stop: int) -> Tensor:
    """Elements ``start`` to ``stop`` of a stored tensor."""
    flat = torch.empty(stop - start, dtype=place.entry.dtype)
    left = memoryview(_bytes(flat))
    with place.path.open("rb", buffering=0) as file:
        file.seek(place.start + start * place.entry.dtype.itemsize)
        while left:
            count = file.readinto(left)
            if not count:
                raise CheckpointError(f"{place.path} has become shorter while '{place.entry.name}' was read")
            left = left[count:]
    return flat


def _locate(folder: Path) -> dict[str, _Place]:
    """The tensors of a folder. Each file's header is read once."""
    index, single = folder / INDEX, folder / SINGLE
    if index.exists():
        return _locate_by_index(folder, index)
    if single.exists():
        return _places_in(single)
    other = sorted(path.name for path in folder.glob("*.bin")) if folder.is_dir() else []
    hint = f" ({', '.join(other)} is pickle and not read: save it as safetensors)" if other else ""
    raise CheckpointError(f"{folder} holds neither {SINGLE} nor {INDEX}{hint}")


def _locate_by_index(folder: Path, index: Path) -> dict[str, _Place]:
    weight_map = read_json(index).get("weight_map")
    if not isinstance(weight_map, dict) or not weight_map:
        raise CheckpointError(f"{index} is damaged: it has no weight_map of tensors and files")
    for name in weight_map.values():
        if not isinstance(name, str) or Path(name).name != name or not name.endswith(".safetensors"):
            raise CheckpointError(f"{index} names '{name}', which is not a safetensors file of this folder")
    found: dict[str, _Place] = {}
    seen: dict[str, str] = {}
    for shard in sorted(set(weight_map.values())):
        if not (folder / shard).is_file():
            raise CheckpointError(f"{folder / shard} is missing: the index names it")
        inside = _places_in(folder / shard)
        promised = {name for name, place in weight_map.items() if place == shard}
        if missing := promised - inside.keys():
            raise CheckpointError(
                f"{folder / shard} lacks the tensor '{min(missing)}', which {INDEX} places there"
            )
        if twice := inside.keys() & seen.keys():
            name = min(twice)
            raise CheckpointError(
                f"{folder / shard} holds '{name}', and so does {seen[name]}: it is not known which of "
                "them is right. Save the model again, into an empty folder"
            )
        seen |= dict.fromkeys(inside, shard)
        found |= {name: inside[name] for name in promised}
    return found


@contextmanager
def _open(path: Path) -> Iterator[Any]:
    try:
        context = safe_open(path, framework="pt", device="cpu")
    except Exception as error:  # safetensors' own error type, OSError
        raise CheckpointError(f"{path} cannot be read as safetensors: {error}") from error
    with context as file:
        yield file


_flush: Callable[[int], None] = getattr(os, "fdatasync", os.fsync)
"""macOS and Windows have the second only."""
