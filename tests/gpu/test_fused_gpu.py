"""Layers on a GPU: gradients no worse than plain torch's, fused MLPs to the bit, torch.compile."""

from __future__ import annotations

import copy
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

from axolotl_bitnet import ops, ternary
from axolotl_bitnet.layers.bitlinear import BitLinear
from axolotl_bitnet.model.convert import convert_to_bitlinear
from axolotl_bitnet.ops import operation
from support.layers import close, gradients, kinds, mlps, norms, run_module

pytestmark = [
    pytest.mark.gpu,
    pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA GPU"),
]

by_dtype = pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
SIZE = dict(hidden_size=256, intermediate_size=688, num_attention_heads=4, head_dim=64)


def errors(found: list[Tensor], exact: list[Tensor]) -> list[float]:
    return [float((one.double() - e).norm() / e.norm()) for one, e in zip(found, exact, strict=True)]


def no_worse(found: list[float], other: list[float], slack: float = 2e-7) -> None:
    assert all(one <= 1.05 * two + slack for one, two in zip(found, other, strict=True)), (found, other)


# One layer


@pytest.mark.parametrize("weight_dtype", [torch.float32, torch.bfloat16], ids=str)
@by_dtype
def test_gradients_are_no_worse_than_plain_torch(
    monkeypatch: pytest.MonkeyPatch, dtype: torch.dtype, weight_dtype: torch.dtype
) -> None:
    layer = BitLinear(2048, 640, device="cuda", dtype=weight_dtype)
    x, dy = (
        torch.randn(3, 700, 2048, device="cuda").to(dtype),
        torch.randn(3, 700, 640, device="cuda").to(dtype),
    )
    found = run_module(layer, x, dy)
    monkeypatch.setattr(operation, "_gpu_has_kernels", lambda _: False)
    expected = run_module(layer, x, dy)
    assert torch.equal(found[0], expected[0])

    codes_x, r = ternary.quantize_activations(x.reshape(-1, 2048))
    codes_w, s = ternary.ternarize(layer.weight.detach())
    rows = dy.reshape(-1, 640).double()
    exact_dx = (rows @ (codes_w.double() / s.double())).reshape(x.shape)
    exact = [exact_dx, rows.t() @ (codes_x.double() / r.double()), rows.sum(0)]
    no_worse(errors(found[1:], exact), errors(expected[1:], exact))


@by_dtype
def test_int8_gradient_is_the_definition(dtype: torch.dtype) -> None:
    layer = BitLinear(2048, 640, bias=False, device="cuda")
    layer.backward = "int8_dx"
    x = torch.randn(300, 2048, device="cuda").to(dtype)
    dy = (torch.randn(300, 640, device="cuda") * 1e-8).to(dtype)
    _, dx, _ = run_module(layer, x, dy)
    codes, r = ternary.quantize_activations(dy, 1e-30)
    codes_w, s = ternary.ternarize(layer.weight.detach())
    product = codes.double() @ codes_w.double()
    assert torch.equal(dx, ternary.dequantize_output(product, r, s).to(dtype))


@pytest.mark.parametrize("weight_dtype", [torch.float32, torch.bfloat16], ids=str)
@by_dtype
def test_both_int8_gradients_are_those_of_plain_torch(
    monkeypatch: pytest.MonkeyPatch, dtype: torch.dtype, weight_dtype: torch.dtype
) -> None:
    layer = BitLinear(2048, 640, device="cuda", dtype=weight_dtype)
    layer.backward = "int8"
    x = torch.randn(3, 700, 2048, device="cuda").to(dtype)
    dy = (torch.randn(3, 700, 640, device="cuda") * 1e-8).to(dtype)
    found = run_module(layer, x, dy)
    monkeypatch.setattr(operation, "_gpu_has_kernels", lambda _: False)
    for one, other in zip(found, run_module(layer, x, dy), strict=True):
        assert torch.equal(one, other)


def test_latents_in_float32_get_unrounded_gradients() -> None:
    """Under autocast: dY and x are bfloat16, their product is accumulated and kept in float32."""
    layer = BitLinear(512, 256, bias=False, device="cuda")
    x, dy = torch.randn(4000, 512, device="cuda"), torch.randn(4000, 256, device="cuda").bfloat16()
    with torch.autocast("cuda", torch.bfloat16):
        y = layer(x)
    y.backward(dy)
    codes, r = ternary.quantize_activations(x.bfloat16())
    exact = dy.double().t() @ ops.dequantize_activations(codes, r, torch.bfloat16).double()
    assert (layer.weight.grad.double() - exact).norm() < 1e-5 * exact.norm()
    assert not torch.equal(layer.weight.grad, layer.weight.grad.bfloat16().float())


# Fused


@by_dtype
def test_fused_mlp_is_the_unfused_one(pair, dtype: torch.dtype) -> None:
    plain_mlp, fused = (mlp.cuda() for mlp in mlps(pair, dtype, **SIZE))
    x, dy = torch.randn(2, 333, 256, device="cuda").to(dtype), torch.randn(2, 333, 256, device="cuda")
    found, expected = run_module(fused, x, dy), run_module(plain_mlp, x, dy)
    assert torch.equal(found[0], expected[0])
    close(found, expected, 1e-5 if dtype == torch.float32 else 0.02)


