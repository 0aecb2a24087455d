"""A resumed run ends where the uninterrupted one does, and reads its data in the same order.

Resumed where nothing is left to train, the Trainer takes one step more, unless an epoch ends there. Resumed
within an epoch, it sets the epoch only of the loader that skips batches: Axolotl's packing sampler behind it
would keep batches from before it was seeded.

Changes ``Trainer._run_epoch`` of transformers (run on 5.16 and 5.20), in resumed runs only. Without that
name, or the arguments that are read here, the run is resumed as the Trainer does it, and a warning names it.
Tests: tests/test_resume.py, tests/test_upstream_names.py.
"""

from __future__ import annotations

import inspect
from typing import Any

import transformers

from .log import warn

_READ = {"resume_from_checkpoint", "train_dataloader", "epoch"}


def resume_epochs(trainer: Any) -> None:
    """Let a trainer that resumes continue where it was, in the order of data that the first part had."""
    run_epoch = getattr(trainer, "_run_epoch", None)
    if run_epoch is None or not _takes_what_is_read(run_epoch):
        warn(
            f"transformers {transformers.__version__} has no Trainer._run_epoch as it is known here: the "
            "resumed run may read its data in another order than the uninterrupted one, and may take one "
            "step more"
        )
        return

    def run_epoch_if_any(*args: Any, **kwargs: Any) -> Any:
        if trainer.state.global_step >= trainer.state.max_steps:
            trainer.control.should_training_stop = True
            return None
        given = inspect.signature(run_epoch).bind(*args, **kwargs).arguments | kwargs
        if given["resume_from_checkpoint"] is not None:
            _set_epoch(given["train_dataloader"], given["epoch"])
        return run_epoch(*args, **kwargs)

    trainer._run_epoch = run_epoch_if_any


def _takes_what_is_read(run_epoch: Any) -> bool:
    """A subclass may pass on what it does not read itself, as ``**kwargs`` (Axolotl 0.21): then the Trainer's
    own arguments count too."""
    parameters = inspect.signature(run_epoch).parameters
    names = set(parameters)
    if any(parameter.kind is parameter.VAR_KEYWORD for parameter in parameters.values()):
        names |= inspect.signature(transformers.Trainer._run_epoch).parameters.keys()
    return names >= _READ


def _set_epoch(loader: Any, epoch: int) -> None:
    """As the Trainer does it for a loader that skips nothing."""
    if hasattr(loader, "set_epoch"):
        loader.set_epoch(epoch)
    sharded = getattr(getattr(loader, "batch_sampler", None), "batch_sampler", None)
    if (
        sharded is not None
        and hasattr(sharded, "set_epoch")
        and hasattr(transformers.trainer, "BatchRebalanceSampler")
    ):
        sharded.set_epoch(epoch)  # of several ranks: the Trainer reaches it since it has that sampler
