"""BitLinear as people use it: everything that they wrap around an nn.Linear works around it."""

from __future__ import annotations

import copy
import io
import pickle
from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

from axolotl_bitnet.layers.bitlinear import BitLinear, bitlinear
from axolotl_bitnet.layers.products import Backward
from axolotl_bitnet.model.convert import convert_to_bitlinear
from support.layers import Attention, layer_for, saving


def test_layer_has_the_state_of_a_linear() -> None:
    layer, linear = BitLinear(12, 8), nn.Linear(12, 8)
    assert isinstance(layer, nn.Linear)
    assert layer.state_dict().keys() == linear.state_dict().keys() and not list(layer.buffers())
    layer.load_state_dict(linear.state_dict())
    assert torch.equal(layer.weight, linear.weight)


def test_copies_and_pickles_are_independent() -> None:
    x = torch.randn(4, 24)
    attention = Attention()
    y = attention(x)  # live codes on x
    stream = io.BytesIO()
    torch.save(attention, stream)
    stream.seek(0)
    restored = torch.load(stream, weights_only=False)
    for other in (copy.deepcopy(attention), pickle.loads(pickle.dumps(attention)), restored):
        assert type(other.q) is BitLinear and torch.equal(other(x), y)
        with torch.no_grad():
            other.q.weight.neg_()
        assert not torch.equal(other(x), y)
    assert torch.equal(attention(x), y)


def test_train_and_eval_are_the_same() -> None:
    x = torch.randn(4, 24)
    attention = Attention()
    trained = attention.train()(x)
    assert torch.equal(attention.eval()(x), trained)
    with torch.no_grad():
        assert torch.equal(attention(x), trained)


def test_functional_form() -> None:
    x = torch.randn(4, 12)
    layer = layer_for(x, bias=True)
    assert torch.equal(bitlinear(x, layer.weight, layer.bias), layer(x))
    layer.bias = None
    assert torch.equal(bitlinear(x, layer.weight), layer(x))


def test_rows_do_not_depend_on_each_other() -> None:
    """One scale a token: packing samples together, or decoding one token at a time, changes no bit."""
    x = torch.randn(2, 7, 40)
    layer = layer_for(x, bias=True)
    y = layer(x)
    assert torch.equal(layer(x.reshape(1, 14, 40)).reshape(2, 7, 13), y)
    for batch in range(2):
        for token in range(7):
            assert torch.equal(layer(x[batch, token]), y[batch, token])


def test_meta_device_gives_shapes() -> None:
    """nn.Linear does: shape inference, FLOP counting and memory estimates run on meta."""
    x = torch.empty(2, 3, 12, device="meta")
    assert nn.Linear(12, 8, device="meta")(x).shape == (2, 3, 8)
    y = BitLinear(12, 8, device="meta")(x)
    assert y.shape == (2, 3, 8) and y.is_meta


def test_generate_one_token(tiny_model) -> None:
    model = tiny_model("Llama").eval()
    prompt = torch.randint(3, 128, (2, 9))
    dense = model(prompt).logits.detach()
    convert_to_bitlinear(model)
    logits = model(prompt).logits.detach()
    assert not torch.equal(logits, dense)
    out = model.generate(prompt, attention_mask=torch.ones_like(prompt), max_new_tokens=1, do_sample=False)
    assert out.shape == (2, 10) and torch.equal(out[:, -1], logits[:, -1].argmax(-1))


def test_decoding_with_a_cache_is_decoding_without(tiny_model) -> None:
    model = tiny_model("Llama").eval()
    convert_to_bitlinear(model)
    prompt = torch.randint(3, 128, (1, 5))
    settings = dict(
        attention_mask=torch.ones_like(prompt), max_new_tokens=4, min_new_tokens=4, do_sample=False
    )
    cached = model.generate(prompt, use_cache=True, **settings)
    assert cached.shape == (1, 9)
    assert torch.equal(cached, model.generate(prompt, use_cache=False, **settings))


def test_training_lowers_the_loss(tiny_model) -> None:
    model = tiny_model("Llama")
    convert_to_bitlinear(model)
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


# What is kept for backward


