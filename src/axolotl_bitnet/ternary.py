"""The definition: 1.58-bit weights and 8-bit activations, in plain torch.

This file is what every other part of the package is held against: the CPU path, the kernels, the packer and
the verifier all compute *these* bits. Each step is one IEEE operation in float32 (float64 for the sum),
rounding half to even, so that a CPU, a GPU, any sharding of the matrix and any order of reduction agree
exactly. Please do not "simplify" an expression here: ``127 * (1 / a)`` and ``127 / a`` differ in one code of
some 5,000.

Weights (absmean, Ma et al. 2024, arXiv:2402.17764), one scale a tensor, on the latent rounded to bfloat16::

    g     = max(float32(sum|W| / N), 1e-5)            the sum in float64
    codes = clamp(round(W * (1 / g)), -1, 1)          int8
    s     = bf16(1 / bf16(g))                         the scale that trains *is* the scale that ships

Activations (absmax), one scale a token::

    r     = 127 * (1 / max(max|x|, 1e-5))
    codes = clamp(round(x * r), -128, 127)            int8

Forward::

    y = float32(codes_x . codes_w^T) / (r * s)        the product of codes is an exact integer
"""

from __future__ import annotations

import torch
from torch import Tensor

DEFINITION = 1
"""Version of the rules in this file; written beside every fingerprint. Changes whenever a bit could."""

EPSILON = 1e-5
FLOAT32_EXACT = 2**24  # integers up to here are exact in float32


def abs_sum(weight: Tensor) -> Tensor:
    """``sum|bf16(W)|`` as a float64 scalar. Sums of row blocks or shards simply add up.

    Args:
        weight: latent weights, any shape and floating dtype.
    """
    return weight.to(torch.bfloat16).abs().sum(dtype=torch.float64)


def absmean(total: Tensor, numel: int | Tensor) -> Tensor:
    """``g`` as float32; NaN when the matrix holds a NaN or an Inf.

    Of several matrices at once, if ``total`` and ``numel`` are tensors of one shape.

    Args:
        total: float64, the :func:`abs_sum` of the whole matrix.
        numel: number of elements of the whole matrix; as a tensor, float64.
    """
    count = numel if isinstance(numel, Tensor) else torch.full_like(total, numel)
    mean = (total / count).to(torch.float32)
    mean = torch.where(torch.isfinite(mean), mean, torch.nan)
    return mean.clamp(min=EPSILON)


def scale_of(g: Tensor) -> Tensor:
    """``s = bf16(1 / bf16(g))``, shape (1,) (or that of a row of several g), bfloat16: the ``weight_scale``
    that is stored and trained.

    The inner rounding is what makes ``s`` recoverable from a bf16 dense model and from an fp16 scale.
    """
    return g.to(torch.bfloat16).to(torch.float32).reciprocal().to(torch.bfloat16).reshape(-1)


def codes_of(weight: Tensor, g: Tensor) -> Tensor:
    """int8 codes in {-1, 0, 1} of a matrix, or of any block of it, under the absmean ``g`` of the whole."""
    scaled = weight.to(torch.bfloat16).to(torch.float32) * g.reciprocal()
    # int8 cannot say NaN: the scale, which is NaN as well, says it for the whole matrix.
    return torch.nan_to_num(scaled, nan=0.0).round_().clamp_(-1, 1).to(torch.int8)


def ternarize(weight: Tensor) -> tuple[Tensor, Tensor]:
    """Quantize a latent weight matrix.

    Args:
        weight: (..., any shape), floating point. It is rounded to bfloat16 first, so float32 and bfloat16
            latents give the same result.

    Returns:
        ``(codes, s)``: int8 codes of the weight's shape and the bfloat16 scale, shape (1,). The weight that
        the forward uses is ``codes / s``.
    """
    g = absmean(abs_sum(weight), weight.numel())
    return codes_of(weight, g), scale_of(g)


def quantize_activations(x: Tensor, floor: float = EPSILON) -> tuple[Tensor, Tensor]:
    """Quantize activations to 8 bits, one scale a token (the last dimension).

    Args:
        x: (..., features), any rank >= 1, any strides, floating point.
        floor: least value of max|x| that the scale takes; gradients, which are small, need a lower one.

    Returns:
        ``(codes, r)``: int8 codes of x's shape and float32 scales, shape (..., 1). ``codes / r`` approximates
        x. A row that holds a NaN or an Inf has codes 0 and scale NaN, so whatever is computed from it is NaN.
    """
    x = x.to(torch.float32)
    a = x.abs().amax(dim=-1, keepdim=True)
    a = torch.where(torch.isfinite(a), a, torch.nan).clamp(min=floor)
    r = a.reciprocal() * 127
    return torch.nan_to_num(x * r, nan=0.0).round_().clamp_(-128, 127).to(torch.int8), r


def matmul_codes(codes_x: Tensor, codes_w: Tensor) -> Tensor:
    """``codes_x . codes_w^T``: the exact integers, as float32 (float64 where float32 could not hold them).

    Args:
        codes_x: int8 (..., K).
        codes_w: int8 (N, K) in {-1, 0, 1}.

    Returns:
        (..., N) on the inputs' device.
    """
    columns = codes_x.shape[-1]
    exact = torch.float32 if 128 * columns < FLOAT32_EXACT else torch.float64
    if codes_x.is_cuda:
        if columns % 8 == 0 and codes_w.shape[0] % 8 == 0 and columns > 0:
            return _int8_matmul_cuda(codes_x, codes_w).to(exact)
        exact = torch.float64  # float32 there may silently mean TF32
    return torch.nn.functional.linear(codes_x.to(exact), codes_w.to(exact))


