"""Switches a run over to codes: tries them on one layer, and gathers weights where codes do not arrive."""

from __future__ import annotations

from contextlib import suppress
from typing import Any

import torch
from torch import nn
from transformers import TrainerCallback

from .fsdp2_gather import gather_ternary, gather_weights, ternary_params
from .gather_check import problem_of
from .keep_gathered import keep_gathered
from .log import warn
from .ramp import ramping


def _try(model: nn.Module) -> str | None:
    """Gather codes from now on, if the codes of one layer arrive as they should; else why not."""
    try:
        if not gather_ternary(model):
            return None
        unit, _, param = next(ternary_params(model))
        problem = problem_of(unit, param._module_info.module)
    except (AttributeError, TypeError) as error:
        problem = f"{type(error).__name__}: {error}"
    if problem:
        with suppress(AttributeError):  # where groups cannot be listed, nothing has been changed
            gather_weights(model)
    return problem


def _keep(model: nn.Module) -> None:
    try:
        keep_gathered(model)
    except AttributeError as error:
        warn(f"torch {torch.__version__} gathers codes anew in every pass, which is slower: {error}")


class GatherTernary(TrainerCallback):
    """Makes FSDP2 gather codes when training begins, because models are sharded by then; or when a ramp ends,
    because until then layers need latents."""

    def __init__(self, *references: nn.Module, required: bool = False, keep: bool = False) -> None:
        """
        Args:
            references: models beside the policy that may be sharded too.
            required: end the run where codes cannot be gathered, instead of gathering weights.
            keep: let the policy's codes stay gathered until the optimizer step.
        """
        self.references, self.required, self.keep = references, required, keep
        self.done = False

    def on_train_begin(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        self.done = False
        self.on_step_begin(args, state, control, **kwargs)

    def on_step_begin(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        """Raise RuntimeError where codes are required and do not arrive."""
        if self.done or ramping(kwargs["model"]):
            return
        self.done = True
        problems = [_try(model) for model in (kwargs["model"], *self.references)]
        if not (reason := next(filter(None, problems), None)):
            if self.keep:
                _keep(kwargs["model"])
            return
        reason = f"torch {torch.__version__} gathers in a way that is not known here: {reason}"
        if self.required:
            raise RuntimeError(f"`bitnet.gather: ternary`: {reason}. Remove `gather`")
        warn(f"FSDP2 gathers whole weights, not 2-bit codes: {reason}")
