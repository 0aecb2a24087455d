"""The operations of a sharded weight, in plain torch or in Triton, as :mod:`axolotl_bitnet.ops` has those of
a whole one: to 2 bits before the all-gather, and from 2 bits after it.
"""

from __future__ import annotations

import torch
from torch import Tensor

from . import has_kernels, plain, register, run


def abs_sum_parts(weight: Tensor) -> Tensor:
    """float64 (parts,) that add up to ``sum|bf16(W)|`` of a shard, as many for every shard of a device."""
    if has_kernels(weight):
        from .kernels import weights

        return weights.abs_sum_parts(weight)
    return plain.abs_sum_parts(weight)


def pack_shard(weight: Tensor, g: Tensor, rows: int) -> Tensor:
    """A shard's codes under the whole weight's absmean ``g``: uint8 (ceil(rows / 4), columns), with zeros
    below its own rows."""
    if has_kernels(weight):
        from .kernels import shards

        return shards.pack_shard(weight, g, rows)
    return plain.pack_shard(weight, g, rows)


def unpack_shards(packed: Tensor, shards: int, rows: int) -> Tensor:
    """int8 codes (rows, columns) from the bytes of all shards, uint8 (shards * bytes, columns)."""
    return run(_unpack_shards, _unpack_shards_here, packed, shards, rows)


def dequantize_shards(packed: Tensor, g: Tensor, shards: int, rows: int, dtype: torch.dtype) -> Tensor:
    """``codes / s`` as ``dtype``, (rows, columns)."""
    return run(_dequantize_shards, _dequantize_shards_here, packed, g, shards, rows, dtype)


def _unpack_shards_here(packed: Tensor, shards: int, rows: int) -> Tensor:
    if has_kernels(packed):
        from .kernels import shards as kernels

        return kernels.unpack_shards(packed, shards, rows)
    return plain.unpack_shards(packed, shards, rows)


def _dequantize_shards_here(packed: Tensor, g: Tensor, shards: int, rows: int, dtype: torch.dtype) -> Tensor:
    if has_kernels(packed, dtype):
        from .kernels import shards as kernels

        return kernels.dequantize_shards(packed, g, shards, rows, dtype)
    return plain.dequantize_shards(packed, g, shards, rows, dtype)


_unpack_shards = register(
    _unpack_shards_here,
    lambda packed, shards, rows: packed.new_empty((rows, packed.shape[1]), dtype=torch.int8),
)
_dequantize_shards = register(
    _dequantize_shards_here,
    lambda packed, g, shards, rows, dtype: packed.new_empty((rows, packed.shape[1]), dtype=dtype),
)