def _int8_matmul_cuda(codes_x: Tensor, codes_w: Tensor) -> Tensor:
    """int8 tensor cores through torch; rows are padded because it wants more than 16 of them."""
    rows = codes_x.reshape(-1, codes_x.shape[-1])
    count = rows.shape[0]
    if count < 32:
        rows = torch.nn.functional.pad(rows, (0, 0, 0, 32 - count))
    product = torch._int_mm(rows.contiguous(), codes_w.t())
    return product[:count].reshape(*codes_x.shape[:-1], codes_w.shape[0])


def dequantize_output(product: Tensor, r: Tensor, s: Tensor) -> Tensor:
    """``product / (r * s)`` in float32: what the packed model of transformers computes, to the bit.

    Args:
        product: (..., N) integers from :func:`matmul_codes`.
        r: float32 (..., 1), the activations' scales.
        s: bfloat16 (1,), the weight's scale.
    """
    return product.to(torch.float32) / (r * s.to(torch.float32))


def dequantize(codes: Tensor, scale: Tensor, dtype: torch.dtype = torch.float32) -> Tensor:
    """``codes / scale`` in float32, then ``dtype``: what codes stand for, or a product of codes, scaled."""
    return (codes.to(torch.float32) / scale.to(torch.float32)).to(dtype)


def latents_of(codes: Tensor, s: Tensor) -> Tensor:
    """Latents that :func:`ternarize` turns back into exactly ``codes`` and ``s``.

    Needed wherever a model is already ternary: quantizing ``codes / s`` again would shrink the scale to its
    non-zero fraction. Two adjacent bfloat16 magnitudes are used, because a single one misses ``s`` in
    some 8 % of the cases.

    Args:
        codes: int8 (rows, columns) in {-1, 0, 1}, at least one of them not zero.
        s: bfloat16 (1,).

    Returns:
        bfloat16 (rows, columns).

    Raises:
        ValueError: all codes are zero, or no absmean rounds to this scale (it was not made by this
        definition).
    """
    target = s.to(torch.float32).reciprocal().to(torch.bfloat16)
    nonzero = int(codes.count_nonzero())
    if nonzero == 0:
        raise ValueError("every code of the matrix is zero: no latents can carry a scale")
    magnitude = float(target) * codes.numel() / nonzero
    low = torch.tensor(magnitude, dtype=torch.float64).to(torch.bfloat16)
    if float(low) > magnitude:
        low = torch.nextafter(low, torch.zeros_like(low))
    high = torch.nextafter(low, torch.full_like(low, torch.inf))
    raised = round(nonzero * (magnitude - float(low)) / (float(high) - float(low)))
    # Both should occur: a matrix of one magnitude would pass for a dense ternary one, and be scaled again.
    for count in (min(max(raised, 1), nonzero - 1), raised):
        latents = _two_magnitudes(codes, low, high, count)
        if _quantizes_to(latents, codes, s):
            return latents
    raise ValueError(
        f"no latents give the scale {float(s):g} with {nonzero} non-zero codes: it is not bf16(1 / bf16(g)) "
        "for a g >= 1e-5, or a single code cannot meet it"
    )


def _quantizes_to(latents: Tensor, codes: Tensor, s: Tensor) -> bool:
    """Whether :func:`ternarize` gives these codes and scale; by blocks of rows, to bound the copies."""
    step = _rows_at_a_time(codes)
    total = torch.stack([abs_sum(block) for block in latents.split(step)]).sum()
    g = absmean(total, latents.numel())
    scale = scale_of(g)
    return torch.equal(scale, s.reshape(1).to(scale)) and all(
        torch.equal(codes_of(block, g), expected.to(torch.int8))
        for block, expected in zip(latents.split(step), codes.split(step), strict=True)
    )


def _rows_at_a_time(matrix: Tensor) -> int:
    return max(1, (1 << 20) // max(1, matrix.shape[1]))


def _two_magnitudes(codes: Tensor, low: Tensor, high: Tensor, raised: int) -> Tensor:
    """``codes * low``, with the first ``raised`` non-zero elements ``codes * high`` instead, in bfloat16."""
    latents = codes.to(torch.bfloat16).mul_(low.to(codes.device))
    blocks = codes.split(_rows_at_a_time(codes))
    per_row = torch.cat([block.count_nonzero(dim=1) for block in blocks]).cumsum(0)
    whole_rows = int((per_row <= raised).sum())
    latents[:whole_rows].copy_(codes[:whole_rows]).mul_(high.to(codes.device))
    if whole_rows < codes.shape[0]:
        rest = raised - (int(per_row[whole_rows - 1]) if whole_rows else 0)
        columns = codes[whole_rows].nonzero().flatten()[:rest]
        latents[whole_rows, columns] = codes[whole_rows, columns].to(torch.bfloat16) * high.to(codes.device)
    return latents
