"""The ramp: dense at lambda 0, ternary at 1, straight through in between; and what must step aside for it."""

from __future__ import annotations

import copy
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from torch import Tensor, nn

from axolotl_bitnet import ops
from axolotl_bitnet.formats.export import pack_checkpoint
from axolotl_bitnet.layers.bitlinear import BitLinear
from axolotl_bitnet.layers.weight_codes import weights_unchanged
from axolotl_bitnet.model.convert import convert_to_bitlinear
from axolotl_bitnet.model.entry import CONFIG_KEY
from axolotl_bitnet.storage.atomic import CheckpointError
from axolotl_bitnet.training.ramp import RampSchedule, fully_ternary, lambda_at, ramping, set_ramp
from support.layers import run
from support.marks import slow_but

Model = Callable[..., nn.Module]
IDS = torch.arange(3, 35).view(2, 16)


def loss(model: nn.Module) -> Tensor:
    return model(IDS, labels=IDS).loss


def gradients(model: nn.Module) -> dict[str, Tensor]:
    model.zero_grad()
    loss(model).backward()
    return {name: parameter.grad.clone() for name, parameter in model.named_parameters()}


@pytest.mark.parametrize("shape", [(24,), (5, 24), (2, 3, 24), (0, 24)], ids=str)
@pytest.mark.parametrize("bias", [False, True])
@pytest.mark.parametrize("value", [0.0, 0.3, 0.85])
def test_a_layer_against_the_formula(shape: tuple[int, ...], bias: bool, value: float) -> None:
    layer, x = BitLinear(24, 13, bias=bias), torch.randn(shape)
    set_ramp(layer, value)
    y, dx, dy = run(layer, x)
    w = layer.weight.detach().double()
    codes, s, _ = ops.ternarize.plain(layer.weight)
    codes_x, r = ops.quantize_activations.plain(x, x.dtype)
    mixed_w = (1 - value) * w + value * codes.double() / s.double()
    mixed_x = (1 - value) * x.double() + value * codes_x.double() / r.double()
    expected = mixed_x @ mixed_w.t() + (layer.bias.detach().double() if bias else 0)
    rows, rows_x = dy.double().reshape(-1, 13), mixed_x.reshape(-1, 24)
    torch.testing.assert_close(y.double(), expected, atol=1e-5, rtol=1e-5)
    torch.testing.assert_close(dx.double(), dy.double() @ mixed_w, atol=1e-5, rtol=1e-5)
    torch.testing.assert_close(layer.weight.grad.double(), rows.t() @ rows_x, atol=1e-5, rtol=1e-5)
    if bias:
        torch.testing.assert_close(layer.bias.grad.double(), rows.sum(0), atol=1e-5, rtol=1e-5)


@pytest.mark.parametrize("family", slow_but(1, ["Llama", "Qwen3", "Gemma2"]))
def test_at_0_a_model_is_the_dense_one_and_at_1_exactly_the_ternary_one(
    tiny_model: Model, family: str
) -> None:
    dense = tiny_model(family)
    ternary = copy.deepcopy(dense)
    names = convert_to_bitlinear(ternary)
    before, straight = loss(ternary), gradients(ternary)
    assert set_ramp(ternary, 0.0) == len(names) and ramping(ternary)
    torch.testing.assert_close(loss(ternary), loss(dense), atol=1e-6, rtol=1e-6)
    for name, gradient in gradients(dense).items():
        torch.testing.assert_close(gradients(ternary)[name], gradient, atol=1e-5, rtol=1e-4)
    set_ramp(ternary, 0.5)
    assert not torch.allclose(loss(ternary), before, rtol=1e-6)
    set_ramp(ternary, 1.0)
    assert not ramping(ternary) and torch.equal(loss(ternary), before)
    for name, gradient in gradients(ternary).items():
        assert torch.equal(gradient, straight[name])


@pytest.mark.parametrize("latents", [torch.float32, torch.bfloat16])
def test_under_autocast_it_computes_as_a_dense_layer_does(latents: torch.dtype) -> None:
    layer, x = BitLinear(24, 13, dtype=latents), torch.randn(6, 24, dtype=latents)
    dense = nn.Linear(24, 13, dtype=latents)
    dense.load_state_dict(layer.state_dict())
    set_ramp(layer, 0.0)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        y, expected = layer(x), dense(x)
    assert y.dtype == torch.bfloat16 and torch.equal(y, expected)
    y.float().sum().backward()
    assert layer.weight.grad.dtype == latents


def test_near_1_it_comes_close_to_the_ternary_layer() -> None:
    layer, x = BitLinear(64, 32, bias=False), torch.randn(9, 64)
    ternary = layer(x)
    set_ramp(layer, 1 - 1e-6)
    torch.testing.assert_close(layer(x), ternary, atol=1e-4, rtol=1e-4)


