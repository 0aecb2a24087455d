"""Loss and gradient of a student's logits towards a teacher's, row by row.

With ``p = softmax(t / T)`` of the teacher, ``q = softmax(z / T)`` of the student and ``c`` the label::

    kl = sum p (log p - log q)          ce = -log softmax(z)[c]
    loss = w T^2 kl + (1 - w) ce        dloss/dz = w T (q - p) + (1 - w) (softmax(z) - onehot(c))

(Hinton et al. 2015, arXiv:1503.02531; T^2 keeps the gradient's size over temperatures.) All of it in float32,
the gradient of ``z`` made with the loss: it is what the backward needs, and logits are not kept. The kernel
reads both rows twice; torch's own operations would write a dozen tensors of the logits' size.
"""

from __future__ import annotations

import torch
from torch import Tensor

from .operation import has_kernels, operation


@operation("divergence", lambda z, *rest: has_kernels(z, rest[-1]) and z.numel() > 0, None)
def divergence(
    z: Tensor,
    t: Tensor,
    labels: Tensor,
    factor: Tensor,
    temperature: float,
    weight: float,
    dtype: torch.dtype,
) -> tuple[Tensor, Tensor, Tensor]:
    """``factor * dloss/dz`` as ``dtype`` (rows, vocabulary), and ``kl`` and ``ce`` (rows,).

    Args:
        z, t: float32 (rows, vocabulary), contiguous: the student's logits and the teacher's.
        labels: int64 (rows,), each within the vocabulary.
        factor: float32 (): what the gradient is multiplied with.
        temperature: T > 0.
        weight: w, of the divergence, within 0 and 1.
        dtype: of the gradient.
    """
    log_q = torch.log_softmax(z / temperature, -1)
    log_p = torch.log_softmax(t / temperature, -1)
    p, q = log_p.exp(), log_q.exp()
    kl = (p * (log_p - log_q)).sum(-1)
    log_s = log_q if temperature == 1 else torch.log_softmax(z, -1)
    ce = -log_s.gather(-1, labels[:, None])[:, 0]
    gradient = (q - p) * (weight * temperature)
    if weight != 1:
        hard = log_s.exp()
        hard.scatter_add_(-1, labels[:, None], -torch.ones_like(hard[:, :1]))
        gradient += hard * (1 - weight)
    return (gradient * factor).to(dtype), kl, ce
