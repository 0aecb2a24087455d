"""``backward: int8_dx`` and ``int8``: gradients of x, and of the weight, from 8-bit dY. All else stays."""

from __future__ import annotations

import copy
import math

import pytest
import torch
from torch import Tensor
from torch.utils.checkpoint import checkpoint

from axolotl_bitnet import ops, ternary
from axolotl_bitnet.layers.bitlinear import BitLinear, bitlinear
from axolotl_bitnet.layers.products import Backward
from axolotl_bitnet.model.convert import convert_to_bitlinear
from support.gradients import transposed_gradient
from support.layers import Attention, by_name, layer_for, run

dtypes = pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])


def definition(dy: Tensor, weight: Tensor) -> Tensor:
    """The forward's formula with dY for x and W^T for W, and a lower floor."""
    codes, r = ternary.quantize_activations(dy, 1e-30)
    codes_w, s = ternary.ternarize(weight.detach())
    return ternary.dequantize_output(codes.long() @ codes_w.long(), r, s).to(dy.dtype)


def weight_definition(x: Tensor, dy: Tensor, dtype: torch.dtype) -> Tensor:
    codes_x, r = ternary.quantize_activations(x.reshape(-1, x.shape[-1]))
    codes_z, c = transposed_gradient(dy, r)
    return ((codes_z.long() @ codes_x.long()).float() / c).to(dtype)


by_precision = pytest.mark.parametrize("precision", ["int8_dx", "int8"])


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


@pytest.mark.parametrize("weight_dtype", [torch.float32, torch.bfloat16])
@dtypes
@by_name
def test_both_gradients_are_the_definition(
    name: str, x: Tensor, dtype: torch.dtype, weight_dtype: torch.dtype
) -> None:
    x = x.to(dtype)
    layer = layer_for(x, bias=True, dtype=weight_dtype)
    y, _, dy = run(layer, x)
    exact, db = layer.weight.grad, layer.bias.grad

    layer.zero_grad()
    layer.backward = "int8"
    again, dx, _ = run(layer, x, dy)
    assert torch.equal(again, y) and torch.equal(layer.bias.grad, db)
    assert torch.equal(dx, definition(dy, layer.weight))
    dw = layer.weight.grad
    assert dw.dtype == weight_dtype and torch.equal(dw, weight_definition(x, dy, weight_dtype))
    if len(dy.reshape(-1, 13)) > 1:
        assert 0 < (dw.double() - exact.double()).norm() < 0.03 * exact.double().norm()


def test_rounding_is_unbiased_and_always_the_same() -> None:
    """A column with one large element: rounded to nearest, all others would be 0."""
    dy, r = torch.randn(4096, 16) * 0.1, torch.full((4096, 1), 127.0)
    dy[0] = 127
    _, _, codes, c = ops.quantize_gradient(dy, r, *ops.gradient_peaks(dy, r))
    assert torch.equal(c, torch.full((16, 1), 127.0))
    z, codes = dy[1:].t() / 127 * c, codes[:, 1:4096].float()
    assert z.abs().max() < 0.5 and set(codes.unique().tolist()) == {-1, 0, 1}
    assert ((codes - z).mean(1).abs() < 5 * (z.abs().mean(1) / 4095).sqrt()).all()
    noise = (codes - z)[:, :-1] * (codes - z)[:, 1:]  # of one token and the next
    assert noise.mean().abs() < 5 * noise.std() / noise.numel() ** 0.5
    again = ops.quantize_gradient(dy.clone(), r, *ops.gradient_peaks(dy, r))[2]
    assert torch.equal(again[:, 1:4096].float(), codes)
    dy[1:] *= 1.0001
    other = ops.quantize_gradient(dy, r, *ops.gradient_peaks(dy, r))[2]
    assert not torch.equal(other, again)


def test_more_tokens_than_int32_holds(monkeypatch: pytest.MonkeyPatch) -> None:
    """The sum is cut, and nothing else changes."""
    x, dy = torch.randn(90, 24), torch.randn(90, 13)
    layer = layer_for(x)
    layer.backward = "int8"
    run(layer, x, dy)
    whole = layer.weight.grad.clone()
    layer.zero_grad()
    monkeypatch.setattr(ops, "MOST_TOKENS", 32)
    run(layer, x, dy)
    torch.testing.assert_close(layer.weight.grad, whole, rtol=1e-5, atol=1e-6)


def test_outputs_without_a_gradient_get_none() -> None:
    x, dy = torch.randn(40, 24), torch.randn(40, 13)
    dy[:, 4] = 0
    layer = layer_for(x)
    layer.backward = "int8"
    run(layer, x, dy)
    assert not layer.weight.grad[4].any() and layer.weight.grad[[3, 5]].any(1).all()


