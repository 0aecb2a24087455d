"""The header of a GGUF file: metadata, and where its tensors are.

The gguf package reads it too, but keeps an array object for every token of the vocabulary (128,000 of them
take 10 seconds and 400 MiB) and maps the whole file. Here the file is read once up to the first tensor, and a
tensor is read when it is asked for. Nothing of a damaged file is trusted: sizes and offsets are compared with
the length of the file.
"""

from __future__ import annotations

import mmap
import struct
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from ...storage.atomic import CheckpointError

MAGIC = b"GGUF"
_VERSIONS = (2, 3)
_SCALARS = {0: "B", 1: "b", 2: "H", 3: "h", 4: "I", 5: "i", 6: "f", 7: "?", 10: "Q", 11: "q", 12: "d"}
_STRING, _ARRAY = 8, 9
_I2_S = 36  # in bitnet.cpp's fork of llama.cpp
_Q2_0 = 42
_OF_FORKS = {
    142: "type 142 (PQ2_0, blocks of 128 codes), which llama.cpp itself does not have: it is not read",
    143: "type 143 (PTQ1_0, blocks of 128 codes), which llama.cpp itself does not have: it is not read",
}
_MOST = 1 << 24  # entries of one array, metadata keys, tensors: beyond it a file is damaged


@dataclass(frozen=True)
class Stored:
    """A tensor in the file: its type's number, its shape (rows first, as torch has it), its bytes' place."""

    kind: int
    shape: tuple[int, ...]
    offset: int
    nbytes: int


@dataclass(frozen=True)
class Header:
    """Metadata by key (numbers, strings, booleans and lists of these) and tensors by name."""

    path: Path
    metadata: dict[str, Any]
    tensors: dict[str, Stored]

    def read(self, name: str) -> np.ndarray[Any, np.dtype[np.uint8]]:
        """The bytes of a tensor, uint8 (rows, bytes per row); a vector is one row."""
        stored = self.tensors[name]
        data = np.fromfile(self.path, dtype=np.uint8, count=stored.nbytes, offset=stored.offset)
        if data.size != stored.nbytes:
            raise CheckpointError(f"{self.path} ends within '{name}': it was cut short. Get it again")
        rows = int(np.prod(stored.shape[:-1], dtype=np.int64))
        return data.reshape(rows, -1)


def is_gguf(path: str | Path) -> bool:
    """Whether a file begins as GGUF files do."""
    try:
        with Path(path).open("rb") as file:
            return file.read(4) == MAGIC
    except OSError:
        return False


def read_header(path: str | Path, sizes: dict[int, tuple[int, int]]) -> Header:
    """Read a file's header.

    Args:
        path: the file.
        sizes: by tensor type, the number of elements of a block and its bytes.

    Raises:
        CheckpointError: it is not GGUF, or damaged.
    """
    path = Path(path)
    if not is_gguf(path):
        raise CheckpointError(f"{path} is not a GGUF file")
    with path.open("rb") as file, mmap.mmap(file.fileno(), 0, access=mmap.ACCESS_READ) as data:
        try:
            return _parse(path, _Cursor(data), sizes)
        except (struct.error, UnicodeDecodeError, KeyError, OverflowError) as error:
            raise CheckpointError(
                f"{path} is damaged or cut short within its header ({error!r}). Get it again"
            ) from error


class _Cursor:
    def __init__(self, data: mmap.mmap):
        self.data, self.at = data, 0

    def take(self, form: str) -> Any:
        (value,) = struct.unpack_from(f"<{form}", self.data, self.at)
        self.at += struct.calcsize(f"<{form}")
        return value

    def count(self) -> int:
        number = int(self.take("Q"))
        if number > min(len(self.data), _MOST):
            raise OverflowError(f"a count of {number}")
        return number

    def string(self) -> str:
        length = self.count()
        text = self.data[self.at : self.at + length]
        self.at += length
        return text.decode("utf-8")

    def value(self, kind: int) -> Any:
        if kind == _STRING:
            return self.string()
        if kind != _ARRAY:
            return self.take(_SCALARS[kind])
        inner, length = self.take("I"), self.count()
        if inner in _SCALARS:
            form = f"<{length}{_SCALARS[inner]}"
            values = list(struct.unpack_from(form, self.data, self.at))
            self.at += struct.calcsize(form)
            return values
        if inner != _STRING:
            raise KeyError(f"an array of type {inner}")
        return [self.string() for _ in range(length)]


