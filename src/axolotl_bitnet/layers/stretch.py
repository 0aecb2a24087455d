"""Latents fitted to the ternary grid, and the inverse.

A dense matrix has one best scale ``alpha`` for its ternary copy, some 1.3 to 1.6 times its mean magnitude,
but the definition takes the mean magnitude itself. Stretched, what lies beyond ``alpha / 2`` is moved away
from it by one factor ``k``, chosen so that the mean magnitude *is* alpha::

    L = W                                         where |W| < alpha / 2
    L = sign(W) (alpha / 2 + k (|W| - alpha / 2))  elsewhere

so that :func:`axolotl_bitnet.ternary.ternarize` gives the codes ``round(W / alpha)`` and the scale of alpha.
It is inverted element by element, so a ramp from the dense model needs no copy of W.
"""

from __future__ import annotations

import torch
from torch import Tensor


def stretched(weight: Tensor, alpha: Tensor, k: Tensor) -> Tensor:
    """Latents L of a dense matrix W, of its shape, float32 (arithmetic in float32).

    Args:
        weight: W, or rows of it.
        alpha, k: float32 (), of the whole matrix; both above 0.
    """
    return _moved(weight, alpha / 2, k)


def unstretched(latents: Tensor, stretch: Tensor) -> Tensor:
    """W of latents L, float32. ``stretch`` is float32 (2,): alpha and k."""
    return _moved(latents, stretch[0] / 2, 1 / stretch[1])


def _moved(weight: Tensor, threshold: Tensor, factor: Tensor) -> Tensor:
    weight = weight.to(torch.float32)
    beyond = weight.abs() - threshold
    return torch.where(beyond >= 0, weight.sign() * (threshold + factor * beyond), weight)
