"""Losses that are no numbers: the log has what the Trainer's own filter gives, and nobody waits for a GPU."""

from __future__ import annotations

import math
from pathlib import Path
from typing import Any

import pytest
import torch
import transformers
from torch import nn
from torch.utils.data import Dataset

from axolotl_bitnet.training.trainer_loss import filter_losses


class Line(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.ones(()))

    def forward(self, x: torch.Tensor, labels: torch.Tensor) -> dict[str, torch.Tensor]:
        # a loss that is no number, and gradients that are
        return {"loss": (self.weight * 0 + labels).mean() + x.mean()}


class Losses(Dataset[dict[str, float]]):
    def __init__(self, losses: list[float]) -> None:
        self.losses = losses

    def __len__(self) -> int:
        return len(self.losses)

    def __getitem__(self, index: int) -> dict[str, float]:
        return {"x": self.losses[index], "labels": 0.0}


def trainer(folder: Path, losses: list[float], **settings: Any) -> transformers.Trainer:
    settings = {"logging_steps": 2, "gradient_accumulation_steps": 2, "learning_rate": 0.0} | settings
    arguments = transformers.TrainingArguments(
        str(folder), per_device_train_batch_size=1, num_train_epochs=1, save_strategy="no", report_to=[],
        use_cpu=True, disable_tqdm=True, train_sampling_strategy="sequential", **settings,
    )  # fmt: skip
    return transformers.Trainer(Line(), arguments, train_dataset=Losses(losses))


def logged(one: transformers.Trainer) -> list[float]:
    one.train()
    return [entry["loss"] for entry in one.state.log_history if "loss" in entry]


LOSSES = [1.0, 2.0, 3.0, math.nan, 5.0, math.inf, 7.0, 8.0, -math.inf, 1.0, 2.0, 3.0]


@pytest.mark.parametrize("every", [1, 2, 3])
def test_the_log_is_the_trainers_own(tmp_path: Path, every: int) -> None:
    expected = logged(trainer(tmp_path, LOSSES, logging_steps=every))
    ours = trainer(tmp_path, LOSSES, logging_steps=every)
    assert filter_losses(ours)
    assert logged(ours) == expected and all(map(math.isfinite, expected))


def test_without_a_filter_there_is_none(tmp_path: Path) -> None:
    ours = trainer(tmp_path, LOSSES, logging_nan_inf_filter=False)
    assert not filter_losses(ours)
    assert not all(map(math.isfinite, logged(ours)))


def test_a_trainer_that_is_not_known_filters_as_it_does(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    ours = trainer(tmp_path, LOSSES)
    monkeypatch.setattr(transformers.Trainer, "_run_epoch", lambda self: None)
    assert not filter_losses(ours) and ours.args.logging_nan_inf_filter
    monkeypatch.delattr(transformers.Trainer, "_run_epoch")
    assert not filter_losses(ours) and ours.args.logging_nan_inf_filter


@pytest.mark.parametrize("filtered", [True, False])
def test_no_number_is_read_back(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, filtered: bool) -> None:
    """``bool`` of a loss would be a wait for the GPU. The Trainer's own filter shows that this sees it."""
    ours = trainer(tmp_path, LOSSES, logging_steps=100, max_grad_norm=0)
    if filtered:
        filter_losses(ours)
    step, inside = ours.training_step, []

    def watched(*args: Any, **kwargs: Any) -> Any:
        loss = step(*args, **kwargs)
        monkeypatch.setattr(torch.Tensor, "__bool__", lambda self: inside.append(self) or False)
        return loss

    monkeypatch.setattr(ours, "training_step", watched)
    ours.train()
    assert bool(inside) is not filtered