def test_checkpointing_accumulation_and_kept_codes_change_nothing(tiny_model: Model) -> None:
    model = tiny_model("Llama").train()
    convert_to_bitlinear(model)
    set_ramp(model, 0.4)
    expected = gradients(model)
    model.gradient_checkpointing_enable({"use_reentrant": False})
    with weights_unchanged():
        found = gradients(model)
        loss(model).backward()
    for name, parameter in model.named_parameters():
        torch.testing.assert_close(found[name], expected[name], atol=1e-7, rtol=1e-5)
        torch.testing.assert_close(parameter.grad, 2 * expected[name], atol=1e-7, rtol=1e-5)


@pytest.mark.slow
def test_a_compiled_model_is_compiled_once_for_the_ramp_and_once_after_it(tiny_model: Model) -> None:
    torch._dynamo.reset()
    model = tiny_model("Llama", num_hidden_layers=1)
    convert_to_bitlinear(model)
    eager = copy.deepcopy(model)
    frames: list[int] = []

    def backend(graph: torch.fx.GraphModule, inputs: list[Tensor]) -> Callable[..., object]:
        frames.append(len(inputs))
        return graph.forward

    compiled = torch.compile(model.model, backend=backend, fullgraph=True, dynamic=False)
    counts = []
    for step in range(7):
        for one in (model, eager):
            set_ramp(one, lambda_at(step, 4))
        found, expected = compiled(IDS).last_hidden_state, eager.model(IDS).last_hidden_state
        torch.testing.assert_close(found, expected, atol=1e-5, rtol=1e-5)
        found.sum().backward()
        counts.append(len(frames))
    assert counts == [1, 1, 1, 1, 2, 2, 2]
    set_ramp(model, 0.5)
    with fully_ternary(model):
        compiled(IDS)
    assert len(frames) == 2  # both are there
    torch._dynamo.reset()


def test_lambda_reaches_copied_and_wrapped_models(tiny_model: Model) -> None:
    model = tiny_model("Llama")
    convert_to_bitlinear(model)
    wrapped = nn.ModuleDict({"module": model})
    set_ramp(wrapped, 0.25)
    assert model.config.axolotl_bitnet["ramp"] == 0.25
    other = copy.deepcopy(model)
    set_ramp(other, 1)
    assert ramping(model) and not ramping(other)
    assert "ramp" in model.config.axolotl_bitnet and "ramp" not in other.config.axolotl_bitnet
    assert set(other.state_dict()) == set(model.state_dict())


def test_lambda_between_a_forward_and_its_backward_fails_loudly() -> None:
    layer = BitLinear(8, 4)
    set_ramp(layer, 0.5)
    y = layer(torch.randn(3, 8)).sum()
    set_ramp(layer, 0.6)
    with pytest.raises(RuntimeError, match="inplace operation"):
        y.backward()


@pytest.mark.parametrize("value", [-0.1, 1.1, float("nan")])
def test_other_values_are_refused(value: float) -> None:
    with pytest.raises(ValueError, match=r"from 0 .dense. to 1"):
        set_ramp(BitLinear(8, 4), value)


def test_fully_ternary_puts_everything_back(tiny_model: Model) -> None:
    model = tiny_model("Llama")
    convert_to_bitlinear(model)
    ternary = loss(model)
    set_ramp(model, 0.5)
    mixed, held = loss(model), model.model.layers[0].mlp.up_proj.ramp
    with pytest.raises(KeyError), fully_ternary(model):
        assert torch.equal(loss(model), ternary)
        raise KeyError
    assert torch.equal(loss(model), mixed) and model.model.layers[0].mlp.up_proj.ramp is held
    assert model.config.axolotl_bitnet["ramp"] == 0.5


class _State:
    def __init__(self, global_step: int, max_steps: int) -> None:
        self.global_step, self.max_steps = global_step, max_steps


def test_the_schedule_follows_the_finished_steps_and_resumes() -> None:
    layer, schedule = BitLinear(8, 4), RampSchedule(4)
    schedule.on_train_begin(None, _State(0, 9), None, model=layer)
    seen = []
    for step in range(6):
        schedule.on_step_begin(None, _State(step, 9), None, model=layer)
        seen.append(1.0 if layer.ramp is None else float(layer.ramp))
    assert seen == [0, 0.25, 0.5, 0.75, 1, 1]
    resumed = BitLinear(8, 4)
    RampSchedule(4).on_train_begin(None, _State(3, 9), None, model=resumed)
    assert float(resumed.ramp) == 0.75
    with pytest.raises(ValueError, match=r"ramp_steps: 4.*a run of 4 steps"):
        RampSchedule(4).on_train_begin(None, _State(0, 4), None, model=layer)


def test_what_is_saved_on_the_way_is_not_packed(tiny_model: Model, tmp_path: Path) -> None:
    model = tiny_model("Llama")
    convert_to_bitlinear(model)
    set_ramp(model, 0.75)
    model.save_pretrained(tmp_path / "on the way")
    with pytest.raises(CheckpointError, match=r"on the way.*lambda = 0.75.*resume.*more steps"):
        pack_checkpoint(tmp_path / "on the way", tmp_path / "packed")
    assert not (tmp_path / "packed").exists()
    set_ramp(model, 1)
    model.save_pretrained(tmp_path / "done")
    pack_checkpoint(tmp_path / "done", tmp_path / "packed")
    assert "ramp" not in getattr(model.config, CONFIG_KEY)
