"""Packed checkpoints: 2 bits a weight, as transformers' BitNet integration reads them.

Byte ``[r, c]`` of the uint8 matrix (rows / 4, columns) holds the codes, plus one, of rows ``r``, ``r +
rows/4``, ``r + 2 rows/4`` and ``r + 3 rows/4`` at bits 0, 2, 4 and 6. Beside it lies ``weight_scale``: the
``s`` of the definition, bfloat16 (1,), by which the layer divides. All other tensors are stored in bfloat16.
"""

from __future__ import annotations

import re
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from ..convert import Plan
from ..ops import pack_codes, unpack_codes
from ..plain import ROWS_PER_BYTE
from .files import CheckpointError, read_json
from .rewrite import Layout, require_scale, rewrite
from .source import TernaryCheckpoint, read_plan
from .stream import CheckpointReader, Entry, SafetensorsWriter
from .threads import BLOCK, parallel_map, row_ranges


def pack_checkpoint(
    src: str | Path,
    dst: str | Path,
    overwrite: bool = False,
    check: Callable[[Path], None] | None = None,
) -> Path:
    """Pack a ternary model to 2 bits a weight.

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
    from .formats import open_checkpoint  # which knows this format too

    source = open_checkpoint(src)
    return rewrite(source, dst, _PackedLayout(), packed_config(source.config, source.names), overwrite, check)


class _PackedLayout(Layout):
    def entries(self, weight: Entry) -> list[Entry]:
        rows, columns = weight.shape
        if rows % ROWS_PER_BYTE:
            raise ValueError(f"has {rows} rows, not a multiple of {ROWS_PER_BYTE}")
        return [
            Entry(weight.name, torch.uint8, (rows // ROWS_PER_BYTE, columns)),
            Entry(f"{weight.name}_scale", torch.bfloat16, (1,)),
        ]

    def write(self, writer: SafetensorsWriter, source: TernaryCheckpoint, name: str, weight: Entry) -> None:
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


def with_rope_theta(config: dict[str, Any]) -> dict[str, Any]:
    """A config with ``rope_theta`` at its top, where alone MLX looks for it: it would take 10000 without a
    word."""
    rope = config.get("rope_parameters")
    if not isinstance(rope, dict) or "rope_theta" not in rope:
        return config
    theta = config.get("rope_theta", rope["rope_theta"])
    return {key: value for key, value in config.items() if key != "rope_theta"} | {"rope_theta": theta}


def in_bfloat16(config: dict[str, Any]) -> dict[str, Any]:
    """A config, and those of a multimodal model's towers in it, that say how tensors are stored."""
    inside = {
        key: in_bfloat16(value)
        for key, value in config.items()
        if key.endswith("_config")
        and isinstance(value, dict)
        and ("dtype" in value or "torch_dtype" in value)
    }
    kept = {key: value for key, value in config.items() if key != "torch_dtype"}
    return kept | inside | {"dtype": "bfloat16"}


class PackedCheckpoint(TernaryCheckpoint):
    """A packed folder, read back tensor by tensor.

    Raises:
        CheckpointError: the folder is not packed as :func:`pack_checkpoint` does it.
    """

    def __init__(self, folder: str | Path):
        self.folder = self.companions = Path(folder)
        config = read_json(self.folder / "config.json")
        quantization = config.pop("quantization_config", None) or {}
        if quantization.get("quant_method") != "bitnet" or quantization.get("linear_class") != "bitlinear":
            raise CheckpointError(
                f"{self.folder / 'config.json'} is not a packed model's (quant_method bitnet, linear_class "
                "bitlinear)"
            )
        self.config = config
        self.names = read_plan(config, self.folder / "config.json")
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
