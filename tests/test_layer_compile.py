"""Layers compiled one by one, and checkpointed once: the same numbers, in one graph for all."""

from __future__ import annotations

import copy
from collections.abc import Iterator
from typing import Any

import pytest
import torch
from torch import nn
from torch.distributed.algorithms._checkpoint.checkpoint_wrapper import checkpoint_wrapper
from torch.profiler import ProfilerActivity, profile

from axolotl_bitnet import convert_to_bitlinear
from axolotl_bitnet.training.checkpoint_once import checkpoint_once
from axolotl_bitnet.training.layer_compile import CompileLayers, compile_layers
from axolotl_bitnet.training.ramp import set_ramp
from support.marks import slow_but
from support.models import tiny_model
from support.sharded import in_ranks


@pytest.fixture(autouse=True)
def afterwards() -> Iterator[None]:
    torch._dynamo.reset()
    yield
    torch._dynamo.reset()


def ternary(layers: int = 3) -> Any:
    torch.manual_seed(5)
    model = tiny_model("Llama", num_hidden_layers=layers)
    convert_to_bitlinear(model)
    return model


def wrap(model: Any, parts: bool = False) -> None:
    """Activation checkpointing as accelerate and Axolotl wrap for it."""
    layers = model.model.layers
    for index, layer in enumerate(layers):
        if parts:
            for name, child in list(layer.named_children()):
                layer.register_module(name, checkpoint_wrapper(child))
        layers[index] = checkpoint_wrapper(layer)


def gradients(model: Any, seed: int = 1) -> list[torch.Tensor]:
    ids = torch.randint(3, 128, (2, 24), generator=torch.Generator().manual_seed(seed))
    model.zero_grad()
    model(input_ids=ids, labels=ids, use_cache=False).loss.backward()
    return [parameter.grad.clone() for parameter in model.parameters()]


def calls(model: Any, part: str) -> int:
    """How often a part's forward is computed in a step."""
    count = 0

    def add(*_: Any) -> None:
        nonlocal count
        count += 1

    hooks = [
        module.register_forward_hook(add) for name, module in model.named_modules() if name.endswith(part)
    ]
    gradients(model)
    for hook in hooks:
        hook.remove()
    return count


def test_a_checkpoint_inside_another_is_taken_away() -> None:
    model = ternary(layers=2)
    plain = copy.deepcopy(model)
    wrap(model, parts=True)
    names = list(model.state_dict())
    assert calls(model, "q_proj") == 6
    assert checkpoint_once(model) == 8 and checkpoint_once(model) == 0
    assert calls(model, "q_proj") == 4
    assert list(model.state_dict()) == names == list(plain.state_dict())
    for one, other in zip(gradients(model), gradients(plain), strict=True):
        assert torch.equal(one, other)


def test_one_checkpoint_is_left() -> None:
    model = ternary(layers=2)
    wrap(model)
    assert checkpoint_once(model) == 0 and calls(model, "q_proj") == 4


def checkpoint(model: Any, kind: str | None) -> None:
    if kind == "wrapped":
        wrap(model)
    elif kind is not None:
        model.train().gradient_checkpointing_enable({"use_reentrant": kind == "reentrant"})


@pytest.mark.parametrize("checkpointed", slow_but(2, ["wrapped", "reentrant", None]))
def test_one_graph_serves_all_layers(checkpointed: str | None) -> None:
    model = ternary()
    plain = copy.deepcopy(model)
    names = list(model.state_dict())
    checkpoint(model, checkpointed)
    graphs = 0

    def backend(graph: Any, _: Any) -> Any:
        nonlocal graphs
        graphs += 1
        return graph

    assert compile_layers(model, backend=backend, fullgraph=True) == 3
    for one, other in zip(gradients(model), gradients(plain), strict=True):
        torch.testing.assert_close(one, other)
    assert graphs == 2 and list(model.state_dict()) == names  # the other is the loss


@pytest.mark.slow
@pytest.mark.parametrize("family", ["Mistral", "Qwen2", "Qwen3"])
def test_families_that_project_together(family: str) -> None:
    """Their attention modules read nothing of x but its shape: they take what is given in its place."""
    torch.manual_seed(5)
    model = tiny_model(family)
    convert_to_bitlinear(model)
    plain = copy.deepcopy(model)
    compile_layers(model, backend="aot_eager", fullgraph=True)
    for one, other in zip(gradients(model), gradients(plain), strict=True):
        torch.testing.assert_close(one, other)


def test_a_checkpoint_that_is_not_torchs_stays_outside() -> None:
    model, asked = ternary(layers=2), []
    checkpoint(model, "transformers")
    for layer in model.model.layers:
        layer._gradient_checkpointing_func = lambda function, *args: asked.append(1) or function(*args)
    compile_layers(model, backend="eager")
    gradients(model)
    assert len(asked) == 2