class Checkpointed(nn.Sequential):
    def forward(self, x: Tensor) -> Tensor:
        return checkpoint(self[0], x, use_reentrant=False)


@by_dtype
def test_int8_backward_of_a_fused_mlp(pair, dtype: torch.dtype) -> None:
    """Close to bf16's, and with checkpointing the same: rounding follows from the tensors alone."""
    _, mlp = (each.cuda() for each in mlps(pair, dtype, **SIZE))
    x, dy = torch.randn(2, 333, 256, device="cuda").to(dtype), torch.randn(2, 333, 256, device="cuda")
    exact = run_module(mlp, x, dy)
    for part in mlp.children():
        part.backward = "int8"
    found = run_module(mlp, x, dy)
    assert torch.equal(found[0], exact[0])
    close(found, exact, 0.05)
    again = run_module(Checkpointed(mlp), x, dy)
    assert all(torch.equal(*each) for each in zip(found, again, strict=True))


@by_dtype
def test_fused_norm_leaves_its_codes(pair, dtype: torch.dtype) -> None:
    plain_norm, fused = (norm.cuda() for norm in norms(pair, dtype))
    x, dy = torch.randn(2, 333, 64, device="cuda").to(dtype), torch.randn(2, 333, 64, device="cuda")
    close(run_module(fused, x, dy), run_module(plain_norm, x, dy), 1e-6 if dtype == torch.float32 else 0.01)
    y = fused(x)
    layer = BitLinear(64, 32, device="cuda", dtype=dtype)
    assert torch.equal(layer(y), layer(y.clone()))


@pytest.mark.parametrize("autocast", [False, True])
def test_fused_model_is_close_to_the_unfused_one(pair, autocast: bool) -> None:
    """The norms' sums of squares differ in the last bit, so a code in some thousands does."""
    batch = torch.randint(3, 128, (4, 60), device="cuda")
    found = []
    for model in pair(**SIZE):
        model.cuda()
        with torch.autocast("cuda", torch.bfloat16, enabled=autocast):
            loss = model(batch, labels=batch).loss
        loss.backward()
        found.append([loss.detach().reshape(1), *gradients(model)])
    close(found[1], found[0], 0.05)


# torch.compile


class Layer(nn.Module):
    """A whole decoder layer, and what a BitLinear in it sees."""

    def __init__(self, model: nn.Module) -> None:
        super().__init__()
        self.layer, self.rotary = model.model.layers[0], model.model.rotary_emb

    def forward(self, x: Tensor) -> tuple[Tensor, Tensor, Tensor, Tensor]:
        positions = torch.arange(x.shape[1], device=x.device)[None]
        y: Any = self.layer(x, position_ids=positions, position_embeddings=self.rotary(x, positions))
        seen = self.layer.input_layernorm(x)
        codes, r = ops.quantize_activations(seen.detach(), seen.dtype)
        return y if isinstance(y, Tensor) else y[0], seen, codes, r


@by_dtype
def test_compiled_decoder_layer(tiny_model, dtype: torch.dtype) -> None:
    model = tiny_model("Llama", **SIZE).cuda().to(dtype)
    convert_to_bitlinear(model)
    layer = Layer(model)
    assert len(kinds(layer)) == 3
    compiled = torch.compile(layer, fullgraph=True)
    x = torch.randn(2, 100, 256, device="cuda").to(dtype)
    results = []
    for function in (layer, compiled):
        leaf = x.clone().requires_grad_()
        y, seen, codes, r = function(leaf)
        expected = ops.quantize_activations.plain(seen.detach(), dtype)
        assert torch.equal(codes, expected[0]) and torch.equal(r, expected[1])  # of what was really seen
        y.float().square().sum().backward()
        results.append([y.detach(), leaf.grad, *gradients(layer.layer)])
    # the compiled norm does not round in between: some codes are one apart
    close(results[1], results[0], 0.02 if dtype == torch.float32 else 0.06)


def test_compiled_model_of_any_length(tiny_model) -> None:
    model = tiny_model("Llama", **SIZE).cuda().eval()
    convert_to_bitlinear(model)
    same = copy.deepcopy(model)
    model.model.layers[0].mlp = torch.compile(model.model.layers[0].mlp, fullgraph=True, dynamic=True)
    with torch.no_grad():
        for tokens in (7, 50, 33):
            batch = torch.randint(3, 128, (2, tokens), device="cuda")
            assert torch.equal(model(batch, use_cache=False).logits, same(batch, use_cache=False).logits)


def test_codes_of_a_graphs_output_are_not_stale() -> None:
    """CUDA graphs write new values into the same tensors, of the same version."""
    norm = torch.compile(nn.RMSNorm(256, device="cuda"), mode="reduce-overhead")
    layer = BitLinear(256, 64, device="cuda")
    with torch.no_grad():
        for _ in range(6):
            torch.compiler.cudagraph_mark_step_begin()
            y = norm(torch.randn(40, 256, device="cuda"))
            assert torch.equal(layer(y), layer(y.clone()))
