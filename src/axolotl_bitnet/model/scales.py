"""Ternary matrices with a scale a row or a group: those of TriLM, BitCPM, Bonsai, Axolotl's ternary qat.

This package's formats hold one scale a matrix. Such a matrix has values of many magnitudes and would pass for
one that was never ternary, so it is told apart by its rows and groups, each of which has one.
"""

from __future__ import annotations

from torch import Tensor

GROUPS = (256, 128, 64, 32)


def several_scales(weight: Tensor) -> str | None:
    """How the scales of a ternary matrix lie: "by rows", or "by groups of G" of a row; None where its rows
    are not ternary so, or where one scale serves them all.

    Args:
        weight: floating point (rows, columns), or a block of whole rows. Rows of zeros say nothing.
    """
    size = weight.abs()
    if weight.numel() == 0 or weight.shape[1] < min(GROUPS) or not bool(size.any()):
        return None
    if _one_each(size):
        largest = size.amax(dim=1)
        largest = largest[largest > 0]
        return "by rows" if bool((largest != largest[0]).any()) else None
    for group in GROUPS:
        if weight.shape[1] % group == 0 and _one_each(size.reshape(-1, group)):
            return f"by groups of {group}"
    return None


def _one_each(size: Tensor) -> bool:
    """Whether each row of magnitudes holds zeros and one other, and not only one number that is not zero."""
    largest = size.amax(dim=1, keepdim=True)
    ternary = (size == 0) | (size == largest)
    return bool(ternary.all()) and bool(((size > 0).sum(dim=1) > 1).any())


def lost(layout: str, count: int) -> str:
    """What to say of ``count`` such matrices."""
    return (
        f"ternary, with several scales a matrix ({layout}; {count} matrices), which this package's formats "
        "cannot carry: they hold one a matrix"
    )