def test_outside_of_training_nothing_is_checkpointed() -> None:
    model = ternary(layers=2)
    plain = copy.deepcopy(model).eval()
    checkpoint(model, "transformers")
    compile_layers(model, backend="eager")
    ids = torch.randint(3, 128, (1, 9))
    given = {"max_new_tokens": 3, "do_sample": False}
    assert torch.equal(model.eval().generate(ids, **given), plain.generate(ids, **given))


@pytest.mark.slow
@pytest.mark.parametrize("checkpointed", ["wrapped", "transformers"])
def test_what_a_checkpoint_forgets_is_computed_again(checkpointed: str) -> None:
    """Every product but the MLP's last, whose output no backward needs."""
    model = ternary()
    checkpoint(model, checkpointed)
    compile_layers(model, backend="aot_eager_decomp_partition", fullgraph=True)
    gradients(model)
    with profile(activities=[ProfilerActivity.CPU]) as profiled:
        gradients(model)
    counts = {event.key: event.count for event in profiled.key_averages()}
    expected = {"project": 2 * 2, "gate_and_up": 2, "matmul": 1, "project_backward": 3, "down_backward": 1}
    assert {name: counts[f"axolotl_bitnet::{name}"] for name in expected} == {
        name: 3 * times for name, times in expected.items()
    }


@pytest.mark.slow
def test_compiled_anew_when_a_ramp_ends_and_without_gradients() -> None:
    model = ternary(layers=2)
    wrap(model)
    plain = copy.deepcopy(model)
    compile_layers(model, backend="eager", fullgraph=True)
    for value in (0.3, 1.0):
        for each in (model, plain):
            set_ramp(each, value)
        for one, other in zip(gradients(model), gradients(plain), strict=True):
            torch.testing.assert_close(one, other, rtol=1e-4, atol=1e-6)
        ids = torch.randint(3, 128, (3, 17))
        with torch.no_grad():
            one, other = (each(ids, use_cache=False).logits for each in (model, plain))
            torch.testing.assert_close(one, other, rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("compiled", [False, True])
def test_a_compiled_loss_keeps_no_logits_in_float32(compiled: bool) -> None:
    model = ternary(layers=1)
    if compiled:
        compile_layers(model, backend="aot_eager_decomp_partition", fullgraph=True)
    logits = torch.randn(2, 24, 128, dtype=torch.bfloat16, requires_grad=True)
    labels, kept = torch.randint(128, (2, 24)), []
    with torch.autograd.graph.saved_tensors_hooks(lambda x: kept.append(x) or x, lambda x: x):
        loss = model.loss_function(logits=logits, labels=labels, vocab_size=128, num_items_in_batch=46)
    large = [x for x in kept if x.numel() == logits.numel() and x.dtype == torch.float32]
    assert (not large) == compiled
    loss.backward()
    expected = torch.nn.functional.cross_entropy(
        logits.detach()[:, :-1].reshape(-1, 128).float(), labels[:, 1:].reshape(-1), reduction="sum"
    )
    torch.testing.assert_close(loss.detach(), expected / 46)
    assert logits.grad is not None and logits.grad.abs().max() > 0


def test_cuda_graphs_are_of_layers_alone_and_gradients_are_there_before_them(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    model, modes = ternary(layers=2), []
    monkeypatch.setattr(torch, "compile", lambda function, mode=None: modes.append(mode) or function)
    callback = CompileLayers(mode="reduce-overhead")
    callback.on_train_begin(None, None, None, model=model)
    assert modes == ["reduce-overhead", "reduce-overhead", None]
    CompileLayers().on_step_begin(None, None, None, model=model)
    assert all(parameter.grad is None for parameter in model.parameters())
    callback.on_step_begin(None, None, None, model=model)
    kept = [parameter.grad for parameter in model.parameters()]
    gradients(model)
    callback.on_step_begin(None, None, None, model=model)
    assert all(grad is not None and not grad.any() for grad in kept)
    assert all(parameter.grad is not None and parameter.grad.any() for parameter in model.parameters())


def test_a_model_without_such_layers() -> None:
    assert compile_layers(nn.Sequential(nn.Linear(3, 3))) == 0


def sharded(rank: int) -> None:
    from torch.distributed.fsdp import fully_shard

    from axolotl_bitnet.training.fsdp2_gather import gather_ternary

    found = []
    for compiled in (False, True):
        model = ternary(layers=2)
        wrap(model, parts=True)
        for layer in model.model.layers:
            fully_shard(layer._checkpoint_wrapped_module)
        fully_shard(model)
        assert checkpoint_once(model) == 8 and gather_ternary(model) == 14
        if compiled:
            compile_layers(model, backend="aot_eager", fullgraph=True)
        steps = [gradients(model, seed=10 * step + rank) for step in range(2)]
        found.append([grad.full_tensor() for step in steps for grad in step])
    for one, other in zip(*found, strict=True):
        torch.testing.assert_close(one, other, rtol=1e-5, atol=1e-6)


@pytest.mark.slow
def test_under_fsdp2_codes_are_gathered_for_compiled_layers() -> None:
    in_ranks(sharded)
