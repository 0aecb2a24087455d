"""Interrupted runs: resumed, they are the uninterrupted ones; what cannot be resumed is refused by name."""

from __future__ import annotations

import json
import logging
import os
import shutil
import signal
import subprocess
import sys
from collections.abc import Callable
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest
import torch

pytest.importorskip("axolotl.cli")  # sets up logging, and would take away a handler that was there before

from axolotl.utils.dict import DictDefault
from transformers import AutoTokenizer, Trainer, TrainerCallback

from axolotl_bitnet.formats.export import pack_checkpoint
from axolotl_bitnet.plugin import plugin as plugin_module
from axolotl_bitnet.plugin.args import BitNetConfig
from axolotl_bitnet.plugin.resume import ResumeError, recorded, refuse_other_run, settle
from axolotl_bitnet.run_folder import STATE
from axolotl_bitnet.storage.atomic import CheckpointError
from axolotl_bitnet.storage.safetensors_stream import INDEX
from axolotl_bitnet.storage.trainer_checkpoint import problems
from axolotl_bitnet.ternary import ternarize
from axolotl_bitnet.training.log import LOG
from axolotl_bitnet.verify.verify import verify_checkpoint
from support import TINY
from support.kills import kill_at_every_change
from support.runs import Run, config, preference, train

Build = Callable[..., torch.nn.Module]
Keys = dict[str, Any]

RUN: Keys = {
    "max_steps": 8,
    "save_strategy": "steps",
    "save_steps": 4,
    "gradient_accumulation_steps": 2,
    "lr_scheduler": "cosine",
    "warmup_steps": 2,
    "bitnet": {"learning_rate_multiplier": 3},
}


class Interrupted(Exception):
    pass


