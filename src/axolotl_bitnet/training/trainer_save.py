"""Before a checkpoint is written over, the files that mark it as whole are removed.

The Trainer writes over an old checkpoint of the same step file by file: a kill in between would leave a mix
with each file in place. So the files that are written last are removed first.

Changes ``Trainer._save_checkpoint`` of transformers (run on 5.16 and 5.20), where the output folder holds
checkpoints. Without that name checkpoints are written over as the Trainer does it, and a warning names it.
Tests: tests/test_resume.py, tests/test_upstream_names.py.
"""

from __future__ import annotations

from pathlib import Path
from typing import Any

import transformers

from ..run_folder import CHECKPOINT
from ..storage.trainer_checkpoint import checkpoints, forget
from .log import warn


def forget_before_saving(trainer: Any) -> None:
    """Let a trainer remove the files that mark a checkpoint as whole before it writes over it."""
    if not checkpoints(trainer.args.output_dir):
        return
    save = getattr(trainer, "_save_checkpoint", None)
    if save is None:
        warn(
            f"transformers {transformers.__version__} has no Trainer._save_checkpoint. If this run is killed "
            f"while it writes over a checkpoint in {trainer.args.output_dir}, do not resume from that one"
        )
        return

    def save_checkpoint(*args: Any, **kwargs: Any) -> Any:
        if trainer.args.should_save:
            forget(Path(trainer.args.output_dir) / f"{CHECKPOINT}{trainer.state.global_step}")
        return save(*args, **kwargs)

    trainer._save_checkpoint = save_checkpoint
