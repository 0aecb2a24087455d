"""Interrupted runs: which checkpoint to resume from, whether it is of this run, and whether it is whole.

The settings of a ternary run are in ``trainer_state.json``, which every layout of checkpoint has and which is
written last.
"""

from __future__ import annotations

import os
from collections.abc import Iterable
from pathlib import Path
from typing import Any

from transformers import TrainerCallback

from ..model.names import first_few
from ..storage.atomic import CheckpointError
from ..storage.trainer_checkpoint import checkpoints, problems, trainer_state
from ..training.log import info, is_main_process
from .args import BitNetConfig, with_backward
from .artifacts import set_aside

try:
    from transformers.trainer_callback import ExportableState as _ExportableState
except ImportError:  # it marks what the Trainer collects; on_train_begin below puts its state there itself
    _ExportableState = object

_FREE = {"export", "fuse", "gather", "monitor", "skip_modules", "verify"}
"""Options that may change from one part of a run to the next; layers are compared by their names."""

_ROUNDING = "stochastic_rounding"

_WHY = {
    "latent_dtype": "latents and optimizer state have the precision they were saved in",
    "learning_rate_multiplier": "the rates come out of the checkpoint, and the change would have no effect",
    "learning_rate_scope": "the optimizer's groups come out of the checkpoint",
    "ramp_steps": "lambda follows the steps that are done, and would jump",
    "start": "latents are what their start made of them",
}


class ResumeError(ValueError):
    """A run cannot be resumed as asked; the message names the checkpoint and what to do."""


