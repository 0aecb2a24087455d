"""The fused layers among what people wrap around them: hooks, checkpointing, compilers, copies, Liger."""

from __future__ import annotations

import copy
import pickle
from collections.abc import Callable
from types import MethodType
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from axolotl_bitnet import ops
from axolotl_bitnet.layers.bitlinear import BitLinear
from axolotl_bitnet.layers.fused_llama import RMSNorm, SwiGLU
from axolotl_bitnet.model.convert import convert_to_bitlinear
from support.layers import close, gradients, kinds, mlps, norms, pair_of, run_module

PARTS = ["gate_proj", "up_proj", "down_proj"]


# Whoever watches a part


def watch(layer: nn.Module, how: str, calls: list[str]) -> None:
    def note(*_: Any) -> None:
        calls.append(how)

    if how == "forward":
        layer.register_forward_hook(note)
    elif how == "forward with kwargs":
        layer.register_forward_pre_hook(note, with_kwargs=True)
    elif how == "pre":
        layer.register_forward_pre_hook(note)
    elif how == "backward":
        layer.register_full_backward_hook(note)
    elif how == "backward pre":
        layer.register_full_backward_pre_hook(note)
    else:

        def forward(self: BitLinear, x: Tensor) -> Tensor:
            note()
            return BitLinear.forward(self, x)

        layer.forward = MethodType(forward, layer)


@pytest.mark.parametrize("part", PARTS)
@pytest.mark.parametrize(
    "how", ["forward", "forward with kwargs", "pre", "backward", "backward pre", "instance"]
)
def test_hooks_on_a_part_are_called(pair, how: str, part: str) -> None:
    plain, fused = mlps(pair)
    calls: list[str] = []
    watch(fused.get_submodule(part), how, calls)
    x, dy = torch.randn(5, 64), torch.randn(5, 64)
    found = run_module(fused, x, dy)
    assert calls == [how]
    assert all(torch.equal(*both) for both in zip(found, run_module(plain, x, dy), strict=True))


def test_a_hook_that_is_gone_does_not_count(pair) -> None:
    _, fused = mlps(pair)
    x = torch.randn(5, 64, requires_grad=True)
    assert type(fused(x).grad_fn).__name__ == "_DownBackward"
    handle = fused.up_proj.register_forward_hook(lambda *_: None)
    assert type(fused(x).grad_fn).__name__ == "_BitLinearBackward"
    handle.remove()
    assert type(fused(x).grad_fn).__name__ == "_DownBackward"


def test_hooks_on_the_modules_themselves_are_called(pair) -> None:
    x, dy = torch.randn(5, 64), torch.randn(5, 64)
    for plain, fused in (mlps(pair), norms(pair)):
        calls: list[str] = []
        for how in ("pre", "forward", "backward"):
            watch(fused, how, calls)
        close(run_module(fused, x, dy), run_module(plain, x, dy), 1e-5)
        assert calls == ["pre", "forward", "backward"]


def test_hooks_on_parameters_are_called(pair) -> None:
    _, fused = mlps(pair)
    seen = []
    for name, parameter in fused.named_parameters():
        parameter.register_post_accumulate_grad_hook(lambda p, name=name: seen.append(name))
    run_module(fused, torch.randn(5, 64), torch.randn(5, 64))
    assert sorted(seen) == sorted(name for name, _ in fused.named_parameters())


def test_another_kind_of_layer_is_called(pair) -> None:
    """What PEFT and parametrizations do: another class in the part's place."""
    plain, fused = mlps(pair)

    class Doubling(nn.Module):
        def __init__(self, inner: nn.Module) -> None:
            super().__init__()
            self.inner = inner

        def forward(self, x: Tensor) -> Tensor:
            return 2 * self.inner(x)

    x = torch.randn(5, 64)
    for mlp in (plain, fused):
        mlp.up_proj = Doubling(mlp.up_proj)
    assert torch.equal(fused(x), plain(x))
    nn.utils.parametrize.register_parametrization(fused.gate_proj, "weight", nn.Identity())
    assert torch.equal(fused(x), plain(x))


def test_weights_that_are_not_there_are_waited_for(pair) -> None:
    """ZeRO-3 leaves an empty parameter until the part's own pre-hook brings the whole one."""
    plain, fused = mlps(pair)
    whole = fused.gate_proj.weight.data
    fused.gate_proj.weight.data = torch.empty(0)
    fused.gate_proj.register_forward_pre_hook(lambda layer, _: setattr(layer.weight, "data", whole))
    x = torch.randn(5, 64)
    assert torch.equal(fused(x), plain(x))


@pytest.mark.parametrize(
    "x_dtype, w_dtype", [(torch.bfloat16, torch.float32), (torch.float32, torch.bfloat16)]
)
def test_a_norm_of_two_dtypes_is_the_unfused_one(pair, x_dtype: torch.dtype, w_dtype: torch.dtype) -> None:
    plain, fused = norms(pair, w_dtype)
    x, dy = torch.randn(5, 64).to(x_dtype), torch.randn(5, 64)
    for one, other in zip(run_module(fused, x, dy), run_module(plain, x, dy), strict=True):
        assert one.dtype == other.dtype and torch.equal(one, other)