@dataclass
class InterruptAt(TrainerCallback):
    step: int

    def on_step_begin(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        if state.global_step == self.step:
            raise Interrupted


@pytest.fixture(scope="module")
def workplace(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tmp_path_factory.mktemp("resume")


@pytest.fixture(scope="module")
def bases(workplace: Path, tiny_model: Build) -> dict[str, Path]:
    """A random float32 Llama, and one that is dense ternary with zeros, which preflight rescales."""
    tokenizer = AutoTokenizer.from_pretrained(TINY / "model")
    vocabulary = -(-len(tokenizer) // 32) * 32
    torch.manual_seed(3)
    made = {}
    for name in ("latent", "dense ternary"):
        model = tiny_model("Llama", vocab_size=vocabulary)
        if name == "dense ternary":
            for key, parameter in model.named_parameters():
                if key.endswith("_proj.weight"):
                    codes, scale = ternarize(parameter.data)
                    parameter.data = codes / scale.float()
        made[name] = workplace / name
        model.save_pretrained(made[name])
        tokenizer.save_pretrained(made[name])
    return made


def settings(workplace: Path, out: str, base: Path, make: Callable[..., Keys] = config, **keys: Any) -> Keys:
    """A run's config; all runs share the prepared data."""
    places = {"output_dir": str(workplace / out), "dataset_prepared_path": str(workplace / "prepared")}
    return make(workplace, base, **(RUN | places | keys))


def interrupted(keys: Keys, step: int, monkeypatch: pytest.MonkeyPatch) -> None:
    original = plugin_module.BitNetPlugin.add_callbacks_post_trainer
    with monkeypatch.context() as patch:
        patch.setattr(
            plugin_module.BitNetPlugin,
            "add_callbacks_post_trainer",
            lambda self, cfg, trainer: [*original(self, cfg, trainer), InterruptAt(step)],
        )
        with pytest.raises(Interrupted):
            train(keys)


def fingerprint(out: str | Path) -> str:
    return json.loads((Path(out) / "bitnet.json").read_text())["fingerprint"]["digest"]


def assert_same(one: Run, other: Run) -> None:
    assert one.losses == other.losses and len(one.losses) == one.cfg.max_steps
    assert one.logged("learning_rate") == other.logged("learning_rate")
    for (name, value), (_, expected) in zip(
        one.model.state_dict().items(), other.model.state_dict().items(), strict=True
    ):
        assert value.dtype == expected.dtype and torch.equal(value, expected), name
    assert fingerprint(one.cfg.output_dir) == fingerprint(other.cfg.output_dir)
    assert verify_checkpoint(Path(one.cfg.output_dir) / "packed", one.cfg.output_dir).ok


@pytest.fixture(scope="module")
def whole_run(workplace: Path, bases: dict[str, Path]) -> Run:
    """Eight steps in one go, with checkpoints at 4 and 8."""
    return train(settings(workplace, "whole", bases["latent"]))


PACKED = {"sample_packing": True, "attn_implementation": "eager", "micro_batch_size": 16}
CASES: dict[str, Keys] = {
    "scope ternary, in the second epoch of packed samples": PACKED
    | {
        "max_steps": 12,
        "save_steps": 9,
        "bitnet": {"learning_rate_multiplier": 3, "learning_rate_scope": "ternary"},
    },
    "bf16 latents": {"load_as": torch.bfloat16, "bitnet": {"latent_dtype": "bfloat16"}},
    "bf16 latents, rounded stochastically": {
        "load_as": torch.bfloat16,
        "bitnet": {"latent_dtype": "bfloat16"},
        "optimizer": "adamw_torch_8bit",
        "optim_args": "bf16_stochastic_round=True",
        "adam_beta2": 0.95,
    },
    "float32 latents of a base loaded in bf16": {"load_as": torch.bfloat16},
    "a base that is rescaled": {"base": "dense ternary", "gradient_checkpointing": True},
    "dpo": {"make": preference, "gradient_accumulation_steps": 1},
}


@pytest.mark.slow
@pytest.mark.parametrize("case", CASES)
def test_resumed_is_uninterrupted_bit_for_bit(
    case: str, workplace: Path, bases: dict[str, Path], monkeypatch: pytest.MonkeyPatch
) -> None:
    keys = dict(CASES[case])
    base, make = bases[keys.pop("base", "latent")], keys.pop("make", config)
    if "stochastically" in case:
        pytest.importorskip("torchao")
        monkeypatch.setattr(torch, "compile", lambda function, **_: function)  # takes a minute
    if "load_as" in keys:
        load_as(keys.pop("load_as"), monkeypatch)
    name = case.replace(" ", "-")
    expected = train(settings(workplace, f"{name}/whole", base, make, **keys))
    parts = settings(workplace, f"{name}/parts", base, make, **keys)
    interrupted(parts, keys.get("save_steps", 4) + 2, monkeypatch)
    resumed = train(parts | {"auto_resume_from_checkpoints": True})
    assert_same(resumed, expected)
    weight = resumed.model.get_parameter("model.layers.0.mlp.up_proj.weight")
    assert weight.dtype == (torch.bfloat16 if case.startswith("bf16 latents") else torch.float32)
    if "float32 latents" in case:  # no one rounded them on the way
        assert not torch.equal(weight, weight.bfloat16().float())


def load_as(dtype: torch.dtype, monkeypatch: pytest.MonkeyPatch) -> None:
    """On a GPU ``bf16: true`` does this; on a CPU the Trainer refuses that key."""
    import axolotl.cli.config

    load_cfg = axolotl.cli.config.load_cfg

    def load(keys: Any) -> Any:
        cfg = load_cfg(keys)
        cfg.torch_dtype = dtype
        return cfg

    monkeypatch.setattr(axolotl.cli.config, "load_cfg", load)


@pytest.mark.slow
def test_killed_in_training_and_resumed_in_a_new_process(
    workplace: Path, bases: dict[str, Path], whole_run: Run
) -> None:
    keys = settings(workplace, "killed", bases["latent"])
    (workplace / "killed.json").write_text(json.dumps(keys))
    program = [sys.executable, str(Path(__file__)), str(workplace / "killed.json"), "6"]
    with (workplace / "killed.log").open("w") as log:  # a pipe would be held open by its orphans
        run = subprocess.Popen(program, stdout=log, stderr=log, start_new_session=True)
        assert run.wait(300) == -signal.SIGKILL, (workplace / "killed.log").read_text()[-2000:]
    with suppress(ProcessLookupError):
        os.killpg(run.pid, signal.SIGKILL)
    assert not (workplace / "killed" / "bitnet.json").exists()
    assert_same(train(keys | {"auto_resume_from_checkpoints": True}), whole_run)


@pytest.mark.slow
def test_a_finished_run_takes_no_step_more(workplace: Path, bases: dict[str, Path], whole_run: Run) -> None:
    """Killed in the final save or in packing: the next start does only that. No epoch ends there."""
    out = workplace / "once more"
    shutil.copytree(whole_run.cfg.output_dir, out)
    shutil.rmtree(out / "packed")
    (out / "bitnet.json").unlink()
    (out / "model.safetensors").write_bytes((out / "model.safetensors").read_bytes()[:9999])
    with pytest.raises(CheckpointError, match=r"once more/model.safetensors cannot be read"):
        pack_checkpoint(out, out / "packed")
    keys = settings(workplace, "once more", bases["latent"], auto_resume_from_checkpoints=True)
    assert_same(train(keys), whole_run)
    assert not (out / "checkpoint-9").exists()


# A checkpoint that is not whole


def damage_state(folder: Path) -> None:
    (folder / STATE).unlink()


def damage_weights(folder: Path) -> None:
    path = folder / "model.safetensors"
    path.write_bytes(path.read_bytes()[:-1])


def damage_optimizer(folder: Path) -> None:
    (folder / "optimizer.pt").unlink()


@pytest.fixture
def damaged(tmp_path: Path, whole_run: Run, request: pytest.FixtureRequest) -> Path:
    """The run's folder, its last checkpoint damaged."""
    out = tmp_path / "out"
    shutil.copytree(whole_run.cfg.output_dir, out)
    request.param(out / "checkpoint-8")
    return out


by_damage = pytest.mark.parametrize(
    "damaged", [damage_state, damage_weights, damage_optimizer], indirect=True, ids=lambda f: f.__name__
)


def resuming(out: Path, **keys: Any) -> DictDefault:
    return DictDefault({"output_dir": str(out)} | keys)


@by_damage
def test_auto_resume_passes_over_what_is_not_whole(damaged: Path) -> None:
    cfg = resuming(damaged, auto_resume_from_checkpoints=True)
    folder, warning = settle(cfg)
    assert folder == damaged / "checkpoint-4" and cfg.resume_from_checkpoint == str(folder)
    assert warning is not None and "checkpoint-8 is not a whole checkpoint: " in warning
    assert warning.endswith(f"Resuming from {folder}, the last whole one")
    assert settle(cfg) == (folder, None)  # preference methods load a second model
    assert (damaged / "checkpoint-8").is_dir()

    damage_state(damaged / "checkpoint-4")
    with pytest.raises(ResumeError, match=r"No other checkpoint in .*/out is whole\. To start anew, move it"):
        settle(resuming(damaged, auto_resume_from_checkpoints=True))
    assert settle(resuming(damaged)) == (None, None)
    assert settle(resuming(damaged / "none", auto_resume_from_checkpoints=True)) == (None, None)


@by_damage
def test_naming_what_is_not_whole_is_refused_with_what_is(damaged: Path) -> None:
    cfg = resuming(damaged, resume_from_checkpoint=str(damaged / "checkpoint-8"))
    good = damaged / "checkpoint-4"
    with pytest.raises(ResumeError, match=f"last whole one is {good}: set resume_from_checkpoint: {good}"):
        settle(cfg)
    with pytest.raises(ResumeError, match=r"checkpoint-7 is not a whole checkpoint: there is no such folder"):
        settle(resuming(damaged, resume_from_checkpoint=str(damaged / "checkpoint-7")))
    assert settle(resuming(damaged, resume_from_checkpoint=str(good))) == (good, None)


@pytest.mark.slow
@pytest.mark.parametrize("damaged", [damage_state], indirect=True)
def test_a_run_passes_over_what_is_not_whole(
    damaged: Path, workplace: Path, bases: dict[str, Path], whole_run: Run, monkeypatch: pytest.MonkeyPatch
) -> None:
    said: list[str] = []
    handler = logging.Handler()
    handler.emit = lambda record: said.append(record.getMessage())  # type: ignore[method-assign]
    monkeypatch.setattr(LOG, "handlers", [handler])
    keys = settings(
        workplace, "x", bases["latent"], output_dir=str(damaged), auto_resume_from_checkpoints=True
    )
    assert_same(train(keys), whole_run)
    assert sum("checkpoint-8 is not a whole checkpoint" in line for line in said) == 1
    assert problems(damaged / "checkpoint-8", ranks=1) == []  # saved again, over what was there


@pytest.mark.slow
def test_killed_at_every_change_of_a_checkpoints_save(
    workplace: Path, bases: dict[str, Path], whole_run: Run, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The Trainer's own save, killed in forks of the run, over an old checkpoint in shards."""
    out = workplace / "saves"
    old = workplace / "old"
    shutil.copytree(Path(whole_run.cfg.output_dir) / "checkpoint-4", old)
    (old / "model.safetensors").unlink()
    whole_run.model.save_pretrained(old, max_shard_size="200KB")
    assert (old / INDEX).exists() and not problems(old)

    def content(folder: Path) -> dict[str, bytes]:
        return {path.name: path.read_bytes() for path in folder.iterdir()}

    seen: list[dict[str, bytes]] = []
    outcome: list[str] = []
    save = plugin_module.forget_before_saving

    def guard(trainer: Trainer) -> None:
        here = out / "checkpoint-4"
        shutil.copytree(old, here)  # there when the run begins
        save(trainer)
        shutil.rmtree(here)
        guarded = trainer._save_checkpoint

        def killed(*args: Any, **kwargs: Any) -> None:
            shutil.copytree(old, here)
            for _ in kill_at_every_change(lambda: guarded(*args, **kwargs), under=str(here)):
                seen.append(content(here))
                outcome.append("whole" if not problems(here, ranks=1) else "refused")
                try:
                    pack_checkpoint(here, workplace / "torn", overwrite=True)
                except CheckpointError:
                    outcome[-1] += ", unpacked"
                shutil.rmtree(here)
                shutil.copytree(old, here)
            guarded(*args, **kwargs)

        trainer._save_checkpoint = killed  # type: ignore[method-assign]

    monkeypatch.setattr(plugin_module, "forget_before_saving", guard)
    interrupted(settings(workplace, "saves", bases["latent"]), 5, monkeypatch)
    final = content(out / "checkpoint-4")
    assert not problems(out / "checkpoint-4", ranks=1)
    before = content(old)
    for files, verdict in zip(seen, outcome, strict=True):
        if verdict.startswith("whole"):
            assert files == before or {name: files[name] for name in final if name in files} == final
        if "unpacked" not in verdict:  # the old weights or the new ones, never some of each
            weights = {name: data for name, data in files.items() if name.endswith(".safetensors")}
            assert INDEX in files or "model.safetensors" in weights
            if INDEX in files:
                assert weights == {name: data for name, data in before.items() if name in weights}
    print(outcome)
    assert len(outcome) > 15
    assert outcome.count("refused, unpacked") > 3 and outcome.count("refused") > 3


# A checkpoint of another run


@pytest.mark.parametrize(
    "change, message",
    [
        ({"learning_rate_multiplier": 6}, r"learning_rate_multiplier was 3\.0 and is now 6\.0 \(the rates"),
        ({"latent_dtype": "bfloat16"}, "latent_dtype was 'float32' and is now 'bfloat16'"),
        ({"learning_rate_scope": "ternary"}, "learning_rate_scope was 'all' and is now 'ternary'"),
        ({"backward": "int8_dx"}, "backward was 'bf16' and is now 'int8_dx'"),
        (
            {"skip_modules": ["model.layers.0.mlp"]},
            r"dense now: model\.layers\.0\.mlp\.down_proj, .*\. Set skip_modules back",
        ),
    ],
)
def test_changed_settings_are_refused_by_name(
    change: Keys, message: str, workplace: Path, bases: dict[str, Path], whole_run: Run
) -> None:
    checkpoint = Path(whole_run.cfg.output_dir) / "checkpoint-4"
    keys = settings(
        workplace,
        "changed",
        bases["latent"],
        resume_from_checkpoint=str(checkpoint),
        bitnet=RUN["bitnet"] | change,
    )
    with pytest.raises(ResumeError, match=message) as caught:
        train(keys)
    assert str(checkpoint) in str(caught.value)


def test_a_checkpoint_that_recorded_int8_grad(tmp_path: Path) -> None:
    """As version 0.2.0 wrote it."""
    settings = {"bitnet": {"int8_grad": True, "latent_dtype": "float32"}}
    state = {"stateful_callbacks": {"TernaryRun": {"args": {"settings": settings}, "attributes": {}}}}
    (tmp_path / "trainer_state.json").write_text(json.dumps(state))
    refuse_other_run(tmp_path, BitNetConfig(backward="int8_dx"))
    with pytest.raises(ResumeError, match="backward was 'int8_dx' and is now 'bf16'"):
        refuse_other_run(tmp_path, BitNetConfig())


@pytest.mark.slow
def test_settings_that_do_not_shape_training_may_change(
    workplace: Path, bases: dict[str, Path], whole_run: Run
) -> None:
    checkpoint = Path(whole_run.cfg.output_dir) / "checkpoint-4"
    saved = recorded(checkpoint)
    assert saved is not None and saved["ranks"] == 1 and len(saved["converted"]) == 14
    free = {"fuse": False, "export": [], "skip_modules": ["lm_head"]}
    keys = settings(
        workplace,
        "free",
        bases["latent"],
        resume_from_checkpoint=str(checkpoint),
        bitnet=RUN["bitnet"] | free,
    )
    assert train(keys).losses == whole_run.losses


@pytest.mark.slow
def test_dense_and_ternary_do_not_continue_each_other(
    workplace: Path, bases: dict[str, Path], whole_run: Run
) -> None:
    """Not even a dense run whose base, and so whose config.json, is of a ternary one."""
    ternary = Path(whole_run.cfg.output_dir)
    dense = {"use_onebitllms": None, "bitnet": None, "max_steps": 4}
    with pytest.raises(
        ResumeError, match=r"checkpoint-4 is of a ternary run, and this config would train dense"
    ):
        keys = {**dense, "resume_from_checkpoint": str(ternary / "checkpoint-4")}
        train(settings(workplace, "dense", bases["latent"], **keys))
    keys = settings(workplace, "dense", ternary, **dense)
    assert len(train(keys).losses) == 4
    assert "axolotl_bitnet" in (workplace / "dense" / "checkpoint-4" / "config.json").read_text()
    resumed = train(keys | {"max_steps": 6, "auto_resume_from_checkpoints": True})
    assert len(resumed.losses) == 6
    with pytest.raises(ResumeError, match=r"checkpoint-6 was not saved by a ternary run"):
        train(settings(workplace, "dense", bases["latent"], auto_resume_from_checkpoints=True))


# A previous run in the same folder


@pytest.mark.slow
def test_a_run_clears_the_folder_before_its_first_step(
    workplace: Path, bases: dict[str, Path], whole_run: Run, monkeypatch: pytest.MonkeyPatch
) -> None:
    """On Ctrl-C Axolotl saves weights as they are: not beside an older packed folder and its proof."""
    out = workplace / "again"
    shutil.copytree(whole_run.cfg.output_dir, out)
    for times in (1, 2):
        interrupted(settings(workplace, "again", bases["latent"]), 1, monkeypatch)
        assert not (out / "packed").exists() and not (out / "bitnet.json").exists()
        assert verify_checkpoint(out / "_previous" / "packed", out / "_previous").ok
        assert (out / "_previous-2").exists() == (times == 2)
        whole_run.model.save_pretrained(out)  # what Ctrl-C leaves
    train(settings(workplace, "again", bases["latent"], max_steps=1))
    assert verify_checkpoint(out / "packed", out).ok and not list(out.glob("_previous*"))


@pytest.mark.slow
def test_a_base_in_the_output_folder_stays_until_the_end(
    workplace: Path, bases: dict[str, Path], monkeypatch: pytest.MonkeyPatch
) -> None:
    base = workplace / "in place"
    shutil.copytree(bases["latent"], base)
    weights = (base / "model.safetensors").read_bytes()
    interrupted(settings(workplace, "in place", base), 1, monkeypatch)
    assert (base / "model.safetensors").read_bytes() == weights


def die(keys: str, step: str) -> None:
    """A run that is killed before a step."""

    class Kill(TrainerCallback):
        def on_step_begin(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
            if state.global_step == int(step):
                os.kill(os.getpid(), signal.SIGKILL)

    plugin_module.BitNetPlugin.add_callbacks_post_trainer = lambda *_: [Kill()]  # type: ignore[method-assign]
    train(json.loads(Path(keys).read_text()))


if __name__ == "__main__":
    die(*sys.argv[1:])
