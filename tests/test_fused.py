"""The fused MLP and norm: the unfused layers' bits forward, gradients no worse, and little kept."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.nn.functional import silu
from torch.utils.weak import TensorWeakRef

from axolotl_bitnet import ops, ternary
from axolotl_bitnet.layers.fused_llama import RMSNorm, SwiGLU, fuse_layers
from axolotl_bitnet.layers.products import Backward
from axolotl_bitnet.layers.shared_input import shared_activation_codes
from axolotl_bitnet.model.convert import convert_to_bitlinear
from support.layers import Pair, close, gradients, kinds, mlps, norms, pair_of, run_module, saving

FAMILIES = ["Llama", "Mistral", "Qwen2", "Qwen3"]
by_family = pytest.mark.parametrize("family", FAMILIES)
by_dtype = pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)


# What is fused


@by_family
def test_every_mlp_and_every_norm_before_linear_layers(tiny_model, family: str) -> None:
    """Not q_norm and k_norm (rotary embeddings read them), not the last norm (the head is dense)."""
    model = tiny_model(family)
    keys, parameters = list(model.state_dict()), [id(parameter) for parameter in model.parameters()]
    convert_to_bitlinear(model)
    parts = {"mlp": SwiGLU, "input_layernorm": RMSNorm, "post_attention_layernorm": RMSNorm}
    assert kinds(model) == {f"model.layers.{i}.{n}": kind for i in range(2) for n, kind in parts.items()}
    assert list(model.state_dict()) == keys
    assert [id(parameter) for parameter in model.parameters()] == parameters
    assert fuse_layers(model) == 0 and len(convert_to_bitlinear(model)) == 14  # and once is enough


@pytest.mark.parametrize(
    "overrides, skip",
    [
        (dict(mlp_bias=True), []),
        (dict(hidden_act="gelu"), []),
        (dict(hidden_act="relu2"), []),
        ({}, ["down_proj"]),
        ({}, ["gate_proj"]),
    ],
    ids=["bias", "gelu", "relu2", "down dense", "gate dense"],
)
def test_other_mlps_stay(tiny_model, overrides: dict[str, Any], skip: list[str]) -> None:
    model = tiny_model("Llama", **overrides)
    convert_to_bitlinear(model, skip)
    assert set(kinds(model).values()) == {RMSNorm}
    assert type(model.model.layers[0].mlp).__name__ == "LlamaMLP"


@pytest.mark.parametrize("family", ["BitNet", "Gemma"])
def test_other_families_stay(tiny_model, family: str) -> None:
    """BitNet's MLP has a norm inside; Gemma's norm adds one to its weight."""
    model = tiny_model(family)
    convert_to_bitlinear(model)
    assert not kinds(model)


def test_nothing_is_fused_if_asked_not_to(tiny_model) -> None:
    model = tiny_model("Llama")
    convert_to_bitlinear(model, fuse=False)
    assert not kinds(model)


# The same bits


@pytest.fixture
def multiplied(monkeypatch: pytest.MonkeyPatch) -> list[tuple[Tensor, ...]]:
    """Codes and scales of both sides of every product of codes since."""
    seen: list[tuple[Tensor, ...]] = []
    original = ops.matmul

    def watching(codes_x: Tensor, r: Tensor, codes_w: Tensor, s: Tensor, *rest: Any) -> Tensor:
        seen.append((codes_x, r, codes_w, s))
        return original(codes_x, r, codes_w, s, *rest)

    monkeypatch.setattr("axolotl_bitnet.ops.matmul", watching)
    return seen


@pytest.mark.parametrize("autocast", [False, True])
@by_dtype
@by_family
def test_codes_logits_and_loss_are_the_unfused_ones(
    pair, multiplied: list, family: str, dtype: torch.dtype, autocast: bool
) -> None:
    plain, fused = pair(family, dtype)
    batch = torch.randint(3, 128, (2, 11))
    outputs = []
    for model in (plain, fused):
        with torch.autocast("cpu", dtype=torch.bfloat16, enabled=autocast):
            outputs.append(model(batch, labels=batch))
    assert torch.equal(outputs[0].loss, outputs[1].loss)
    assert torch.equal(outputs[0].logits, outputs[1].logits)
    half = len(multiplied) // 2
    assert half == 14
    for one, other in zip(multiplied[:half], multiplied[half:], strict=True):
        assert all(torch.equal(a, b) for a, b in zip(one, other, strict=True))


@pytest.mark.parametrize("shape", [(64,), (1, 64), (5, 64), (2, 1, 3, 64), (0, 64)], ids=str)
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16], ids=str)
def test_any_shape(pair, dtype: torch.dtype, shape: tuple[int, ...]) -> None:
    x = torch.randn(shape).to(dtype)
    for plain, fused in (mlps(pair, dtype), norms(pair, dtype)):
        assert torch.equal(fused(x), plain(x)) and fused(x).shape == shape


def test_any_layout(pair) -> None:
    x, dy = torch.randn(64, 6).t(), torch.randn(64, 6).t()
    for plain, fused in (mlps(pair), norms(pair)):
        close(run_module(fused, x, dy), run_module(plain, x.contiguous(), dy), 1e-6)
        close(run_module(fused, x, dy[:1].expand(6, 64)), run_module(plain, x, dy[:1].expand(6, 64)), 1e-6)


@pytest.mark.parametrize("bad", [torch.nan, torch.inf])
def test_a_bad_row_makes_that_row_nan(pair, bad: float) -> None:
    x = torch.randn(4, 64)
    x[2, 5] = bad
    for plain, fused in (mlps(pair), norms(pair)):
        y = fused(x)
        assert y[2].isnan().any() and torch.equal(y.isnan(), plain(x).isnan())
        assert torch.equal(y[[0, 1, 3]], plain(x)[[0, 1, 3]])
    assert mlps(pair)[1](x)[2].isnan().all()


def test_decoding_and_modes(pair) -> None:
    plain, fused = pair()
    prompt = torch.randint(3, 128, (1, 5))
    settings = dict(attention_mask=torch.ones_like(prompt), max_new_tokens=4, do_sample=False)
    assert torch.equal(fused.generate(prompt, **settings), plain.generate(prompt, **settings))
    expected = plain(prompt).logits
    for mode in (torch.no_grad, torch.inference_mode):
        with mode():
            assert torch.equal(fused(prompt).logits, expected)
    assert torch.equal(fused.eval()(prompt).logits, expected)


# Gradients


@by_dtype
@by_family
def test_gradients_of_a_model(pair, family: str, dtype: torch.dtype) -> None:
    batch = torch.randint(3, 128, (2, 11))
    found = []
    for model in pair(family, dtype):
        model(batch, labels=batch).loss.backward()
        found.append(gradients(model))
    close(found[1], found[0], 1e-5 if dtype == torch.float32 else 0.03)


def exact_mlp(mlp: nn.Module, x: Tensor, dy: Tensor) -> list[Tensor]:
    """Gradients of x and the three weights in float64, straight through the codes of this forward."""
    parts = [mlp.gate_proj, mlp.up_proj, mlp.down_proj]
    weights = [ternary.dequantize(*ternary.ternarize(part.weight.detach()), torch.float64) for part in parts]
    gate, up = (part(x).detach() for part in parts[:2])
    x_hat, h_hat = (
        ternary.dequantize(*ternary.quantize_activations(t), torch.float64) for t in (x, silu(gate) * up)
    )
    wide = [t.double().requires_grad_() for t in (gate, up)]
    dgate, dup = torch.autograd.grad(silu(wide[0]) * wide[1], wide, dy.double() @ weights[2])
    return [
        dgate @ weights[0] + dup @ weights[1],
        dgate.t() @ x_hat,
        dup.t() @ x_hat,
        dy.double().t() @ h_hat,
    ]


def exact_norm(norm: nn.Module, x: Tensor, dy: Tensor) -> list[Tensor]:
    wide = [t.detach().double().requires_grad_() for t in (x, norm.weight)]
    y = wide[0] * torch.rsqrt(wide[0].square().mean(-1, keepdim=True) + norm.variance_epsilon) * wide[1]
    return list(torch.autograd.grad(y, wide, dy.double()))


@by_dtype
@pytest.mark.parametrize("modules, exact", [(mlps, exact_mlp), (norms, exact_norm)], ids=["mlp", "norm"])
def test_gradients_are_no_worse_than_the_unfused_ones(
    pair, modules: Callable[..., Pair], exact: Callable[..., list[Tensor]], dtype: torch.dtype
) -> None:
    """Against float64: fewer roundings in between, never more."""
    plain, fused = modules(pair, dtype)
    x, dy = torch.randn(200, 64).to(dtype), torch.randn(200, 64).to(dtype)
    expected = exact(plain, x, dy)
    errors = [
        [float((found.double() - e).norm() / e.norm()) for found, e in zip(r[1:], expected, strict=True)]
        for r in (run_module(plain, x, dy), run_module(fused, x, dy))
    ]
    for unfused_error, fused_error in zip(*errors, strict=True):
        assert fused_error <= 1.05 * unfused_error + 2e-7, errors
        assert fused_error < (2e-6 if dtype == torch.float32 else 1e-2)


@pytest.mark.parametrize("precision", ["int8_dx", "int8"])
def test_int8_gradients_are_the_unfused_ones(tiny_model, precision: Backward) -> None:
    plain, fused = (m.model.layers[0].mlp for m in pair_of(tiny_model("Llama"), backward=precision))
    x, dy = torch.randn(9, 64), torch.randn(9, 64)
    found, expected = run_module(fused, x, dy), run_module(plain, x, dy)
    close(found, expected, 1e-2)  # dgate and dup may be a code apart
    assert torch.equal(found[-1], expected[-1])
    fused.down_proj.backward = "bf16"
    assert not torch.equal(run_module(fused, x, dy)[1], found[1])


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
def test_under_autocast(pair, dtype: torch.dtype) -> None:
    """Latents in float32, computation in bfloat16; gradients in the dtypes of what they belong to."""
    batch = torch.randint(3, 128, (2, 11))
    found = []
    for model in pair(dtype=dtype):
        with torch.autocast("cpu", dtype=torch.bfloat16):
            model(batch, labels=batch).loss.backward()
        assert all(parameter.grad.dtype == dtype for parameter in model.parameters())
        found.append(gradients(model))
    close(found[1], found[0], 0.03)


@pytest.mark.parametrize("frozen", ["gate_proj", "up_proj", "down_proj", "x", "all"])
def test_only_what_is_asked_for_gets_a_gradient(pair, frozen: str) -> None:
    _, fused = mlps(pair)
    x, dy = torch.randn(5, 64), torch.randn(5, 64)
    _, dx, *expected = run_module(fused, x, dy)
    names = [name.removesuffix(".weight") for name, _ in fused.named_parameters()]
    for name, parameter in fused.named_parameters():
        parameter.requires_grad_(frozen != "all" and not name.startswith(frozen))
    leaf = x.clone().requires_grad_(frozen != "x")
    fused(leaf).backward(dy)
    assert leaf.grad is None if frozen == "x" else torch.equal(leaf.grad, dx)
    for name, parameter, gradient in zip(names, fused.parameters(), expected, strict=True):
        asked = frozen != "all" and name != frozen
        assert torch.equal(parameter.grad, gradient) if asked else parameter.grad is None


def test_a_frozen_norm(pair) -> None:
    _, fused = norms(pair)
    x, dy = torch.randn(5, 64), torch.randn(5, 64)
    _, dx, dw = run_module(fused, x, dy)
    fused.weight.requires_grad_(False)
    assert torch.equal(run_module(fused, x, dy)[1], dx)
    fused.weight.requires_grad_(True)
    fused(x).backward(dy)
    assert torch.equal(fused.weight.grad, dw)


# What is kept


@by_dtype
def test_the_mlp_keeps_neither_the_product_nor_a_copy_of_a_weight(pair, dtype: torch.dtype) -> None:
    _, fused = mlps(pair, dtype)
    x = torch.randn(3, 7, 64).to(dtype).requires_grad_()
    with saving() as saved:
        y = fused(x)
    weights = {parameter.data_ptr() for parameter in fused.parameters()}
    assert {tensor.data_ptr() for tensor in saved if tensor.data_ptr() in weights} == weights
    rest = [tensor for tensor in saved if tensor.data_ptr() not in weights]
    sizes = sorted((str(tensor.dtype), tuple(tensor.shape)) for tensor in rest)
    scales = [("torch.float32", (3, 7, 1))] * 2
    assert sizes == sorted([*scales, ("torch.int8", (3, 7, 64)), *[(str(dtype), (3, 7, 128))] * 2])
    gate, up = fused.gate_proj(x), fused.up_proj(x)
    for tensor in rest:
        assert tensor.shape != gate.shape or torch.equal(tensor, gate) or torch.equal(tensor, up)
    held = [value for value in vars(y.grad_fn).values() if isinstance(value, Tensor)]
    assert all(tensor.numel() == 1 for tensor in held)


def test_the_norm_keeps_what_it_read(pair) -> None:
    _, fused = norms(pair)
    x = torch.randn(3, 7, 64, requires_grad=True)
    with saving() as saved:
        fused(x)
    given, weight, rstd = saved
    assert given.data_ptr() == x.data_ptr() and weight.data_ptr() == fused.weight.data_ptr()
    assert rstd.dtype == torch.float32 and rstd.shape == (3, 7, 1)


@pytest.fixture
def quantized(monkeypatch: pytest.MonkeyPatch) -> Iterator[list[Tensor]]:
    """What is quantized on its own since, past the fused operations."""
    seen: list[Tensor] = []
    original = ops.quantize_activations
    monkeypatch.setattr(
        "axolotl_bitnet.ops.quantize_activations", lambda x, *rest: seen.append(x) or original(x, *rest)
    )
    yield seen


@pytest.mark.parametrize("grad", [False, True])
@pytest.mark.parametrize("autocast", [False, True])
def test_the_norm_leaves_the_codes_of_what_it_returns(
    pair, quantized: list, autocast: bool, grad: bool
) -> None:
    _, fused = norms(pair)
    x = torch.randn(3, 7, 64, requires_grad=True)
    dtype = torch.bfloat16 if autocast else torch.float32
    with torch.set_grad_enabled(grad), torch.autocast("cpu", dtype=torch.bfloat16, enabled=autocast):
        y = fused(x)
    assert y.requires_grad == grad
    codes, r = shared_activation_codes(y, dtype)
    expected, scales = ternary.quantize_activations(y.detach().to(dtype))
    assert torch.equal(codes, expected) and torch.equal(r, scales) and not quantized
    assert not codes.requires_grad and not r.requires_grad
    z = y * 1 if grad else y
    shared_activation_codes(z.mul_(2), dtype)
    assert len(quantized) == 1  # changed, and so quantized again


def test_a_model_quantizes_little_on_its_own(pair, quantized: list) -> None:
    """Of the four tensors that linear layers read in a decoder layer, o_proj's alone."""
    _, fused = pair()
    fused(torch.randint(3, 128, (2, 5)))
    assert len(quantized) == 2


def test_codes_of_a_norm_go_with_its_output(pair) -> None:
    _, fused = norms(pair)
    x = torch.randn(3, 64, requires_grad=True)
    y = fused(x)
    kept = [TensorWeakRef(tensor) for tensor in (y, *shared_activation_codes(y, y.dtype))]
    y.sum().backward()
    del y
    assert all(reference() is None for reference in kept)  # at once: no cycle
