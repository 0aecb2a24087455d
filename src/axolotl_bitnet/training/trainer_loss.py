"""A loss that is no number is kept out of the log, without a wait for the GPU.

The Trainer asks the GPU after every micro-batch whether its loss is a number
(``logging_nan_inf_filter``): the CPU waits until the GPU has nothing left to do, and the GPU then waits for
the CPU. Here the GPU itself takes the average of the losses since the last log instead, as the Trainer does.

Changes ``Trainer.training_step`` of transformers, and the argument; reads ``_tr_loss`` and
``_globalstep_last_logged`` (run on 5.16 and 5.20). Without these names the Trainer asks as before. Tests:
tests/test_trainer_loss.py.
"""

from __future__ import annotations

from typing import Any

import torch
import transformers
from torch import Tensor

_READ = {"_tr_loss", "_globalstep_last_logged"}


def filter_losses(trainer: Any) -> bool:
    """Let a transformers Trainer filter losses on the GPU.

    Returns:
        Whether it does: not where it filters none, or as it is not known here.
    """
    run_epoch = getattr(transformers.Trainer, "_run_epoch", None)
    known = run_epoch is not None and set(run_epoch.__code__.co_names) >= _READ
    if not known or not getattr(trainer.args, "logging_nan_inf_filter", False):
        return False
    training_step = trainer.training_step

    def filtered(*args: Any, **kwargs: Any) -> Tensor:
        loss: Tensor = training_step(*args, **kwargs)
        steps = 1 + trainer.state.global_step - trainer._globalstep_last_logged
        return torch.where(torch.isfinite(loss), loss, trainer._tr_loss / steps)

    trainer.training_step = filtered
    trainer.args.logging_nan_inf_filter = False
    return True
