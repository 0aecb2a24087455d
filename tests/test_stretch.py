"""The stretched start: alpha and k against a search of their own, the way back, and the ramp's beginning."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from torch import nn

from axolotl_bitnet import convert_to_bitlinear, ops
from axolotl_bitnet.layers.bitlinear import BitLinear, ramped_linear
from axolotl_bitnet.layers.stretch import stretched, unstretched
from axolotl_bitnet.training.ramp import set_ramp
from axolotl_bitnet.training.stretch import (
    FACTORS,
    Stretch,
    StretchError,
    fit,
    remember,
    stretch_latents,
    windows,
)
from support.sharded import in_ranks

SHAPES = [(1, 7), (24, 100), (64, 33)]


@pytest.mark.parametrize("shape", SHAPES)
@pytest.mark.parametrize("heavy", [False, True])
def test_codes_and_scale_are_those_of_alpha(shape: tuple[int, int], heavy: bool) -> None:
    weight = torch.randn(shape) ** (3 if heavy else 1) * 0.02
    alpha, k = fit(weight, torch.rand(shape[1])) or pytest.fail("no fit")
    latents = stretched(weight, alpha, k)
    codes, _, g = ops.ternarize(latents)
    assert float(g) == pytest.approx(float(alpha), rel=5e-3)  # of bfloat16 latents
    wanted = (weight / alpha).round().clamp(-1, 1)
    border = ((weight.abs() - alpha / 2).abs() < 0.01 * alpha).sum()
    assert (codes != wanted).sum() <= border
    torch.testing.assert_close(unstretched(latents, torch.stack([alpha, k])), weight, rtol=1e-5, atol=1e-8)


def test_alpha_has_the_least_error_of_the_grid() -> None:
    weight, squares = torch.randn(40, 60), torch.rand(60) ** 4
    alpha, _ = fit(weight, squares) or pytest.fail("no fit")

    def error(scale: float) -> float:
        left = weight - (weight / scale).round().clamp(-1, 1) * scale
        return float((left.double() ** 2 @ squares.double()).sum())

    g = float(weight.abs().mean())
    assert error(float(alpha)) <= min(error(factor * g) for factor in FACTORS) * (1 + 1e-6)
    assert error(float(alpha)) < error(g)


def test_zeros_are_left_alone() -> None:
    assert fit(torch.zeros(4, 8), torch.ones(8)) is None


def test_gradients_of_a_ramp_from_stretched_latents_go_straight_through() -> None:
    weight, x = torch.randn(8, 12), torch.randn(5, 12)
    alpha, k = fit(weight, torch.ones(12)) or pytest.fail("no fit")
    latents = stretched(weight, alpha, k).requires_grad_()
    y = ramped_linear(x, latents, None, torch.tensor(0.0), torch.stack([alpha, k]))
    torch.testing.assert_close(y, x @ weight.t(), rtol=1e-4, atol=1e-5)
    y.sum().backward()
    torch.testing.assert_close(latents.grad, x.sum(0).expand(8, 12), rtol=1e-5, atol=1e-5)


def test_a_model_begins_a_ramp_at_its_dense_original(tiny_model: Callable[..., nn.Module]) -> None:
    dense = tiny_model("Llama")
    student = tiny_model("Llama")
    student.load_state_dict(dense.state_dict())
    convert_to_bitlinear(student)
    ids = [torch.randint(3, 128, (1, 20)) for _ in range(3)]
    student.train()
    fits = stretch_latents(student, ids)
    assert len(fits) == 14 and student.training
    assert not any(layer.ramp is not None for layer in student.modules() if isinstance(layer, BitLinear))
    remember(student, fits)
    set_ramp(student, 0.0)
    for model in (dense, student):
        model.eval()
    with torch.no_grad():
        torch.testing.assert_close(student(ids[0]).logits, dense(ids[0]).logits, rtol=1e-3, atol=1e-4)
        set_ramp(student, 1.0)
        stretched_loss = float((student(ids[0]).logits - dense(ids[0]).logits).norm())
        student.load_state_dict(dense.state_dict())
        assert stretched_loss < float((student(ids[0]).logits - dense(ids[0]).logits).norm())


def test_windows_are_the_datasets_first_tokens() -> None:
    rows = ({"input_ids": list(range(10 * i, 10 * i + 10))} for i in range(100))
    found = list(windows(rows, length=16, tokens=40))
    assert [ids.shape for ids in found] == [(1, 16)] * 3
    assert torch.cat(found, 1).flatten().tolist() == list(range(48))
    assert [ids.shape[1] for ids in windows([{"input_ids": [1, 2, 3]}], 16)] == [3]
    with pytest.raises(StretchError, match="reads `input_ids`"):
        list(windows([{"text": "words"}], 16))


def test_a_resumed_run_only_remembers(tiny_model: Callable[..., nn.Module]) -> None:
    student = tiny_model("Llama")
    convert_to_bitlinear(student)
    before = [p.clone() for p in student.parameters()]
    name = "model.layers.0.mlp.up_proj"
    record = {"stretch": {"base": "x", "layers": {name: [0.5, 2.0]}}}
    Stretch(None, 16, record).on_train_begin(SimpleNamespace(), None, None, model=student)
    assert all(torch.equal(p, q) for p, q in zip(student.parameters(), before, strict=True))
    assert student.get_submodule(name).stretch.tolist() == [0.5, 2.0]


def test_no_data_is_refused(tiny_model: Callable[..., nn.Module]) -> None:
    student = tiny_model("Llama")
    convert_to_bitlinear(student)
    with pytest.raises(StretchError, match="training data is empty"):
        stretch_latents(student, [])


# Ranks


def _student(**_: Any) -> Any:
    from transformers import LlamaConfig, LlamaForCausalLM

    torch.manual_seed(3)
    config = LlamaConfig(
        vocab_size=64,
        hidden_size=32,
        intermediate_size=52,
        num_hidden_layers=2,
        num_attention_heads=2,
        num_key_value_heads=2,
    )
    model = LlamaForCausalLM(config)
    convert_to_bitlinear(model)
    return model


def _inputs() -> list[torch.Tensor]:
    return [torch.randint(64, (1, 9), generator=torch.Generator().manual_seed(i)) for i in range(3)]


def worker(rank: int, folder: str) -> None:
    from torch.distributed.fsdp import fully_shard

    model = _student()
    for layer in model.model.layers:
        fully_shard(layer)
    fully_shard(model)
    fits = stretch_latents(model, _inputs())
    weights = {name: p.full_tensor() for name, p in model.named_parameters()}
    torch.save((fits, weights), Path(folder) / f"{rank}.pt")


@pytest.mark.slow
def test_shards_are_stretched_as_the_whole_is(tmp_path: Path) -> None:
    in_ranks(worker, str(tmp_path))
    model = _student()
    fits = stretch_latents(model, _inputs())
    for rank in range(2):
        found, weights = torch.load(tmp_path / f"{rank}.pt")
        assert found.keys() == fits.keys()
        for name, pair in fits.items():
            assert found[name] == pytest.approx(pair, rel=1e-4)
        for name, weight in model.named_parameters():
            torch.testing.assert_close(weights[name], weight.detach(), rtol=1e-4, atol=1e-5)
