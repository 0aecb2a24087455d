"""``backward: int8_dx``: the gradient of x from 8-bit dY. Everything else of the layer stays as it is."""

from __future__ import annotations

import copy
import math

import pytest
import torch
from torch import Tensor
from torch.utils.checkpoint import checkpoint

from axolotl_bitnet import ternary
from axolotl_bitnet.layers.bitlinear import BitLinear, bitlinear
from axolotl_bitnet.model.convert import convert_to_bitlinear
from support.layers import Attention, by_name, layer_for, run

dtypes = pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])


def definition(dy: Tensor, weight: Tensor) -> Tensor:
    """The forward's formula with dY for x and W^T for W, and a lower floor."""
    codes, r = ternary.quantize_activations(dy, 1e-30)
    codes_w, s = ternary.ternarize(weight.detach())
    return ternary.dequantize_output(codes.long() @ codes_w.long(), r, s).to(dy.dtype)


@pytest.mark.parametrize("weight_dtype", [torch.float32, torch.bfloat16])
@dtypes
@by_name
def test_gradient_of_x_is_the_definition(
    name: str, x: Tensor, dtype: torch.dtype, weight_dtype: torch.dtype
) -> None:
    x = x.to(dtype)
    layer = layer_for(x, bias=True, dtype=weight_dtype)
    y, exact, dy = run(layer, x)
    dw, db = layer.weight.grad, layer.bias.grad

    layer.zero_grad()
    layer.backward = "int8_dx"
    again, dx, _ = run(layer, x, dy)
    assert torch.equal(again, y)
    assert dx.dtype == dtype and torch.equal(dx, definition(dy, layer.weight))
    assert torch.equal(layer.weight.grad, dw) and torch.equal(layer.bias.grad, db)
    if len(dy.reshape(-1, 13)) > 2:
        assert 0 < (dx.double() - exact.double()).norm() < 0.03 * exact.double().norm()


def test_any_layout_of_dy() -> None:
    x, dy = torch.randn(6, 24), torch.randn(13, 6).t()
    layer = layer_for(x)
    layer.backward = "int8_dx"
    _, dx, _ = run(layer, x, dy)
    assert torch.equal(dx, definition(dy, layer.weight))
    _, dx, _ = run(layer, x, dy[:1].expand(6, 13))
    assert torch.equal(dx, definition(dy[:1].expand(6, 13), layer.weight))


@pytest.mark.parametrize("exponent", range(-12, 1, 2))
def test_small_gradients_are_not_lost(exponent: int) -> None:
    """A loss that is a mean over thousands of tokens leaves gradients far below 1e-5: 8 bits say how they
    relate to one another, and the scale says the rest."""
    x = torch.randn(64, 24)
    layer = layer_for(x, 32)
    dy = torch.randn(64, 32) * 10.0**exponent
    _, exact, _ = run(layer, x, dy)
    layer.backward = "int8_dx"
    _, dx, _ = run(layer, x, dy)
    assert (dx - exact).norm() < 0.02 * exact.norm()
    assert torch.equal(dx, definition(dy, layer.weight))


def test_no_gradient_gives_no_gradient() -> None:
    """Padding, masked tokens: rows of zeros, and no 0 / 0."""
    x, dy = torch.randn(4, 24), torch.randn(4, 13)
    dy[1:3] = 0
    layer = layer_for(x)
    layer.backward = "int8_dx"
    _, dx, _ = run(layer, x, dy)
    assert not dx[1:3].any() and (dx[[0, 3]] != 0).any(1).all()


def test_under_autocast() -> None:
    x = torch.randn(6, 24)
    layer = layer_for(x, bias=True)
    layer.backward = "int8_dx"
    leaf = x.clone().requires_grad_()
    with torch.autocast("cpu", dtype=torch.bfloat16):
        y = layer(leaf)
    dy = torch.randn_like(y)
    y.backward(dy)
    assert leaf.grad.dtype == torch.float32
    assert torch.equal(leaf.grad, definition(dy, layer.weight).float())


@pytest.mark.parametrize("bad", [math.nan, math.inf, -math.inf])
def test_a_bad_row_makes_that_row_nan(bad: float) -> None:
    x, dy = torch.randn(4, 24), torch.randn(4, 13)
    layer = layer_for(x)
    layer.backward = "int8_dx"
    _, clean, _ = run(layer, x, dy)
    dy[2, 5] = bad
    _, dx, _ = run(layer, x, dy)
    assert dx[2].isnan().all() and torch.equal(dx[[0, 1, 3]], clean[[0, 1, 3]])
    with torch.no_grad():
        layer.weight[0, 0] = bad
    _, dx, _ = run(layer, x, torch.randn(4, 13))
    assert dx.isnan().all()


@pytest.mark.parametrize("reentrant", [False, True])
def test_activation_checkpointing(reentrant: bool) -> None:
    attention = Attention()
    for layer in attention.children():
        layer.backward = "int8_dx"
    gradients = []
    for checkpointed in (False, True):
        attention.zero_grad()
        x = torch.ones(3, 24).cumsum(0).requires_grad_()
        y = checkpoint(attention, x, use_reentrant=reentrant) if checkpointed else attention(x)
        y.square().sum().backward()
        gradients.append([x.grad, *(parameter.grad for parameter in attention.parameters())])
    assert all(torch.equal(*pair) for pair in zip(*gradients, strict=True))


@pytest.mark.slow
def test_compiled_layer_is_the_eager_one() -> None:
    x, weight = torch.randn(2, 5, 24, requires_grad=True), torch.randn(12, 24, requires_grad=True)
    compiled = torch.compile(bitlinear, fullgraph=True)
    dy = torch.randn(2, 5, 12)
    results = []
    for function in (bitlinear, compiled):
        y = function(x, weight, None, "int8_dx")
        results.append([y, *torch.autograd.grad(y, [x, weight], dy)])
    assert all(torch.equal(*pair) for pair in zip(*results, strict=True))


def test_conversion_sets_it_and_copies_keep_it(tiny_model) -> None:
    model = tiny_model("Llama")
    convert_to_bitlinear(model, backward="int8_dx")
    layers = [module for module in model.modules() if isinstance(module, BitLinear)]
    assert len(layers) == 14 and all(layer.backward == "int8_dx" for layer in layers)
    assert copy.deepcopy(layers[0]).backward == "int8_dx"
    assert not any("int8" in name for name in model.state_dict())
    other = tiny_model("Llama")
    convert_to_bitlinear(other)
    assert all(m.backward == "bf16" for m in other.modules() if isinstance(m, BitLinear))
    assert BitLinear.backward == "bf16"


def test_an_unknown_precision_is_refused(tiny_model) -> None:
    with pytest.raises(ValueError, match="one of bf16, int8_dx, not 'int4'"):
        convert_to_bitlinear(tiny_model("Llama"), backward="int4")


def test_a_model_learns(tiny_model) -> None:
    model = tiny_model("Llama")
    convert_to_bitlinear(model, backward="int8_dx")
    batch = torch.randint(3, 128, (4, 12))
    optimizer = torch.optim.AdamW(model.parameters(), lr=3e-3)
    losses = []
    for _ in range(15):
        loss = model(batch, labels=batch).loss
        loss.backward()
        optimizer.step()
        optimizer.zero_grad()
        losses.append(loss.item())
    assert losses[-1] < 0.8 * losses[0]
