"""The operations in plain torch, from the definition: what runs without kernels, and what kernels are tested
against. Results are contiguous, as the kernels' are.
"""

from __future__ import annotations

import torch
from torch import Tensor
from torch.nn.functional import silu

from .. import ternary


def ternarize(weight: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """Codes, ``s`` and ``g``."""
    g = ternary.absmean(ternary.abs_sum(weight), weight.numel())
    return ternary.codes_of(weight, g).contiguous(), ternary.scale_of(g), g


def dequantized_weight(weight: Tensor, g: Tensor, dtype: torch.dtype) -> Tensor:
    """``codes / s`` as ``dtype``."""
    return ternary.dequantize(ternary.codes_of(weight, g), ternary.scale_of(g), dtype).contiguous()


def transposed_codes(weight: Tensor, g: Tensor) -> tuple[Tensor, Tensor]:
    """Codes of the transposed weight, and ``s``."""
    return ternary.codes_of(weight, g).t().contiguous(), ternary.scale_of(g)


def quantize_activations(
    x: Tensor, dtype: torch.dtype, floor: float = ternary.EPSILON
) -> tuple[Tensor, Tensor]:
    """Codes and ``r`` of ``x.to(dtype)``."""
    codes, r = ternary.quantize_activations(x.to(dtype), floor)
    return codes.contiguous(), r.contiguous()


def dequantize_activations(codes: Tensor, r: Tensor, dtype: torch.dtype) -> Tensor:
    """``codes / r`` as ``dtype``."""
    return ternary.dequantize(codes, r, dtype)


def matmul(
    codes_x: Tensor, r: Tensor, codes_w: Tensor, s: Tensor, bias: Tensor | None, dtype: torch.dtype
) -> Tensor:
    """The product, scaled, as ``dtype``, plus the bias."""
    y = ternary.dequantize_output(ternary.matmul_codes(codes_x, codes_w), r, s).to(dtype)
    return y if bias is None else y + bias.to(dtype)


def swiglu_quantize(gate: Tensor, up: Tensor) -> tuple[Tensor, Tensor]:
    """Codes and ``r`` of ``silu(gate) * up``, rounded as a model's own code rounds it."""
    return quantize_activations(silu(gate) * up, gate.dtype)


def swiglu_backward(dh: Tensor, gate: Tensor, up: Tensor, r: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """Gradients of gate and up, and the product as it was quantized."""
    activated = silu(gate)
    codes = torch.nan_to_num((activated * up).to(torch.float32) * r, nan=0.0).round_()
    gate32 = gate.to(torch.float32)
    sigmoid = torch.sigmoid(gate32)
    dgate = dh.to(torch.float32) * up * sigmoid * (1 + gate32 * (1 - sigmoid))
    dup = dh.to(torch.float32) * activated
    h = ternary.dequantize(codes, r, gate.dtype)
    return dgate.to(gate.dtype).contiguous(), dup.to(up.dtype).contiguous(), h.contiguous()


def rmsnorm_quantize(
    x: Tensor, weight: Tensor, eps: float, dtype: torch.dtype
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """The normalized x, its codes and ``r``, and 1 / rms."""
    x32 = x.to(torch.float32)
    rstd = torch.rsqrt(x32.square().mean(-1, keepdim=True) + eps)
    y = ((x32 * rstd).to(x.dtype) * weight).contiguous()
    return y, *quantize_activations(y, dtype), rstd.contiguous()


def rmsnorm_backward(dy: Tensor, x: Tensor, weight: Tensor, rstd: Tensor) -> tuple[Tensor, Tensor]:
    """Gradients of x and of the weight."""
    normal = x.to(torch.float32) * rstd
    weighted = dy.to(torch.float32) * weight
    dx = rstd * (weighted - normal * (weighted * normal).mean(-1, keepdim=True))
    dw = (dy.to(torch.float32) * normal).reshape(-1, x.shape[-1]).sum(0)
    return dx.to(x.dtype).contiguous(), dw.to(weight.dtype)


ROWS_PER_BYTE = 4
"""Rows of codes that the packed format keeps in one row of bytes."""


def pack_codes(codes: Tensor) -> Tensor:
    """int8 codes (rows, columns) to uint8 (rows / 4, columns).

    Byte ``[r, c]`` holds the codes, plus one, of rows ``r``, ``r + rows/4``, ``r + 2 rows/4`` and ``r + 3
    rows/4`` at bits 0, 2, 4 and 6.

    Raises:
        ValueError: rows is not a multiple of 4.
    """
    if codes.shape[0] % ROWS_PER_BYTE:
        raise ValueError(f"{codes.shape[0]} rows cannot be packed: not a multiple of {ROWS_PER_BYTE}")
    first, second, third, fourth = (codes.contiguous() + 1).to(torch.uint8).chunk(ROWS_PER_BYTE)
    return first | second << 2 | third << 4 | fourth << 6


def unpack_codes(packed: Tensor) -> Tensor:
    """uint8 (rows / 4, columns) to int8 codes (rows, columns). Bits 11 give 2, which no packer writes."""
    return torch.cat([(packed >> shift & 3).to(torch.int8) - 1 for shift in (0, 2, 4, 6)])


def abs_sum_parts(weight: Tensor) -> Tensor:
    """Float64 (parts,) that add up to ``sum|bf16(W)|``."""
    return ternary.abs_sum(weight).reshape(1)


def pack_shard(weight: Tensor, g: Tensor, rows: int) -> Tensor:
    """Codes of a shard (its rows, columns), padded with zeros to ``rows`` rows, as uint8 (ceil(rows / 4),
    columns).

    Byte ``[r, c]`` holds the codes, plus one, of rows ``4 r`` to ``4 r + 3`` at bits 0, 2, 4 and 6: unlike
    those of :func:`pack_codes`, bytes of several shards can be laid one below the other.
    """
    codes = torch.zeros(-(-rows // ROWS_PER_BYTE) * ROWS_PER_BYTE, weight.shape[1], dtype=torch.int8).to(
        weight.device
    )
    codes[: weight.shape[0]] = ternary.codes_of(weight, g)
    first, second, third, fourth = (codes + 1).to(torch.uint8).unflatten(0, (-1, ROWS_PER_BYTE)).unbind(1)
    return first | second << 2 | third << 4 | fourth << 6


def unpack_shards(packed: Tensor, shards: int, rows: int) -> Tensor:
    """int8 codes (rows, columns) from the bytes of all shards, uint8 (shards * bytes, columns).

    A shard has ``ceil(rows / shards)`` rows, the last ones what is left (maybe nothing).
    """
    codes = torch.stack([(packed >> shift & 3).to(torch.int8) - 1 for shift in (0, 2, 4, 6)], dim=1)
    by_shard = codes.reshape(shards, -1, packed.shape[1])[:, : -(-rows // shards)]
    return by_shard.reshape(-1, packed.shape[1])[:rows].contiguous()


def dequantize_shards(packed: Tensor, g: Tensor, shards: int, rows: int, dtype: torch.dtype) -> Tensor:
    """``codes / s`` as ``dtype``, (rows, columns)."""
    return ternary.dequantize(unpack_shards(packed, shards, rows), ternary.scale_of(g), dtype)
