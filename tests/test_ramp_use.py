"""The ramp in real Axolotl runs on the CPU: what is logged, resumed, refused and packed."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch

pytest.importorskip("axolotl.cli")  # sets up logging, and would take away a handler that was there before

from transformers import TrainerCallback

from axolotl_bitnet.formats.export import pack_checkpoint
from axolotl_bitnet.plugin.resume import ResumeError
from axolotl_bitnet.storage.atomic import CheckpointError
from axolotl_bitnet.training.ramp import RampSchedule
from support.methods import save_base, settings_of
from support.runs import Run, config, preference, train

RUN: dict[str, Any] = {
    "max_steps": 6,
    "eval_steps": 2,
    "save_steps": 2,
    "save_strategy": "steps",
    "val_set_size": 0.2,
    "bitnet": {"ramp_steps": 4},
}


@pytest.fixture(scope="module")
def base(tmp_path_factory: pytest.TempPathFactory, tiny_model: Callable[..., torch.nn.Module]) -> Path:
    torch.manual_seed(5)
    return save_base(tiny_model, tmp_path_factory.mktemp("base"))


@pytest.fixture(scope="module")
def whole(tmp_path_factory: pytest.TempPathFactory, base: Path) -> tuple[Path, Run]:
    folder = tmp_path_factory.mktemp("whole")
    return folder, train(config(folder, base, **RUN))


@pytest.mark.slow
def test_a_run_ends_ternary_and_logs_lambda_and_both_losses(whole: tuple[Path, Run]) -> None:
    folder, run = whole
    assert run.logged("bitnet/ramp") == [0, 0.25, 0.5, 0.75, 1, 1]
    evaluated = {entry["step"]: entry for entry in run.trainer.state.log_history if "eval_loss" in entry}
    assert {2, 4, 6} <= evaluated.keys()  # and 0, where this Axolotl evaluates before the first step
    for step, entry in evaluated.items():
        assert (entry["eval_ternary_loss"] == entry["eval_loss"]) == (step == 6)  # lambda is 1 there
    record = json.loads((folder / "out" / "bitnet.json").read_text())
    assert record["artifacts"]["packed"]["verified"] is True
    assert "ramp" not in json.loads((folder / "out" / "config.json").read_text())["axolotl_bitnet"]


@pytest.mark.slow
def test_a_checkpoint_on_the_way_is_not_packed_and_one_after_it_is(
    whole: tuple[Path, Run], tmp_path: Path
) -> None:
    out = whole[0] / "out"
    for step, value in ((2, "0.25"), (4, "0.75")):
        with pytest.raises(CheckpointError, match=rf"checkpoint-{step}.*lambda = {value} .*resume"):
            pack_checkpoint(out / f"checkpoint-{step}", tmp_path / "packed")
    pack_checkpoint(out / "checkpoint-6", tmp_path / "packed")


@pytest.mark.slow
def test_resumed_within_the_ramp_it_is_the_uninterrupted_run(
    whole: tuple[Path, Run], base: Path, tmp_path: Path
) -> None:
    folder, run = whole
    keys = RUN | {"resume_from_checkpoint": str(folder / "out" / "checkpoint-2")}
    resumed = train(config(tmp_path, base, **keys))
    assert resumed.logged("bitnet/ramp") == run.logged("bitnet/ramp")
    assert resumed.losses == run.losses
    for (name, one), other in zip(run.model.named_parameters(), resumed.model.parameters(), strict=True):
        assert torch.equal(one, other), name


@pytest.mark.slow
def test_another_ramp_is_not_resumed(whole: tuple[Path, Run], base: Path, tmp_path: Path) -> None:
    keys = RUN | {"resume_from_checkpoint": str(whole[0] / "out" / "checkpoint-2"), "bitnet": {}}
    with pytest.raises(ResumeError, match=r"ramp_steps was 4 and is now 0 .*would jump"):
        train(config(tmp_path, base, **keys))


@pytest.mark.slow
def test_a_run_that_stops_within_the_ramp_keeps_its_latents_and_is_not_packed(
    base: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    original = RampSchedule.on_step_begin

    def stop(self: TrainerCallback, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        original(self, args, state, control, **kwargs)
        control.should_training_stop = state.global_step == 2

    monkeypatch.setattr(RampSchedule, "on_step_begin", stop)
    keys = {"max_steps": 6, "bitnet": {"ramp_steps": 4}}
    with pytest.raises(CheckpointError, match=r"lambda = 0.5 when this was saved.*more steps"):
        train(config(tmp_path, base, **keys))
    assert (tmp_path / "out" / "model.safetensors").exists()
    assert not (tmp_path / "out" / "packed").exists()


@pytest.mark.slow
def test_the_best_model_is_one_from_after_the_ramp(base: Path, tmp_path: Path) -> None:
    """Evaluations at small lambda are of a denser, better model, which is not what ships."""
    keys = RUN | {"load_best_model_at_end": True, "early_stopping_patience": 1, "learning_rate": 1e-9}
    run = train(config(tmp_path, base, **keys))
    assert run.trainer.state.global_step == 6
    assert run.trainer.state.best_model_checkpoint.endswith("checkpoint-6")


@pytest.mark.parametrize(
    "keys, words",
    [
        ({"max_steps": 4}, r"ramp_steps: 4` and a run of 4 steps"),
        ({"max_steps": None, "num_epochs": 1, "micro_batch_size": 1000}, r"a run of 1 steps"),
    ],
    ids=["max_steps", "epochs"],
)
def test_a_run_shorter_than_its_ramp_is_refused(
    base: Path, tmp_path: Path, keys: dict[str, Any], words: str
) -> None:
    with pytest.raises(ValueError, match=words):
        train(config(tmp_path, base, **({"bitnet": {"ramp_steps": 4}} | keys)))
    assert not (tmp_path / "out" / "model.safetensors").exists()


def test_a_reference_model_is_refused(base: Path, tmp_path: Path) -> None:
    with pytest.raises(ValueError, match=r"ramp_steps. with .rl: dpo.*reference"):
        train(preference(tmp_path, base, max_steps=8, bitnet={"ramp_steps": 4}))


@pytest.mark.slow
def test_without_a_reference_it_trains(base: Path, tmp_path: Path) -> None:
    run = train(settings_of("orpo", tmp_path, base, max_steps=4, bitnet={"ramp_steps": 2}))
    assert run.logged("bitnet/ramp") == [0, 0.5, 1, 1]
    assert (tmp_path / "out" / "packed").exists()
