"""Operations on weights: to ternary codes and back, to 2 bits and back, whole or a shard at a time.

Results are contiguous. How an operation is written: :mod:`axolotl_bitnet.ops.operation`.
"""

from __future__ import annotations

from collections.abc import Iterable
from typing import NamedTuple

import torch
from torch import Tensor

from .. import ternary
from .operation import has_kernels, operation

ROWS_PER_BYTE = 4
"""Rows of codes that the packed format keeps in one row of bytes."""


def _holds(weight: Tensor, *_: object) -> bool:
    return has_kernels(weight) and weight.numel() > 0


@operation(
    "weights",
    _holds,
    lambda weight: (
        weight.new_empty(weight.shape, dtype=torch.int8),
        weight.new_empty(1, dtype=torch.bfloat16),
        weight.new_empty((), dtype=torch.float32),
    ),
)
def ternarize(weight: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """int8 codes of the weight's shape, ``s`` bfloat16 (1,), and the absmean ``g`` float32 ()."""
    g = ternary.absmean(ternary.abs_sum(weight), weight.numel())
    return ternary.codes_of(weight, g).contiguous(), ternary.scale_of(g), g


@operation(
    "weights",
    lambda weight, g, dtype: has_kernels(weight, dtype) and weight.numel(),
    lambda weight, g, dtype: weight.new_empty(weight.shape, dtype=dtype),
)
def dequantized_weight(weight: Tensor, g: Tensor, dtype: torch.dtype) -> Tensor:
    """``codes / s`` as ``dtype``: what dY is multiplied with. ``g`` is :func:`ternarize`'s."""
    return ternary.dequantize(ternary.codes_of(weight, g), ternary.scale_of(g), dtype).contiguous()


@operation(
    "weights",
    _holds,
    lambda weight, g: (
        weight.new_empty(weight.shape[::-1], dtype=torch.int8),
        weight.new_empty(1, dtype=torch.bfloat16),
    ),
)
def transposed_codes(weight: Tensor, g: Tensor) -> tuple[Tensor, Tensor]:
    """int8 codes of the transposed weight (columns, rows), and ``s``. ``g`` is :func:`ternarize`'s."""
    return ternary.codes_of(weight, g).t().contiguous(), ternary.scale_of(g)


@operation(
    "packing",
    lambda codes: _holds(codes) and codes.shape[0] % ROWS_PER_BYTE == 0,
    lambda codes: codes.new_empty((codes.shape[0] // ROWS_PER_BYTE, codes.shape[1]), dtype=torch.uint8),
)
def pack_codes(codes: Tensor) -> Tensor:
    """int8 codes (rows, columns), rows a multiple of 4, to uint8 (rows / 4, columns): 2 bits per code.

    Byte ``[r, c]`` holds the codes, plus one, of rows ``r``, ``r + rows/4``, ``r + 2 rows/4`` and ``r + 3
    rows/4`` at bits 0, 2, 4 and 6.

    Raises:
        ValueError: rows is not a multiple of 4.
    """
    if codes.shape[0] % ROWS_PER_BYTE:
        raise ValueError(f"{codes.shape[0]} rows cannot be packed: not a multiple of {ROWS_PER_BYTE}")
    first, second, third, fourth = (codes.contiguous() + 1).to(torch.uint8).chunk(ROWS_PER_BYTE)
    return first | second << 2 | third << 4 | fourth << 6


@operation(
    "packing",
    _holds,
    lambda packed: packed.new_empty((packed.shape[0] * ROWS_PER_BYTE, packed.shape[1]), dtype=torch.int8),
)
def unpack_codes(packed: Tensor) -> Tensor:
    """uint8 (rows / 4, columns) to int8 codes (rows, columns). Bits 11 give 2, which no packer writes."""
    return torch.cat([(packed >> shift & 3).to(torch.int8) - 1 for shift in (0, 2, 4, 6)])


# A sharded weight: to 2 bits before the all-gather, from 2 bits after it


@operation("weights", has_kernels, None)
def abs_sum_parts(weight: Tensor) -> Tensor:
    """float64 (parts,) that add up to ``sum|bf16(W)|`` of a shard, as many for every shard of a device."""
    return ternary.abs_sum(weight).reshape(1)


@operation("shards", lambda weight, g, rows: has_kernels(weight), None)
def pack_shard(weight: Tensor, g: Tensor, rows: int) -> Tensor:
    """A shard's codes under the whole weight's absmean ``g``: uint8 (ceil(rows / 4), columns), with zeros
    below its own rows.

    Byte ``[r, c]`` holds the codes, plus one, of rows ``4 r`` to ``4 r + 3`` at bits 0, 2, 4 and 6: unlike
    those of :func:`pack_codes`, bytes of several shards can be laid one below the other.
    """
    bytes = -(-rows // ROWS_PER_BYTE)
    codes = torch.zeros(bytes * ROWS_PER_BYTE, weight.shape[1], dtype=torch.int8, device=weight.device)
    codes[: weight.shape[0]] = ternary.codes_of(weight, g)
    first, second, third, fourth = (codes + 1).to(torch.uint8).unflatten(0, (-1, ROWS_PER_BYTE)).unbind(1)
    return first | second << 2 | third << 4 | fourth << 6


@operation(
    "shards",
    lambda packed, rows: has_kernels(packed),
    lambda packed, rows: packed.new_empty((rows, packed.shape[2]), dtype=torch.int8),
)
def unpack_shards(packed: Tensor, rows: int) -> Tensor:
    """int8 codes (rows, columns) from the bytes of all shards, uint8 (shards, bytes, columns).

    A shard has ``ceil(rows / shards)`` rows, the last ones what is left (maybe nothing).
    """
    codes = torch.stack([(packed >> shift & 3).to(torch.int8) - 1 for shift in (0, 2, 4, 6)], dim=2)
    by_shard = codes.flatten(1, 2)[:, : -(-rows // packed.shape[0])]
    return by_shard.reshape(-1, packed.shape[2])[:rows].contiguous()


@operation(
    "shards",
    lambda packed, rows: has_kernels(packed) and rows % (ROWS_PER_BYTE * packed.shape[0]) == 0,
    lambda packed, rows: packed.new_empty((packed.shape[2], rows), dtype=torch.int8),
)
def transposed_shards(packed: Tensor, rows: int) -> Tensor:
    """int8 codes of the transposed weight (columns, rows), from the bytes of all shards."""
    return unpack_shards(packed, rows).t().contiguous()


@operation(
    "shards",
    lambda packed, g, rows, dtype: has_kernels(packed, dtype),
    lambda packed, g, rows, dtype: packed.new_empty((rows, packed.shape[2]), dtype=dtype),
)
def dequantize_shards(packed: Tensor, g: Tensor, rows: int, dtype: torch.dtype) -> Tensor:
    """``codes / s`` as ``dtype``, (rows, columns)."""
    return ternary.dequantize(unpack_shards.plain(packed, rows), ternary.scale_of(g), dtype)


class Part(NamedTuple):
    """One weight of a :class:`ShardLayout`."""

    rows: int
    columns: int
    shard_rows: int
    bytes: int
    """Rows of bytes that a shard has of it."""
    packed_at: int
    """Where it begins in a shard's bytes."""
    codes_at: int
    """Where it begins in the codes of all."""


class ShardLayout:
    """Where the packed shards of several weights are, one after the other, and their codes; each begins at a
    multiple of 16 bytes, to which kernels' loads are aligned."""

    def __init__(self, shards: int, shapes: Iterable[tuple[int, int]]) -> None:
        """
        Args:
            shards: of each weight.
            shapes: (rows, columns) of the weights.
        """
        self.shards = shards
        self.parts: list[Part] = []
        self.packed_size = self.codes_size = 0  # bytes of a shard; codes of all weights
        for rows, columns in shapes:
            shard_rows = -(-rows // shards)
            bytes = -(-shard_rows // ROWS_PER_BYTE)
            self.parts.append(Part(rows, columns, shard_rows, bytes, self.packed_size, self.codes_size))
            self.packed_size += -(-bytes * columns // 16) * 16
            self.codes_size += -(-rows * columns // 16) * 16


@operation("shards", lambda packed, layout: has_kernels(packed), None)
def unpack_layer(packed: Tensor, layout: ShardLayout) -> Tensor:
    """int8 codes of several weights, one after the other, from the bytes of all shards: uint8 (shards,
    ``layout.packed_size``) to (``layout.codes_size``,). What lies between weights is undefined."""
    codes = torch.empty(layout.codes_size, dtype=torch.int8, device=packed.device)
    for part in layout.parts:
        size = part.bytes * part.columns
        own = packed[:, part.packed_at : part.packed_at + size].unflatten(1, (part.bytes, part.columns))
        unpacked = unpack_shards.plain(own, part.rows).view(-1)
        codes[part.codes_at : part.codes_at + unpacked.numel()] = unpacked
    return codes
