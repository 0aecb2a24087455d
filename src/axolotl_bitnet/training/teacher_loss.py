"""The loss of a student towards a teacher, from the hidden states before both heads.

Logits of 8,192 tokens over 152,000 words are 5 GB in float32, and a divergence needs the student's and the
teacher's. So a few hundred tokens at a time go through both heads, and the gradient is made with the loss:
what remains for backward is the gradient of the hidden states and that of the student's head.

1. logits of a chunk in float32, from operands in the dtype that the model computes in;
2. softmax, divergence and their gradient in float32 (:mod:`axolotl_bitnet.ops.divergence`);
3. that gradient times the head, and its transpose times the hidden states, added up in float32.

Not Liger's fused losses: in bfloat16 they round logits and sums, and are up to 44 % off at a small
divergence. Nor a second pass in backward: under FSDP2 the teacher's head is gone by then.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable

from ..ops.divergence import divergence

CHUNK = 80 << 20
"""Logits of a chunk (tokens x vocabulary): 320 MB for each model in float32, and 160 for their gradient."""


def teacher_loss(
    hidden: Tensor,
    head: Tensor,
    teacher_hidden: Tensor,
    teacher_head: Tensor,
    labels: Tensor,
    items: Tensor,
    temperature: float = 1.0,
    weight: float = 1.0,
    dtype: torch.dtype | None = None,
) -> tuple[Tensor, Tensor, Tensor]:
    """``sum over tokens of weight T^2 KL(teacher || student) + (1 - weight) CE``, divided by ``items``.

    Args:
        hidden: (tokens, size), what the student's head reads. Every token counts: leave out the others.
        head: (vocabulary, size), the student's head, of any floating dtype.
        teacher_hidden, teacher_head: (tokens, its size) and (vocabulary, its size); they get no gradient.
        labels: int64 (tokens,), the word that follows each; read for the cross-entropy.
        items: (), what the sum is divided by: the trained tokens of the whole batch.
        temperature: T > 0, of both softmaxes.
        weight: of the divergence, within 0 and 1.
        dtype: what both heads compute in; None for hidden's own.

    Returns:
        The loss, float32 (), differentiable once in ``hidden`` and ``head``; and the sums of KL (at T = 1 in
        nats per token) and cross-entropy over the tokens, float32 (), which are not.

    Raises:
        RuntimeError: backward runs a second time.
    """
    dtype = dtype or hidden.dtype
    items = items.to(hidden.device, torch.float32)
    with torch.autocast(hidden.device.type, enabled=False):
        teacher = teacher_hidden.detach().to(dtype), teacher_head.detach().to(dtype)
        return _TeacherLoss.apply(hidden, head, *teacher, labels, items, temperature, weight, dtype)


class _TeacherLoss(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx: Any,
        hidden: Tensor,
        head: Tensor,
        teacher_hidden: Tensor,
        teacher_head: Tensor,
        labels: Tensor,
        items: Tensor,
        temperature: float,
        weight: float,
        dtype: torch.dtype,
    ) -> tuple[Tensor, Tensor, Tensor]:
        ctx.dtypes, ctx.spent = (hidden.dtype, head.dtype), False
        needs_hidden, needs_head = ctx.needs_input_grad[:2]
        hidden, head = hidden.to(dtype), head.to(dtype)
        d_hidden = torch.empty_like(hidden) if needs_hidden else None
        d_head = torch.zeros_like(head, dtype=_wide(dtype)) if needs_head else None
        factor = 1 / items
        kl, ce = (torch.zeros((), dtype=_wide(dtype), device=hidden.device) for _ in range(2))
        size = max(1, CHUNK // len(head) // 64 * 64)
        for start in range(0, len(hidden), size):
            rows = slice(start, start + size)
            z = _product(hidden[rows], head.t())
            t = _product(teacher_hidden[rows], teacher_head.t())
            dz, kls, ces = divergence(z, t, labels[rows], factor, temperature, weight, dtype)
            del z, t
            kl, ce = kl + kls.sum(), ce + ces.sum()
            if d_hidden is not None:
                torch.mm(dz, head, out=d_hidden[rows])
            if d_head is not None:
                _add_product(d_head, dz.t(), hidden[rows])
        ctx.save_for_backward(d_hidden, d_head)
        ctx.mark_non_differentiable(kl, ce)
        loss = kl * (weight * temperature * temperature)
        if weight != 1:
            loss = loss + ce * (1 - weight)
        return loss * factor, kl, ce

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, d_loss: Tensor, *_: Any) -> tuple[Tensor | None, ...]:
        if ctx.spent:
            raise RuntimeError("the teacher's loss went backward before, and its gradient is used up")
        ctx.spent = True
        gradients = [
            None if gradient is None else gradient.mul_(d_loss).to(dtype)  # in place: the head's is large
            for gradient, dtype in zip(ctx.saved_tensors, ctx.dtypes, strict=True)
        ]
        return *gradients, None, None, None, None, None, None, None


def _wide(dtype: torch.dtype) -> torch.dtype:
    return torch.promote_types(dtype, torch.float32)


def _product(a: Tensor, b: Tensor) -> Tensor:
    """``a b`` as float32 (float64 of float64): a matrix unit's own sums, not rounded to bfloat16."""
    wide = _wide(a.dtype)
    if a.is_cuda and wide != a.dtype:
        return torch.mm(a, b, out_dtype=wide)
    return a.to(wide) @ b.to(wide)


def _add_product(total: Tensor, a: Tensor, b: Tensor) -> None:
    """``total += a b``, the sum in total's dtype."""
    if a.dtype == total.dtype:
        total.addmm_(a, b)
    elif a.is_cuda:
        torch.ops.aten.addmm.dtype_out(total, a, b, total.dtype, out=total)
    else:
        total.addmm_(a.to(total.dtype), b.to(total.dtype))
