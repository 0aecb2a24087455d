"""The study's own loop takes the steps that the model's forward and torch's AdamW take."""

from __future__ import annotations

import copy
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file
from torch import nn

EXPERIMENTS = Path(__file__).resolve().parents[1] / "experiments"


@pytest.fixture
def study(monkeypatch: pytest.MonkeyPatch) -> Any:
    monkeypatch.syspath_prepend(str(EXPERIMENTS))
    import study_data
    import study_design
    import study_step
    import study_train

    yield type("study", (), dict(data=study_data, design=study_design, step=study_step, train=study_train))
    for name in ("study_data", "study_design", "study_step", "study_train", "shared"):
        sys.modules.pop(name, None)


def _batches(study: Any, vocabulary: int) -> Any:
    stream = torch.randint(vocabulary, (400,))
    windows = (stream[:64].view(4, 16), stream[1:65].view(4, 16))
    return study.data.Batches((stream[:-1], stream[1:]), [windows], batch=2, length=16)


@pytest.mark.parametrize("kind", ["dense", "ternary"])
@pytest.mark.slow
def test_a_run_is_plain_training(
    study: Any, tiny_model: Callable[..., nn.Module], monkeypatch: Any, tmp_path: Path, kind: str
) -> None:
    """Losses and weights of a loop over the model's own forward, with separate parameters.

    Ternary for two steps only: after that a last bit of a sum may have tipped a code.
    """
    from axolotl_bitnet import convert_to_bitlinear

    monkeypatch.setattr(study.train, "LOG_EVERY", 1)
    base = tiny_model("Llama")
    steps = 6 if kind == "dense" else 2
    batches = _batches(study, base.config.vocab_size)
    setting = study.train.Setting(model=kind, lr=1e-3, steps=steps, weight_decay=0.5)
    saved = tmp_path / "weights.safetensors"
    _, curve = study.train.train(copy.deepcopy(base), setting, batches, "eager", None, saved)

    model = copy.deepcopy(base)
    if kind == "ternary":
        convert_to_bitlinear(model)
    decays = {True: 0.5, False: 0.0}
    groups = [
        {
            "params": [parameter for parameter in model.parameters() if (parameter.dim() > 1) == matrix],
            "weight_decay": decay,
            "base_lr": 1e-3,
        }
        for matrix, decay in decays.items()
    ]
    optimizer = torch.optim.AdamW(groups, lr=1e-3, betas=(0.9, 0.95))
    ids, labels = batches.draw(steps, seed=1)
    for step in range(steps):
        study.train.set_rate(optimizer, step, steps)
        logits = model(ids[step]).logits
        loss = nn.functional.cross_entropy(logits.flatten(0, 1), labels[step].flatten())
        loss.backward()
        nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        optimizer.step()
        optimizer.zero_grad()
        assert curve[step]["loss"] == pytest.approx(loss.item(), rel=1e-5)
    assert (curve[-1]["flips_start"] > 0) == (kind == "ternary")
    if kind == "dense":
        weights = study.step.Flat(model, torch.float32).tensors
        for name, tensor in load_file(saved).items():
            torch.testing.assert_close(tensor, weights[name].data, atol=1e-6, rtol=0)


def test_dpo_starts_at_zero(study: Any, tiny_model: Callable[..., nn.Module]) -> None:
    from axolotl_bitnet import convert_to_bitlinear

    model = tiny_model("Llama")
    convert_to_bitlinear(model)
    ids = torch.randint(model.config.vocab_size, (4, 16))
    labels = ids.roll(-1, 1)
    labels[:, :5] = study.data.IGNORED
    loss, margins = study.step.dpo_loss(
        study.step.plain_token_losses, model, copy.deepcopy(model), ids, labels
    )
    assert torch.equal(margins, torch.zeros(2)) and float(loss) == pytest.approx(0.693147, abs=1e-6)


def test_a_stage_is_decided_from_the_results(study: Any) -> None:
    setting = study.train.Setting()
    rows = []
    for each in study.design.rates([], setting):
        row = {name: str(value) for name, value in vars(each).items()}
        best = {"float32": 1e-3, "bfloat16": 2e-3, "bfloat16-sr": 5e-4}[each.latents]
        loss = 3 + abs(each.lr - best) / best + (each.lr < best) * 0.1
        rows.append(row | {"eval_loss": str(loss), "error": ""})
    assert [each.lr for each in study.design.best_and_neighbour(rows, setting)] == [1e-3, 5e-4]
    factors = study.design.factors(rows, setting)
    assert {each.lr for each in factors} == {1e-3, 5e-4} and {each.ramp for each in factors} == {
        0.0,
        0.1,
        0.5,
    }
    assert len(set(factors)) == len(factors) == 12
    started = study.design.trained(rows, setting)[0]
    assert (started.lr, started.latents) == (1e-3, "float32")
    assert {each.seed for each in study.design.seeds(rows, setting)} == {2, 3}
