"""What an interrupted run would suffer from in transformers' Trainer, mended on one trainer.

Upstream names: ``Trainer._save_checkpoint``, ``Trainer._run_epoch`` (transformers 5.16 and 5.20).
"""

from __future__ import annotations

from pathlib import Path
from typing import Any

import transformers

from ..run_folder import CHECKPOINT
from ..storage.trainer_checkpoint import forget


def guard(trainer: Any) -> None:
    """Mend three things of a trainer that an interrupted run would suffer from.

    It writes over an old checkpoint of the same step file by file, so that a kill would leave a mix with each
    file in place: the files that make it whole go first. Resumed where nothing is left to train, it takes one
    step more, unless an epoch ends there. And resumed within an epoch, it tells the epoch only to the loader
    that skips batches: Axolotl's packing sampler behind it would keep batches from before it was seeded.
    """
    save, run_epoch = trainer._save_checkpoint, trainer._run_epoch

    def save_checkpoint(*args: Any, **kwargs: Any) -> Any:
        if trainer.args.should_save:
            forget(Path(trainer.args.output_dir) / f"{CHECKPOINT}{trainer.state.global_step}")
        return save(*args, **kwargs)

    def run_epoch_if_any(*args: Any, **kwargs: Any) -> Any:
        if trainer.state.global_step >= trainer.state.max_steps:
            trainer.control.should_training_stop = True
            return None
        if kwargs["resume_from_checkpoint"] is not None:
            _set_epoch(kwargs["train_dataloader"], kwargs["epoch"])
        return run_epoch(*args, **kwargs)

    trainer._save_checkpoint, trainer._run_epoch = save_checkpoint, run_epoch_if_any


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
