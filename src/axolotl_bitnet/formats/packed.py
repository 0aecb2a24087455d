"""Packed checkpoints: 2 bits per weight, as transformers' BitNet integration reads them.

Byte ``[r, c]`` of the uint8 matrix (rows / 4, columns) holds the codes, plus one, of rows ``r``, ``r +
rows/4``, ``r + 2 rows/4`` and ``r + 3 rows/4`` at bits 0, 2, 4 and 6. Beside it lies ``weight_scale``: the
``s`` of the definition, bfloat16 (1,), by which the layer divides. All other tensors are stored in bfloat16.
"""

from __future__ import annotations

import re
from collections.abc import Callable, Iterator, Mapping
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from ..model.layer_plan import Plan
from ..ops import ROWS_PER_BYTE, pack_codes, unpack_codes
from ..storage.atomic import CheckpointError
from ..storage.parallel import BLOCK, parallel_map, row_ranges
from ..storage.safetensors_stream import CheckpointReader, Entry, SafetensorsWriter
from .checkpoint import TernaryCheckpoint
from .config_json import in_bfloat16, read_config, read_plan, with_rope_theta
from .folder_writer import FolderFormat, require_scale
from .recognize import recognize


class PackedFormat(FolderFormat):
    def open(self, path: str | Path, config: Mapping[str, Any] | None = None) -> TernaryCheckpoint:
        return PackedCheckpoint(path, config)

    def config_of(self, source: TernaryCheckpoint) -> dict[str, Any]:
        return packed_config(source.config, source.names)

    def entries(self, weight: Entry) -> list[Entry]:
        rows, columns = weight.shape
        if rows % ROWS_PER_BYTE:
            raise ValueError(f"has {rows} rows, not a multiple of {ROWS_PER_BYTE}")
        return [
            Entry(weight.name, torch.uint8, (rows // ROWS_PER_BYTE, columns)),
            Entry(f"{weight.name}_scale", torch.bfloat16, (1,)),
        ]

    def write_layer(
        self, writer: SafetensorsWriter, source: TernaryCheckpoint, name: str, weight: Entry
    ) -> None:
        rows_of, scale = source.code_rows(name)
        require_scale(source, weight, scale)
        writer.write_blocks(weight.name, _packed_blocks(rows_of, *weight.shape))
        writer.write(f"{weight.name}_scale", scale)


def _packed_blocks(rows_of: Callable[[int, int], Tensor], rows: int, columns: int) -> Iterator[Tensor]:
    """A matrix's bytes by blocks of rows, each made from rows of its four quarters."""
    quarter = rows // ROWS_PER_BYTE

    def block(rows_of_bytes: tuple[int, int]) -> Tensor:
        start, stop = rows_of_bytes
        codes = [rows_of(first + start, first + stop) for first in range(0, rows, quarter)]
        return pack_codes(torch.cat(codes))

    return parallel_map(block, row_ranges(quarter, columns, BLOCK // ROWS_PER_BYTE))


def packed_config(config: dict[str, Any], names: Plan) -> dict[str, Any]:
    """A latent checkpoint's config.json turned into a packed one's."""
    packed = with_rope_theta(in_bfloat16(config))
    packed["quantization_config"] = {
        "quant_method": "bitnet",
        "linear_class": "bitlinear",  # divides by weight_scale; "autobitlinear" would scale the bias as well
        "quantization_mode": "offline",
        "modules_to_not_convert": _exclusions(names),
    }
    return packed


class PackedCheckpoint(TernaryCheckpoint):
    """A packed folder, read back tensor by tensor.

    Raises:
        CheckpointError: the folder is not packed as :func:`pack_checkpoint` does it.
    """

    format = "packed"

    def __init__(self, folder: str | Path, config: Mapping[str, Any] | None = None):
        self.folder = self.companions = Path(folder)
        self.config = read_config(self.folder, config)
        found = recognize(self.config)
        if (found.method, found.linear_class) != ("bitnet", "bitlinear"):
            raise CheckpointError(
                f"{self.folder / 'config.json'} is not a packed model's (quant_method bitnet, linear_class "
                "bitlinear)"
            )
        del self.config["quantization_config"]
        self.names = read_plan(self.config, self.folder / "config.json")
        self._reader = CheckpointReader(self.folder)
        stored = self._reader.entries
        self.keys = {name: f"{self.names.stem(name, stored)}.weight" for name in self.names.converted}
        ternary = set(self.keys.values())
        for name, key in self.keys.items():
            entry, scale = stored.get(key), stored.get(f"{key}_scale")
            if entry is None or entry.dtype != torch.uint8 or scale is None or scale.shape != (1,):
                raise CheckpointError(
                    f"{self.folder}: layer '{name}' is not packed (a uint8 weight, and a weight_scale of "
                    "shape [1])"
                )
        self.entries = {
            key: Entry(key, torch.bfloat16, (entry.shape[0] * ROWS_PER_BYTE, entry.shape[1]))
            if key in ternary
            else entry
            for key, entry in stored.items()
            if key.removesuffix("_scale") not in ternary or key in ternary
        }
        self.settle_head()

    def codes(self, name: str) -> tuple[Tensor, Tensor]:
        key = self.keys[name]
        return unpack_codes(self._reader.tensor(key)), self._reader.tensor(f"{key}_scale")

    def tensor(self, key: str) -> Tensor:
        return self._reader.tensor(key)


def _exclusions(names: Plan) -> list[str]:
    """``modules_to_not_convert``. Transformers matches an entry as a prefix or a suffix of a module's name
    too, so one that would catch a ternary layer (``mlp.gate`` in ``mlp.gate_proj``) is anchored."""
    entries = []
    for name in names.dense:
        catches = any(re.match(name, other) or other.endswith(name) for other in names.converted)
        entries.append(f"{re.escape(name)}$" if catches else name)
    return entries


PACKED = PackedFormat()