def _parse(path: Path, cursor: _Cursor, sizes: dict[int, tuple[int, int]]) -> Header:
    cursor.at = len(MAGIC)
    version = cursor.take("I")
    if version not in _VERSIONS:
        raise CheckpointError(f"{path} is GGUF version {version}; only little-endian 2 and 3 are read")
    tensor_count, key_count = cursor.count(), cursor.count()
    metadata: dict[str, Any] = {}
    for _ in range(key_count):
        key = cursor.string()
        metadata[key] = cursor.value(cursor.take("I"))
    found: list[tuple[str, int, tuple[int, ...], int]] = []
    for _ in range(tensor_count):
        name = cursor.string()
        dimensions = [cursor.take("Q") for _ in range(min(cursor.take("I"), 8))]
        found.append((name, cursor.take("I"), tuple(reversed(dimensions)), cursor.take("Q")))
    alignment = metadata.get("general.alignment", 32)
    if not isinstance(alignment, int) or alignment <= 0:
        raise CheckpointError(f"{path} is damaged: its alignment is {alignment!r}. Get it again")
    start = -(-cursor.at // alignment) * alignment
    tensors: dict[str, Stored] = {}
    for name, kind, shape, offset in found:
        if name in tensors:
            raise CheckpointError(f"{path} holds the tensor '{name}' twice. Get it again")
        if kind == _I2_S:
            raise CheckpointError(
                f"{path}: '{name}' is of type I2_S, bitnet.cpp's own, which is not read: take the model's "
                "safetensors"
            )
        if kind not in sizes:
            type = _OF_FORKS.get(kind, f"the unknown type {kind}")
            raise CheckpointError(f"{path}: tensor '{name}' has {type}")
        elements, size = sizes[kind]
        count = 1
        for dimension in shape:
            count *= dimension
        if not shape or shape[-1] % elements or count == 0:
            raise CheckpointError(f"{path}: tensor '{name}' has the impossible shape {list(shape)}")
        tensors[name] = Stored(kind, shape, start + offset, count // elements * size)
    _check_places(path, tensors, len(cursor.data))
    end = max((stored.offset + stored.nbytes for stored in tensors.values()), default=start)
    if (rest := len(cursor.data) - end) > alignment:
        raise CheckpointError(f"{path} is damaged: {rest:,} bytes follow its last tensor. Get it again")
    return Header(path, metadata, tensors)


def _check_places(path: Path, tensors: dict[str, Stored], end: int) -> None:
    """Each tensor must end before the next begins, the last with the file."""
    order = sorted(tensors.items(), key=lambda item: item[1].offset)
    for (name, stored), following in zip(order, [*order[1:], None], strict=True):
        room = (end if following is None else following[1].offset) - stored.offset
        if stored.nbytes <= room:
            continue
        codes = stored.nbytes // 18 * 64
        if stored.kind == _Q2_0 and 0 <= room - codes // 128 * 34 < codes // 128 * 34:
            raise CheckpointError(
                f"{path}: tensor '{name}' is of an older Q2_0 (type {_Q2_0} with blocks of 128 codes), which "
                "is not read: have the file made again by a newer llama.cpp"
            )
        if following is None or stored.offset + stored.nbytes > end:
            raise CheckpointError(f"{path} ends before or within '{name}': it was cut short. Get it again")
        raise CheckpointError(f"{path} is damaged: tensor '{name}' overlaps '{following[0]}'. Get it again")