@pytest.mark.parametrize("autocast", [False, True])
@pytest.mark.parametrize("weight_dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("precision", ["bf16", "int8_dx", "int8"])
def test_what_is_saved_for_backward(autocast: bool, weight_dtype: torch.dtype, precision: Backward) -> None:
    """Codes of x, their scales and the weight itself: no second copy of the weight."""
    x = torch.randn(6, 7, 32)
    layer = layer_for(x, 20, bias=True, dtype=weight_dtype)
    layer.backward = precision
    leaf = x.clone().requires_grad_()
    with saving() as saved, torch.autocast("cpu", dtype=torch.bfloat16, enabled=autocast):
        y = layer(leaf)
    codes, r, weight = saved
    assert codes.dtype == torch.int8 and codes.shape == x.shape
    assert r.dtype == torch.float32 and r.shape == (6, 7, 1)
    assert weight.data_ptr() == layer.weight.data_ptr() and weight.shape == layer.weight.shape
    kept = [value for value in vars(y.grad_fn).values() if isinstance(value, Tensor)]
    assert all(tensor.numel() == 1 for tensor in kept)
    y.sum().backward()
    assert layer.weight.grad.dtype == weight_dtype


def test_siblings_save_one_set_of_codes() -> None:
    x = torch.randn(6, 24, requires_grad=True)
    attention = Attention()
    with saving() as saved:
        y = attention.q(x) + attention.k(x) + attention.v(x)
    codes = [tensor for tensor in saved if tensor.dtype == torch.int8]
    assert len(codes) == 3 and len({tensor.data_ptr() for tensor in codes}) == 1
    assert y.requires_grad


# Activation checkpointing


@pytest.mark.parametrize("reentrant", [False, True])
@pytest.mark.parametrize("autocast", [False, True])
def test_activation_checkpointing(reentrant: bool, autocast: bool) -> None:
    layers = nn.ModuleList([Attention(bias=True), Attention()])
    x = torch.randn(3, 5, 24)

    def gradients(checkpointed: bool) -> list[Tensor]:
        layers.zero_grad()
        leaf = h = x.clone().requires_grad_()
        with torch.autocast("cpu", dtype=torch.bfloat16, enabled=autocast):
            for layer in layers:
                h = checkpoint(layer, h, use_reentrant=reentrant) if checkpointed else layer(h)
        h.square().sum().backward()
        return [h.detach(), leaf.grad, *(parameter.grad for parameter in layers.parameters())]

    plain = gradients(checkpointed=False)
    assert all(gradient.abs().max() > 0 for gradient in plain)
    for one, other in zip(plain, gradients(checkpointed=True), strict=True):
        assert torch.equal(one, other)


# torch.compile


def results(layer: Callable[[Tensor], Tensor], owner: nn.Module, x: Tensor) -> list[Tensor]:
    owner.zero_grad()
    leaf = x.clone().requires_grad_()
    y = layer(leaf)
    y.square().sum().backward()
    return [y.detach(), leaf.grad, *(parameter.grad for parameter in owner.parameters())]


@pytest.mark.parametrize("bias", [False, True])
@pytest.mark.parametrize("grad", [torch.no_grad, torch.inference_mode, torch.enable_grad])
def test_compiled_layer_without_gradients(grad: Any, bias: bool) -> None:
    layer = layer_for(torch.empty(24), 12, bias=bias)
    compiled = torch.compile(layer, fullgraph=True, backend="aot_eager")
    with grad():
        x = torch.randn(3, 24)
        assert torch.equal(compiled(x), layer(x))
    torch._dynamo.reset()  # it compiles one function a few times only, in a whole process


@pytest.mark.slow
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_compiled_layer_is_the_eager_one(dtype: torch.dtype) -> None:
    layer = layer_for(torch.empty(24), 12, bias=True, dtype=dtype)
    compiled = torch.compile(layer, fullgraph=True)
    x = torch.randn(3, 5, 24).to(dtype)
    *eager, eager_bias = results(layer, layer, x)
    *found, found_bias = results(compiled, layer, x)
    for one, other in zip(eager, found, strict=True):  # y, dX, dW
        assert one.dtype == other.dtype and torch.equal(one, other)
    torch.testing.assert_close(found_bias, eager_bias)  # inductor adds the rows in another order


@pytest.mark.slow
def test_compiled_siblings_take_any_length() -> None:
    """Attention under autocast, without inductor: no graph break, and one compilation for any length."""
    attention = Attention(bias=True)
    compiled = torch.compile(attention, fullgraph=True, backend="aot_eager", dynamic=True)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        for tokens in (5, 9, 2):
            x = torch.randn(3, tokens, 24)
            with torch.compiler.set_stance("default" if tokens == 5 else "fail_on_recompile"):
                found = results(compiled, attention, x)
            y, dx, *rest = results(attention, attention, x)
            assert torch.equal(found[0], y)
            for one, other in zip(found[2:], rest, strict=True):
                assert torch.equal(one, other)
            torch.testing.assert_close(found[1], dx, rtol=1e-2, atol=1e-2)  # dX of three, summed in bf16
