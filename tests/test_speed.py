"""Tokens per second and the share of the 8-bit peak, with a clock and a GPU of our own."""

from __future__ import annotations

from types import SimpleNamespace
from typing import Any

import pytest
import torch
from torch import nn

from axolotl_bitnet.layers.bitlinear import BitLinear
from axolotl_bitnet.training import speed
from axolotl_bitnet.training.speed import Speed, peak_of


@pytest.fixture
def clock(monkeypatch: pytest.MonkeyPatch) -> list[float]:
    now = [100.0]
    monkeypatch.setattr(speed, "time", SimpleNamespace(perf_counter=lambda: now[0]))
    return now


def started(monkeypatch: pytest.MonkeyPatch, gpu: str = "NVIDIA H100 80GB HBM3") -> tuple[Speed, Any]:
    trainer = SimpleNamespace(training_step=lambda model, inputs, items=None: len(inputs))
    monkeypatch.setattr(torch.cuda, "is_available", lambda: bool(gpu))
    monkeypatch.setattr(torch.cuda, "get_device_name", lambda: gpu)
    told = Speed(trainer)
    told.on_train_begin(None, None, None, model=nn.Sequential(BitLinear(32, 16), nn.Linear(8, 8)))
    return told, trainer


def step(trainer: Any, tokens: int) -> None:
    inputs = {"input_ids": torch.zeros(2, tokens // 2), "labels": torch.zeros(2, tokens // 2)}
    assert trainer.training_step(None, inputs, 3) == 2


def test_from_one_log_to_the_next(monkeypatch: pytest.MonkeyPatch, clock: list[float]) -> None:
    told, trainer = started(monkeypatch)
    step(trainer, 10)
    assert told.logs() == {}  # the first step compiles and allocates
    step(trainer, 6000)
    step(trainer, 2000)
    clock[0] += 1e-6
    share = 6 * 32 * 16 * 8000 / 1e-6 / 1979e12
    assert told.logs() == {
        "bitnet/tokens_per_second": pytest.approx(8e9),
        "bitnet/int8_peak": round(share, 4),
    }
    assert 0.01 < share < 1
    clock[0] += 1
    assert told.logs() == {}  # no token since


@pytest.mark.parametrize("event", ["on_evaluate", "on_save"])
def test_not_across_an_evaluation_or_a_save(
    monkeypatch: pytest.MonkeyPatch, clock: list[float], event: str
) -> None:
    told, trainer = started(monkeypatch)
    told.logs()
    getattr(told, event)(None, None, None)
    step(trainer, 10)
    clock[0] += 60
    assert told.logs() == {}
    step(trainer, 10)
    clock[0] += 2
    assert told.logs()["bitnet/tokens_per_second"] == 5


def test_gpus_that_are_not_in_the_table_and_batches_of_pairs(
    monkeypatch: pytest.MonkeyPatch, clock: list[float]
) -> None:
    told, trainer = started(monkeypatch, "NVIDIA GeForce GTX 1080")
    told.logs()
    step(trainer, 10)
    clock[0] += 1
    assert told.logs() == {"bitnet/tokens_per_second": 10}
    trainer.training_step(None, {"prompt_ids": torch.zeros(2, 5)})
    clock[0] += 1
    assert told.logs() == {}
    assert Speed(SimpleNamespace()).logs() == {}  # a trainer without training_step


def test_peaks() -> None:
    assert peak_of("NVIDIA H100 PCIe") == 1513e12 and peak_of("NVIDIA H100 80GB HBM3") == 1979e12
    assert peak_of("NVIDIA H200") == 1979e12 and peak_of("NVIDIA A100-SXM4-80GB") == 624e12
    assert peak_of("NVIDIA GeForce RTX 4090") == 661e12 and peak_of("") is None
