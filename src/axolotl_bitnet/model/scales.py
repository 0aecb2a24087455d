"""Ternary matrices with a scale per row or group: those of TriLM, BitCPM, Bonsai, Axolotl's ternary qat.

This package's formats hold one scale per matrix. Such a matrix has values of many magnitudes and would seem
never ternary, so it is recognized by its rows or groups, each of which has one magnitude.
"""

from __future__ import annotations

from torch import Tensor

GROUPS = (256, 128, 64, 32)


def several_scales(weight: Tensor) -> str | None:
    """What each scale of a ternary matrix is for: "by rows", or "by groups of G" of a row; None where its
    rows are not ternary so, or where all have one scale.

    Args:
        weight: floating point (rows, columns), or a block of whole rows. Rows of zeros are ignored.
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
    """A sentence's part about ``count`` such matrices."""
    return (
        f"ternary, with several scales per matrix ({layout}; {count} matrices), which this package's formats "
        "cannot carry: they hold one a matrix"
    )