class TernaryRun(TrainerCallback, _ExportableState):
    """Carries a run's ternary settings into its checkpoints, and clears a previous run's files away before
    the first step.

    Args:
        settings: `bitnet` (the options), `converted` (names), `definition`, `ranks`: JSON.
        base: where the base's files are; they are never moved.
    """

    def __init__(self, settings: dict[str, Any], base: str | None) -> None:
        self.settings, self.base = settings, base

    def state(self) -> dict[str, Any]:
        return {"args": {"settings": self.settings, "base": self.base}, "attributes": {}}

    def on_train_begin(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        # A resumed state has the settings of the first part.
        state.stateful_callbacks[type(self).__name__] = self.state()
        in_place = self.base is not None and Path(self.base).resolve() == Path(args.output_dir).resolve()
        if not in_place and is_main_process() and (names := set_aside(args.output_dir)):
            info("a previous run's %s in %s will be replaced", ", ".join(names), args.output_dir)


def settings_of(options: BitNetConfig, entry: dict[str, Any], rounding: bool = False) -> dict[str, Any]:
    """What a checkpoint records of the run: the options, the model config's own entry, and whether updates
    are rounded stochastically."""
    ranks = _ranks()
    converted = {"converted": list(entry["converted"]), "definition": entry["definition"]}
    return {
        "bitnet": options.model_dump(exclude={"export", "verify"}),
        **converted,
        "ranks": ranks,
        _ROUNDING: rounding,
    }


def refuse_ternary_checkpoint(cfg: Any) -> None:
    """For dense runs.

    Raises:
        ResumeError: the checkpoint that this run would resume from is of a ternary run.
    """
    folder = _chosen(cfg)
    try:
        ternary = folder is not None and recorded(folder) is not None
    except CheckpointError:
        return  # not ours to judge
    if ternary:
        raise ResumeError(
            f"{folder} is of a ternary run, and this config would train dense. Add `use_onebitllms: true` or "
            "resume from another checkpoint"
        )


def settle(cfg: Any) -> tuple[Path | None, str | None]:
    """Find the checkpoint that this run will resume from, and make sure that it is whole.

    With ``auto_resume_from_checkpoints`` a checkpoint whose save was interrupted is skipped, and the last
    whole one is taken.

    Returns:
        The checkpoint, or None for a run from the start; and a warning for the log, or None.

    Raises:
        ResumeError: the checkpoint that was asked for is not whole, or none is.
    """
    asked, folder = cfg.resume_from_checkpoint, _chosen(cfg)
    if folder is None:
        return None, None
    found = _problems(folder)
    if not found:
        cfg.resume_from_checkpoint = str(folder)  # what was checked is what Axolotl takes
        return folder, None
    good = next((path for path in checkpoints(folder.parent) if not _problems(path)), None)
    broken = f"{folder} is not a whole checkpoint: {'; '.join(found)}"
    if good is None:
        raise ResumeError(
            f"{broken}. No other checkpoint in {folder.parent} is whole. To start anew, move it "
            "away or remove resume_from_checkpoint and auto_resume_from_checkpoints from the config"
        )
    if asked:
        raise ResumeError(f"{broken}. The last whole one is {good}: set resume_from_checkpoint: {good}")
    cfg.resume_from_checkpoint = str(good)
    return good, f"{broken}. Resuming from {good}, the last whole one"


def refuse_other_run(checkpoint: Path, options: BitNetConfig, rounding: bool = False) -> None:
    """Compare the settings of a whole checkpoint with this run's, before any weights are loaded.

    Raises:
        ResumeError: it is of a dense run, the options that shape training differ, or the number of
            processes does and updates are rounded stochastically.
    """
    saved = recorded(checkpoint)
    if saved is None:
        raise ResumeError(
            f"{checkpoint} was not saved by a ternary run. Start a new run with base_model: {checkpoint}, or "
            "remove `use_onebitllms`"
        )
    then, now = with_backward(saved["bitnet"]), options.model_dump()
    defaults = BitNetConfig().model_dump()
    changed = [
        f"bitnet.{key} was {then.get(key, defaults.get(key))!r} and is now {now.get(key)!r}"
        + (f" ({_WHY[key]})" if key in _WHY else "")
        for key in sorted((then.keys() | now.keys()) - _FREE)
        if then.get(key, defaults.get(key)) != now.get(key)
    ]
    if bool(saved.get(_ROUNDING)) != rounding:
        was, is_now = ("nearest", "stochastically") if rounding else ("stochastically", "nearest")
        changed.append(f"bfloat16 updates were rounded {was} and are now rounded {is_now} (optim_args)")
    if changed:
        raise ResumeError(
            f"{checkpoint} was trained with other settings: {'; '.join(changed)}. Set them back, or start a "
            f"new run with base_model: {checkpoint}"
        )
    if rounding:
        _refuse_other_ranks(checkpoint, saved.get("ranks"))


def _refuse_other_ranks(checkpoint: Path, saved: int | None) -> None:
    if saved is not None and saved != _ranks():
        raise ResumeError(
            f"{checkpoint} was saved by {saved} processes and this run has {_ranks()}: the 8-bit moments are "
            "blocks of each process's shard, and the rounding's noise is drawn for each shard. Resume it "
            f"with {saved} processes, or start a new run with base_model: {checkpoint}"
        )


def _ranks() -> int:
    return int(os.environ.get("WORLD_SIZE", "1"))


def refuse_other_layers(checkpoint: Path, converted: Iterable[str], definition: int) -> None:
    """Compare a checkpoint's ternary layers with the model's.

    Raises:
        ResumeError: they differ; the message names them.
    """
    saved = recorded(checkpoint) or {}
    if saved.get("definition", definition) != definition:
        raise ResumeError(
            f"{checkpoint} was trained under definition {saved['definition']} of the ternary codes, this "
            f"package has {definition}: resume it with the version that made it"
        )
    then, now = set(saved.get("converted", [])), set(converted)
    if then != now:
        parts = []
        if then - now:
            parts.append(f"ternary there and dense now: {first_few(sorted(then - now))}")
        if now - then:
            parts.append(f"dense there and ternary now: {first_few(sorted(now - then))}")
        raise ResumeError(
            f"{checkpoint} was trained with other ternary layers ({'; '.join(parts)}). Set skip_modules "
            f"back, or start a new run with base_model: {checkpoint}"
        )


def recorded(checkpoint: Path) -> dict[str, Any] | None:
    """The settings that :class:`TernaryRun` left in a checkpoint; None in a dense one."""
    entry = (trainer_state(checkpoint).get("stateful_callbacks") or {}).get(TernaryRun.__name__)
    return entry["args"]["settings"] if entry else None


def _chosen(cfg: Any) -> Path | None:
    """The checkpoint that Axolotl will take: the one that is asked for, else with
    ``auto_resume_from_checkpoints`` the last one."""
    if cfg.resume_from_checkpoint is not None:
        return Path(cfg.resume_from_checkpoint) if cfg.resume_from_checkpoint else None
    there = checkpoints(cfg.output_dir) if cfg.auto_resume_from_checkpoints else []
    return there[0] if there else None


def _problems(folder: Path) -> list[str]:
    found = problems(folder)
    if found:
        return found
    entry = recorded(folder)
    return problems(folder, entry.get("ranks")) if entry else []