@pytest.mark.parametrize("exponent", range(-12, 1, 2))
@by_precision
def test_small_gradients_are_not_lost(exponent: int, precision: Backward) -> None:
    """A loss that is a mean over thousands of tokens leaves gradients far below 1e-5: 8 bits say how they
    relate to one another, and the scale says the rest."""
    x = torch.randn(64, 24)
    layer = layer_for(x, 32)
    dy = torch.randn(64, 32) * 10.0**exponent
    _, exact, _ = run(layer, x, dy)
    exact_dw = layer.weight.grad.clone()
    layer.zero_grad()
    layer.backward = precision
    _, dx, _ = run(layer, x, dy)
    assert (dx - exact).norm() < 0.02 * exact.norm()
    assert (layer.weight.grad - exact_dw).norm() < 0.02 * exact_dw.norm()
    assert torch.equal(dx, definition(dy, layer.weight))


def test_no_gradient_gives_no_gradient() -> None:
    """Padding, masked tokens: rows of zeros, and no 0 / 0."""
    x, dy = torch.randn(4, 24), torch.randn(4, 13)
    dy[1:3] = 0
    layer = layer_for(x)
    layer.backward = "int8_dx"
    _, dx, _ = run(layer, x, dy)
    assert not dx[1:3].any() and (dx[[0, 3]] != 0).any(1).all()


@by_precision
def test_under_autocast(precision: Backward) -> None:
    x = torch.randn(6, 24)
    layer = layer_for(x, bias=True)
    layer.backward = precision
    leaf = x.clone().requires_grad_()
    with torch.autocast("cpu", dtype=torch.bfloat16):
        y = layer(leaf)
    dy = torch.randn_like(y)
    y.backward(dy)
    assert leaf.grad.dtype == torch.float32
    assert torch.equal(leaf.grad, definition(dy, layer.weight).float())
    if precision == "int8":
        assert torch.equal(layer.weight.grad, weight_definition(x.bfloat16(), dy, torch.float32))


@pytest.mark.parametrize("bad", [math.nan, math.inf, -math.inf])
def test_a_bad_row_makes_that_row_nan(bad: float) -> None:
    x, dy = torch.randn(4, 24), torch.randn(4, 13)
    layer = layer_for(x)
    layer.backward = "int8_dx"
    _, clean, _ = run(layer, x, dy)
    dy[2, 5] = bad
    _, dx, _ = run(layer, x, dy)
    assert dx[2].isnan().all() and torch.equal(dx[[0, 1, 3]], clean[[0, 1, 3]])
    layer.backward = "int8"
    layer.zero_grad()
    _, dx, _ = run(layer, x, dy)
    assert dx[2].isnan().all() and torch.equal(dx[[0, 1, 3]], clean[[0, 1, 3]])
    assert layer.weight.grad.isnan().all(1).nonzero().flatten().tolist() == [5]
    with torch.no_grad():
        layer.weight[0, 0] = bad
    _, dx, _ = run(layer, x, torch.randn(4, 13))
    assert dx.isnan().all()


@by_precision
@pytest.mark.parametrize("reentrant", [False, True])
def test_activation_checkpointing(reentrant: bool, precision: Backward) -> None:
    attention = Attention()
    for layer in attention.children():
        layer.backward = precision
    gradients = []
    for checkpointed in (False, True):
        attention.zero_grad()
        x = torch.ones(3, 24).cumsum(0).requires_grad_()
        y = checkpoint(attention, x, use_reentrant=reentrant) if checkpointed else attention(x)
        y.square().sum().backward()
        gradients.append([x.grad, *(parameter.grad for parameter in attention.parameters())])
    assert all(torch.equal(*pair) for pair in zip(*gradients, strict=True))


@pytest.mark.slow
@by_precision
def test_compiled_layer_is_the_eager_one(precision: Backward) -> None:
    x, weight = torch.randn(2, 5, 24, requires_grad=True), torch.randn(12, 24, requires_grad=True)
    compiled = torch.compile(bitlinear, fullgraph=True)
    dy = torch.randn(2, 5, 12)
    results = []
    for function in (bitlinear, compiled):
        y = function(x, weight, None, precision)
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
    with pytest.raises(ValueError, match="one of bf16, int8_dx, int8, not 'int4'"):
        convert_to_bitlinear(tiny_model("Llama"), backward="int4")


@by_precision
def test_a_model_learns(tiny_model, precision: Backward) -> None:
    model = tiny_model("Llama")
    convert_to_bitlinear(model, backward=precision)
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
