"""The monitor in real Axolotl runs on the CPU: in the log, through a resume, in loggers, and off."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch

pytest.importorskip("axolotl.cli")  # sets up logging, and would take away a handler that was there before

from axolotl_bitnet.run_folder import MONITOR_FILE
from axolotl_bitnet.training.monitor import callback as monitor_module
from axolotl_bitnet.training.monitor.figures import observe
from support.methods import save_base, settings_of
from support.runs import Run, config, train

pytestmark = pytest.mark.slow

RUN: dict[str, Any] = {"max_steps": 4, "save_steps": 2, "save_strategy": "steps", "bitnet": {}}


@pytest.fixture(scope="module")
def base(tmp_path_factory: pytest.TempPathFactory, tiny_model: Callable[..., torch.nn.Module]) -> Path:
    torch.manual_seed(5)
    return save_base(tiny_model, tmp_path_factory.mktemp("base"))


@pytest.fixture(scope="module")
def whole(tmp_path_factory: pytest.TempPathFactory, base: Path) -> tuple[Path, Run]:
    folder = tmp_path_factory.mktemp("whole")
    return folder, train(config(folder, base, **RUN, use_tensorboard=True))


def test_every_logged_step_has_the_figures_beside_its_loss(whole: tuple[Path, Run]) -> None:
    folder, run = whole
    state = json.loads((folder / "out" / "checkpoint-4" / "trainer_state.json").read_text())
    for history in (run.trainer.state.log_history, state["log_history"]):
        entries = [entry for entry in history if "loss" in entry]
        assert [entry["step"] for entry in entries] == [1, 2, 3, 4]
        assert all(0 < entry["bitnet/flips"] < 0.5 and 0.1 < entry["bitnet/zeros"] < 0.6 for entry in entries)
        assert all("bitnet/scale_drift/gate_proj" in entry for entry in entries)
        assert entries[-1]["bitnet/flips_total"] > entries[0]["bitnet/flips_total"]
        assert not any("bitnet/flips" in entry for entry in history if "loss" not in entry)
        timed = ["bitnet/tokens_per_second" in entry for entry in entries]
        assert timed == [False, True, False, True]  # not the first step, nor the one with a save before it


def test_the_file_is_of_the_model_that_was_saved(whole: tuple[Path, Run]) -> None:
    folder, run = whole
    found = json.loads((folder / "out" / MONITOR_FILE).read_text())
    seen = observe(run.model)
    assert found["step"] == 4 and list(found["layers"]) == list(seen.layers)
    for name, view in seen.layers.items():
        assert found["layers"][name]["scale"] == pytest.approx(view.scale, rel=1e-5)
        assert found["layers"][name]["zeros"] == pytest.approx(view.zeros, rel=1e-5)
        assert found["layers"][name]["scale_start"] != found["layers"][name]["scale"]


def test_tensorboard_has_them_too(whole: tuple[Path, Run]) -> None:
    accumulator = pytest.importorskip("tensorboard.backend.event_processing.event_accumulator")
    (events,) = {path.parent for path in whole[0].rglob("events.out.tfevents.*")}
    tags = accumulator.EventAccumulator(str(events))
    tags.Reload()
    names = [tag for tag in tags.Tags()["scalars"] if "bitnet/flips_total" in tag]
    assert len(names) == 1 and len(tags.Scalars(names[0])) == 4


def test_a_resumed_run_counts_from_the_start_of_the_first(
    whole: tuple[Path, Run], base: Path, tmp_path: Path
) -> None:
    folder, run = whole
    keys = RUN | {"resume_from_checkpoint": str(folder / "out" / "checkpoint-2")}
    resumed = train(config(tmp_path, base, **keys))
    for key in ("bitnet/flips_total", "bitnet/flips", "bitnet/scale_drift", "bitnet/zeros"):
        assert resumed.logged(key) == run.logged(key), key
    first, second = (json.loads((path / "out" / MONITOR_FILE).read_text()) for path in (folder, tmp_path))
    assert first == second


def test_it_changes_nothing_and_can_be_off(whole: tuple[Path, Run], base: Path, tmp_path: Path) -> None:
    run = train(config(tmp_path, base, **(RUN | {"bitnet": {"monitor": False}})))
    assert run.losses == whole[1].losses
    assert not any("bitnet/flips" in entry for entry in run.trainer.state.log_history)
    assert not (tmp_path / "out" / MONITOR_FILE).exists()
    for one, other in zip(run.model.parameters(), whole[1].model.parameters(), strict=True):
        assert torch.equal(one, other)


@pytest.mark.parametrize("method", ["dpo", "grpo"])
def test_preference_methods_log_the_policys_figures(method: str, base: Path, tmp_path: Path) -> None:
    run = train(settings_of(method, tmp_path, base, max_steps=3))
    assert len(run.logged("bitnet/flips")) == 3
    total = observe(run.model)
    assert run.logged("bitnet/zeros")[-1] == pytest.approx(total.share("zeros"), rel=1e-3)


def test_a_rate_that_moves_nothing_is_said_before_training_and_after_ten_steps(
    base: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    lines: list[str] = []
    for name in ("info", "warn"):
        monkeypatch.setattr(monitor_module, name, lines.append)
    run = train(config(tmp_path, base, learning_rate=1e-12, max_steps=12))
    assert run.logged("bitnet/frozen")[-1] > 0.9 and set(run.logged("bitnet/flips_total")) == {0}
    before, after = lines
    assert "at a learning rate of 1e-12, 0." in before and "after 10 steps 0 of their codes" in after
