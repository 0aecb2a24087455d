"""Layers to test: inputs of every rank and layout, small BitLinears with their gradients against float64, and
models as they are beside fused ones.
"""

from __future__ import annotations

import copy
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from axolotl_bitnet.layers.bitlinear import BitLinear
from axolotl_bitnet.layers.fused_llama import RMSNorm, SwiGLU
from axolotl_bitnet.model.convert import convert_to_bitlinear

FLOAT32, BF16 = 2.0**-24, 2.0**-9  # half a unit in the last place, relative


def inputs() -> list[tuple[str, Tensor]]:
    generator = torch.Generator().manual_seed(11)

    def randn(*shape: int) -> Tensor:
        return torch.randn(shape, generator=generator)

    return [
        ("rank1", randn(24)),
        ("rank2", randn(5, 33)),
        ("rank3", randn(2, 3, 17)),
        ("rank4", randn(2, 3, 2, 40)),
        ("one feature", randn(4, 1)),
        ("one row", randn(1, 31)),
        ("transposed", randn(19, 7).t()),
        ("permuted", randn(9, 4, 3).permute(2, 1, 0)),
        ("sliced", randn(8, 60)[1::2, 3:50:2]),
        ("expanded", randn(1, 21).expand(6, 21)),
        ("no rows", randn(0, 8)),
        ("no rows, rank3", randn(2, 0, 8)),
    ]


by_name = pytest.mark.parametrize(
    "name, x", inputs(), ids=lambda value: value if isinstance(value, str) else ""
)


def layer_for(
    x: Tensor, out_features: int = 13, bias: bool = False, dtype: torch.dtype = torch.float32
) -> BitLinear:
    layer = BitLinear(x.shape[-1], out_features, bias=bias, dtype=dtype)
    with torch.no_grad():
        layer.weight.normal_(0, 0.05)
    return layer


def run(
    layer: Callable[[Tensor], Tensor], x: Tensor, dy: Tensor | None = None
) -> tuple[Tensor, Tensor, Tensor]:
    """y, the gradient of x and dy. The leaf has x's strides."""
    leaf = x.detach().requires_grad_()
    y = layer(leaf)
    dy = torch.randn_like(y) if dy is None else dy
    y.backward(dy)
    assert leaf.grad is not None
    return y.detach(), leaf.grad, dy


class Attention(nn.Module):
    """q, k and v read one tensor; o reads what they make."""

    def __init__(self, bias: bool = False) -> None:
        super().__init__()
        self.q, self.k, self.v, self.o = (BitLinear(24, 24, bias=bias) for _ in range(4))

    def forward(self, x: Tensor) -> Tensor:
        return self.o(torch.sigmoid(self.q(x)) * self.k(x) + self.v(x))


@contextmanager
def saving() -> Iterator[list[Tensor]]:
    """What autograd saves for backward in here, in order."""
    saved: list[Tensor] = []
    with torch.autograd.graph.saved_tensors_hooks(lambda t: saved.append(t) or t, lambda t: t):
        yield saved


def assert_gradients(oracle: Any, layer: BitLinear, x: Tensor, dx: Tensor, dy: Tensor, unit: float) -> None:
    """Against float64, element by element. Bound: a float32 sum of n terms errs by n units of sum|terms|;
    beside it up to 4 roundings, of operands and results, in the dtype that is computed in."""
    x_hat, w_hat = oracle.operands(x, layer.weight)
    rows, x_rows = dy.double().reshape(-1, layer.out_features), x_hat.reshape(-1, layer.in_features)
    exact = {"x": rows @ w_hat, "weight": rows.t() @ x_rows, "bias": rows.sum(0)}
    terms = {
        "x": rows.abs() @ w_hat.abs(),
        "weight": rows.abs().t() @ x_rows.abs(),
        "bias": rows.abs().sum(0),
    }
    counts = {"x": layer.out_features, "weight": len(rows), "bias": len(rows)}
    found = {"x": dx.reshape(-1, layer.in_features), "weight": layer.weight.grad}
    if layer.bias is not None:
        found["bias"] = layer.bias.grad
    for key, gradient in found.items():
        allowed = (4 * unit + counts[key] * FLOAT32) * terms[key]
        assert ((gradient.double() - exact[key]).abs() <= allowed).all(), key
        assert len(rows) == 0 or exact[key].abs().max() > 5 * allowed.max(), key  # the bound says something


# Fused and unfused

Pair = tuple[nn.Module, nn.Module]


def pair_of(model: nn.Module, **settings: Any) -> Pair:
    """The model converted as it is, and a copy of it fused; norms that are not all ones."""
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if "norm" in name:
                parameter.uniform_(0.5, 1.5)
    other = copy.deepcopy(model)
    convert_to_bitlinear(model, fuse=False, **settings)
    convert_to_bitlinear(other, fuse=True, **settings)
    return model, other


def mlps(pair: Callable[..., Pair], dtype: torch.dtype = torch.float32, **overrides: Any) -> Pair:
    plain, fused = pair(dtype=dtype, **overrides)
    return plain.model.layers[0].mlp, fused.model.layers[0].mlp


def norms(pair: Callable[..., Pair], dtype: torch.dtype = torch.float32) -> Pair:
    plain, fused = pair(dtype=dtype)
    return plain.model.layers[0].input_layernorm, fused.model.layers[0].input_layernorm


def kinds(model: nn.Module) -> dict[str, type]:
    """The fused modules."""
    return {name: type(module) for name, module in model.named_modules() if type(module) in (SwiGLU, RMSNorm)}


def gradients(module: nn.Module) -> list[Tensor]:
    """Those of the parameters, taken away."""
    found = [parameter.grad for parameter in module.parameters()]
    module.zero_grad()
    return [gradient for gradient in found if gradient is not None]


def run_module(module: nn.Module, x: Tensor, dy: Tensor) -> list[Tensor]:
    """y, and the gradients of x and of the parameters."""
    leaf = x.detach().requires_grad_()
    y = module(leaf)
    y.backward(dy.to(y.dtype))
    return [y.detach(), leaf.grad, *gradients(module)]


def close(found: list[Tensor], expected: list[Tensor], tolerance: float) -> None:
    """One by one: relative error in norm; and no expected tensor is zero."""
    for one, other in zip(found, expected, strict=True):
        assert one.dtype == other.dtype and one.shape == other.shape and other.abs().max() > 0
        assert (one.double() - other.double()).norm() <= tolerance * other.double().norm()