def test_backward_of_a_float32_layer_inside_autocast(pair) -> None:
    """The forward ran in float32; autocast around the backward alone must not round its products."""
    x, dy = torch.randn(5, 64), torch.randn(5, 64)
    for _, fused in (mlps(pair), norms(pair)):
        _, *expected = run_module(fused, x, dy)
        leaf = x.clone().requires_grad_()
        y = fused(leaf)
        with torch.autocast("cpu", dtype=torch.bfloat16):
            y.backward(dy)
        assert all(torch.equal(*both) for both in zip([leaf.grad, *gradients(fused)], expected, strict=True))


# Copies, state, changes


def test_copies_and_pickles_are_independent(pair) -> None:
    _, fused = pair()
    batch = torch.randint(3, 128, (2, 5))
    expected = fused(batch).logits
    other = copy.deepcopy(fused)
    assert kinds(other) == kinds(fused) and torch.equal(other(batch).logits, expected)
    with torch.no_grad():
        other.model.layers[0].mlp.up_proj.weight.neg_()
        other.model.layers[0].input_layernorm.weight.neg_()
    assert not torch.equal(other(batch).logits, expected)
    assert torch.equal(fused(batch).logits, expected)

    x = torch.randn(5, 64)
    for _, module in (mlps(pair), norms(pair)):
        y = module(x)
        other = pickle.loads(pickle.dumps(module))
        assert type(other) is type(module) and torch.equal(other(x), y)
        with torch.no_grad():
            next(other.parameters()).neg_()
        assert not torch.equal(other(x), y) and torch.equal(module(x), y)


def test_state_is_exchanged_with_the_unfused_model(pair) -> None:
    plain, fused = pair()
    with torch.no_grad():
        for parameter in plain.parameters():
            parameter.add_(0.01 * torch.randn_like(parameter))
    batch = torch.randint(3, 128, (2, 5))
    assert not torch.equal(fused(batch).logits, plain(batch).logits)
    fused.load_state_dict(plain.state_dict())
    assert torch.equal(fused(batch).logits, plain(batch).logits)
    assert plain.state_dict().keys() == fused.state_dict().keys()


@pytest.mark.parametrize("name", ["mlp.gate_proj", "mlp.down_proj", "input_layernorm"])
def test_a_step_between_forward_and_backward_is_refused(pair, name: str) -> None:
    layer = pair()[1].model.layers[0]
    owner = layer.input_layernorm if "norm" in name else layer.mlp
    y = owner(torch.randn(5, 64, requires_grad=True))
    with torch.no_grad():
        layer.get_submodule(name).weight.add_(1)
    with pytest.raises(RuntimeError, match="modified by an inplace operation"):
        y.sum().backward()


def test_double_backward_is_refused(pair) -> None:
    for _, fused in (mlps(pair), norms(pair)):
        x = torch.randn(5, 64, requires_grad=True)
        (gradient,) = torch.autograd.grad(fused(x).square().sum(), x, create_graph=True)
        with pytest.raises(RuntimeError, match="once_differentiable"):
            gradient.sum().backward()


def test_training_lowers_the_loss(pair) -> None:
    plain, fused = pair()
    batch = torch.randint(3, 128, (4, 12))
    losses: list[list[float]] = []
    for model in (plain, fused):
        optimizer = torch.optim.AdamW(model.parameters(), lr=3e-3)
        losses.append([])
        for _ in range(15):
            loss = model(batch, labels=batch).loss
            loss.backward()
            optimizer.step()
            optimizer.zero_grad()
            losses[-1].append(loss.item())
    assert losses[1][-1] < 0.8 * losses[1][0]
    assert losses[1][0] == losses[0][0] and abs(losses[1][-1] - losses[0][-1]) < 0.05 * losses[0][-1]


# Activation checkpointing


@pytest.mark.parametrize("reentrant", [False, True])
@pytest.mark.parametrize("autocast", [False, True])
def test_activation_checkpointing(pair, reentrant: bool, autocast: bool) -> None:
    fused = pair("Qwen3")[1].train()
    batch = torch.randint(3, 128, (2, 9))
    found = []
    for checkpointed in (False, True):
        if checkpointed:
            fused.gradient_checkpointing_enable({"use_reentrant": reentrant})
            fused.enable_input_require_grads()
        with torch.autocast("cpu", dtype=torch.bfloat16, enabled=autocast):
            loss = fused(batch, labels=batch, use_cache=False).loss
        loss.backward()
        found.append([loss.detach(), *gradients(fused)])
    assert all(torch.equal(*both) for both in zip(*found, strict=True))


def test_checkpointing_does_not_compute_the_last_product_again(pair, monkeypatch: pytest.MonkeyPatch) -> None:
    """It ends at the last tensor that a backward needs."""
    fused = pair("Llama")[1].train()
    fused.gradient_checkpointing_enable({"use_reentrant": False})
    fused.enable_input_require_grads()
    columns: list[int] = []
    original = ops.matmul

    def counting(codes_x: Tensor, *rest: Any) -> Tensor:
        columns.append(codes_x.shape[-1])
        return original(codes_x, *rest)

    monkeypatch.setattr("axolotl_bitnet.ops.matmul", counting)
    batch = torch.randint(3, 128, (2, 9))
    fused(batch, labels=batch, use_cache=False).loss.backward()
    layers = fused.config.num_hidden_layers
    assert columns.count(fused.config.intermediate_size) == layers
    assert len(columns) == layers * (7 + 6)


