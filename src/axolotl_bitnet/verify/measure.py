"""One matrix measured: its scale, its zeros, and how far quantization moves it."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import dataclass

import torch
from torch import Tensor

from ..storage.safetensors_stream import Entry
from ..ternary import abs_sum, absmean, codes_of, scale_of


@dataclass(frozen=True)
class Layer:
    """One matrix that is, or would become, ternary.

    Attributes:
        name: of its layer.
        shape: (rows, columns).
        zeros: share of zero codes.
        scale: ``s``, by which codes are divided; a bfloat16.
        bits: stored bits per weight.
        change: ``|W - codes / s| / |W|``, how far quantization moves it; 0 if it is ternary already.
    """

    name: str
    shape: tuple[int, int]
    zeros: float
    scale: float
    bits: float
    change: float = 0.0


def measure(name: str, entry: Entry, blocks: Callable[[], Iterator[Tensor]]) -> Layer:
    """Two passes over a matrix of floating point."""
    rows, columns = entry.shape
    total = torch.zeros((), dtype=torch.float64)
    largest = torch.zeros(())
    for block in blocks():
        total += abs_sum(block)
        largest = torch.maximum(largest, block.abs().amax().to(torch.float32))
    g = absmean(total, rows * columns)
    scale = scale_of(g)
    zeros, moved, size, ternary = 0, 0.0, 0.0, True
    for block in blocks():
        codes = codes_of(block, g)
        values = block.to(torch.float32)
        zeros += codes.numel() - int(codes.count_nonzero())
        moved += float((values - codes / scale.to(torch.float32)).square().sum(dtype=torch.float64))
        size += float(values.square().sum(dtype=torch.float64))
        ternary &= bool(((values == 0) | (values.abs() == largest)).all())
    if ternary:  # its own scale is what it stands for, not what quantizing it again would make of it
        scale = scale_of(largest) if bool(largest) else scale
    change = 0.0 if ternary else (moved / size) ** 0.5
    return Layer(
        name,
        (rows, columns),
        zeros / max(1, rows * columns),
        float(scale),
        entry.dtype.itemsize * 8.0,
        change,
    )


def ternary_layer(name: str, bits: float, codes: Tensor, scale: Tensor) -> Layer:
    zeros = 1 - int(codes.count_nonzero()) / max(1, codes.numel())
    return Layer(name, (codes.shape[0], codes.shape[1]), zeros, float(scale), bits)
