"""The layer of a packed model: weights of 2 bits, BitLinear's output to the bit.

transformers' own layer unpacks its weights at every call and rounds its scales to the model's dtype. This one
gives stored bytes to :func:`axolotl_bitnet.ops.packed_matmul`. It can hold several matrices that read the
same input, one below the other, each with a scale of its own: vLLM merges q, k and v, and gate and up.

The functions work on any module that has ``weight`` and ``weight_scale``, because vLLM's linear layers are
not ours.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor, nn

from ..ops import ROWS_PER_BYTE, packed_matmul, unpack_codes


def prepare(layer: Any, sizes: Sequence[int], multiplies: bool, name: str) -> None:
    """Make a loaded layer ready to run: check it, turn its scales into divisors, and unpack it on a CPU.

    On a CPU, unpacking at every call costs more than the product, so there the layer holds int8 codes, a byte
    a weight.

    Args:
        layer: has ``weight``, uint8 (rows / 4, columns), and ``weight_scale`` (matrices,). ``divisors`` is
            added.
        sizes: rows of each of its matrices.
        multiplies: whether the stored scale is Microsoft's, by which a product is multiplied.
        name: of the layer, for errors.

    Raises:
        ValueError: a scale is not a positive finite number, or a bias would be scaled with the product.
    """
    if multiplies and layer.bias is not None:
        raise ValueError(f"'{name}' has a bias, which `autobitlinear` scales with the weight")
    stored = layer.weight_scale.detach().to(torch.float32).reshape(-1)
    if not bool(((stored > 0) & stored.isfinite()).all()):
        raise ValueError(f"'{name}' has the weight_scale {stored.tolist()}; it must be positive and finite")
    layer.sizes = list(sizes)
    layer.divisors = nn.Buffer(stored.reciprocal() if multiplies else stored, persistent=False)
    weight = layer.weight.detach()
    if not weight.is_cuda:
        parts = weight.split([size // ROWS_PER_BYTE for size in sizes])
        weight = torch.cat([unpack_codes(part) for part in parts])
    layer.weight = nn.Parameter(weight.contiguous(), requires_grad=False)


def apply(layer: Any, x: Tensor, bias: Tensor | None) -> Tensor:
    """The output of a prepared layer, (..., rows) in x's dtype, for x (..., columns)."""
    return packed_matmul(x, layer.weight, layer.divisors, layer.sizes, bias, x.dtype)


class PackedLinear(nn.Module):
    """A linear layer with packed weights, for inference. :func:`prepare` it once its weights are loaded.

    Shapes are nn.Linear's: x (..., in_features) gives (..., out_features) in x's dtype.
    """

    def __init__(self, in_features: int, out_features: int, bias: bool, dtype: torch.dtype | None = None):
        super().__init__()
        self.in_features, self.out_features = in_features, out_features
        shape = (out_features // ROWS_PER_BYTE, in_features)
        self.weight = nn.Parameter(torch.empty(shape, dtype=torch.uint8), requires_grad=False)
        self.weight_scale = nn.Buffer(torch.empty(1, dtype=dtype))
        self.bias = (
            nn.Parameter(torch.empty(out_features, dtype=dtype), requires_grad=False) if bias else None
        )

    def forward(self, input: Tensor) -> Tensor:
        return apply(self, input, self.bias)

    def extra_repr(self) -> str:
        return (
            f"in_features={self.in_features}, out_features={self.out_features}, bias={self.bias is not None}"
        )