# torch.compile


@pytest.mark.slow
@pytest.mark.parametrize("backend", ["aot_eager", "inductor"])
@pytest.mark.parametrize("autocast", [False, True])
def test_compiled_mlp_is_the_eager_one(pair, backend: str, autocast: bool) -> None:
    _, fused = mlps(pair)
    compiled = torch.compile(fused, fullgraph=True, backend=backend)
    x, dy = torch.randn(3, 5, 64), torch.randn(3, 5, 64)
    with torch.autocast("cpu", dtype=torch.bfloat16, enabled=autocast):
        expected, found = run_module(fused, x, dy), run_module(compiled, x, dy)
    assert torch.equal(found[0], expected[0])
    for one, other in zip(found[2:], expected[2:], strict=True):
        assert torch.equal(one, other)
    close([found[1]], [expected[1]], 1e-2 if autocast else 1e-6)  # dX of two, added in bfloat16


class Block(nn.Module):
    """A decoder layer's second half: what a compiler sees in one piece."""

    def __init__(self, layer: nn.Module) -> None:
        super().__init__()
        self.norm, self.mlp = layer.post_attention_layernorm, layer.mlp

    def forward(self, x: Tensor) -> Tensor:
        return x + self.mlp(self.norm(x))


@pytest.mark.slow
@pytest.mark.parametrize("backend", ["aot_eager", "inductor"])
def test_compiled_block_is_the_eager_one(pair, backend: str) -> None:
    block = Block(pair()[1].model.layers[0])
    assert type(block.norm) is RMSNorm and type(block.mlp) is SwiGLU
    x, dy = torch.randn(3, 5, 64), torch.randn(3, 5, 64)
    expected = run_module(block, x, dy)
    compiled = torch.compile(block, fullgraph=True, backend=backend, dynamic=True)
    close(run_module(compiled, x, dy), expected, 1e-5)
    with torch.compiler.set_stance("fail_on_recompile"):
        x, dy = torch.randn(3, 8, 64), torch.randn(3, 8, 64)
        close(run_module(compiled, x, dy), run_module(block, x, dy), 1e-5)


def test_a_compiled_mlp_without_gradients(pair) -> None:
    _, fused = mlps(pair)
    compiled = torch.compile(fused, fullgraph=True, backend="aot_eager")
    x = torch.randn(3, 64)
    for grad in (torch.no_grad, torch.inference_mode):
        with grad():
            assert torch.equal(compiled(x), fused(x))
    torch._dynamo.reset()


@pytest.mark.slow
def test_a_whole_model_compiles_without_a_break(pair) -> None:
    plain, fused = pair()
    batch = torch.randint(3, 128, (2, 7))
    compiled = torch.compile(fused, fullgraph=True, backend="aot_eager")
    loss = compiled(batch, labels=batch, use_cache=False).loss
    loss.backward()
    expected = plain(batch, labels=batch).loss
    expected.backward()
    close([loss.detach(), *gradients(fused)], [expected.detach(), *gradients(plain)], 1e-5)


# Liger's classes


@pytest.fixture
def liger(tiny_model) -> Callable[..., nn.Module]:
    """A tiny Llama with Liger's MLPs and norms, which do not run here: their kernels want a GPU."""
    transformers = pytest.importorskip("liger_kernel.transformers")

    def build(**settings: Any) -> nn.Module:
        model = tiny_model("Llama")
        for layer in model.model.layers:
            mlp = transformers.LigerSwiGLUMLP(model.config)
            mlp.load_state_dict(layer.mlp.state_dict())
            layer.mlp = mlp
            for name in ("input_layernorm", "post_attention_layernorm"):
                setattr(layer, name, transformers.LigerRMSNorm(64, **settings))
        return model

    return build


def test_liger_classes_are_fused(tiny_model, liger) -> None:
    model = liger()
    same = tiny_model("Llama")
    same.load_state_dict(model.state_dict())
    same.model.norm.variance_epsilon = model.model.norm.variance_epsilon
    convert_to_bitlinear(model)
    plain, _ = pair_of(copy.deepcopy(same))
    with torch.no_grad():
        model.load_state_dict(plain.state_dict())
    batch = torch.randint(3, 128, (2, 5))
    assert set(kinds(model).values()) == {SwiGLU, RMSNorm} and len(kinds(model)) == 6
    assert torch.equal(model(batch).logits, plain(batch).logits)


@pytest.mark.parametrize(
    "settings", [dict(offset=1.0), dict(casting_mode="gemma"), dict(elementwise_affine=False)], ids=str
)
def test_other_liger_norms_stay(liger, settings: dict[str, Any]) -> None:
    model = liger(**settings)
    convert_to_bitlinear(model)
    assert set(kinds(model).values()) == {SwiGLU}
