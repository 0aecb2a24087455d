"""A teacher's loss and its gradient in two passes over a row of logits. Body in plain torch:
:mod:`axolotl_bitnet.ops.divergence`.

The first pass keeps a running maximum and sum of each softmax (Milakov and Gimelshein 2018, arXiv:1805.02867)
and the divergence's numerator ``sum exp(t - max t) (t - z)``, which is rescaled with the sum. The second
writes the gradient.
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

from .arithmetic import cast, power_of_2
from .launch import aligned, launch

_LOWEST = tl.constexpr(-3.0e38)


@triton.jit
def _divergence(
    z_ptr, t_ptr, labels_ptr, factor_ptr, gradient_ptr, kl_ptr, ce_ptr, columns, temperature, weight,
    MIXED: tl.constexpr, BLOCK: tl.constexpr,
):  # fmt: skip
    row = tl.program_id(0).to(tl.int64)
    start = row * columns
    place = tl.arange(0, BLOCK)
    dtype: tl.constexpr = gradient_ptr.dtype.element_ty
    cold = 1.0 / temperature
    max_z, max_t = tl.full((), _LOWEST, tl.float32), tl.full((), _LOWEST, tl.float32)
    sum_z, sum_t = tl.zeros((), tl.float32), tl.zeros((), tl.float32)
    apart, sum_1 = tl.zeros((), tl.float32), tl.zeros((), tl.float32)  # sum_1: of z at temperature 1
    for first in range(0, columns, BLOCK):
        mask = first + place < columns
        z = tl.load(z_ptr + start + first + place, mask=mask, other=_LOWEST)
        t = tl.load(t_ptr + start + first + place, mask=mask, other=_LOWEST)
        new_z, new_t = tl.maximum(max_z, tl.max(z, 0)), tl.maximum(max_t, tl.max(t, 0))
        sum_z = sum_z * tl.exp((max_z - new_z) * cold) + tl.sum(tl.exp((z - new_z) * cold), 0)
        if MIXED:
            sum_1 = sum_1 * tl.exp(max_z - new_z) + tl.sum(tl.exp(z - new_z), 0)
        kept = tl.exp((max_t - new_t) * cold)
        e = tl.exp((t - new_t) * cold)
        sum_t = sum_t * kept + tl.sum(e, 0)
        apart = apart * kept + tl.sum(tl.where(mask, e * (t - z), 0.0), 0)
        max_z, max_t = new_z, new_t
    if not MIXED:
        sum_1 = sum_z
    kl = apart * cold / sum_t + (max_z - max_t) * cold + tl.log(sum_z) - tl.log(sum_t)
    label = tl.load(labels_ptr + row)
    tl.store(kl_ptr + row, kl)
    tl.store(ce_ptr + row, max_z + tl.log(sum_1) - tl.load(z_ptr + start + label))
    factor = tl.load(factor_ptr)
    soft, hard = factor * weight * temperature, factor * (1.0 - weight)
    for first in range(0, columns, BLOCK):
        mask = first + place < columns
        z = tl.load(z_ptr + start + first + place, mask=mask, other=_LOWEST)
        t = tl.load(t_ptr + start + first + place, mask=mask, other=_LOWEST)
        q = tl.exp((z - max_z) * cold) / sum_z
        p = tl.exp((t - max_t) * cold) / sum_t
        gradient = soft * (q - p)
        if MIXED:
            onehot = tl.where(first + place == label, 1.0, 0.0)
            gradient += hard * (tl.exp(z - max_z) / sum_1 - onehot)
        tl.store(gradient_ptr + start + first + place, cast(gradient, dtype), mask=mask)


def divergence(
    z: Tensor,
    t: Tensor,
    labels: Tensor,
    factor: Tensor,
    temperature: float,
    weight: float,
    dtype: torch.dtype,
) -> tuple[Tensor, Tensor, Tensor]:
    """See :func:`axolotl_bitnet.ops.divergence.divergence`."""
    rows, columns = z.shape
    gradient = torch.empty_like(z, dtype=dtype)
    kl, ce = (torch.empty(rows, dtype=torch.float32, device=z.device) for _ in range(2))
    mixed = weight != 1 or temperature != 1
    block = min(4096, power_of_2(columns))
    args = (z, t, labels, factor, gradient, kl, ce, columns, float(temperature), float(weight), mixed, block)
    key = (dtype, columns, mixed, *aligned(z, t, labels, factor))
    launch(_divergence, rows, z.get_device(), key, args, warps=max(1, block // 512))
    return gradient, kl, ce
