"""Tells the layers when the weights stand still: from a step's first micro-batch to its optimizer step."""

from __future__ import annotations

from typing import Any

from transformers import TrainerCallback

from ..layers.weight_codes import forget_weight_codes, keep_weight_codes


class KeepWeightCodes(TrainerCallback):
    """Each weight is quantized once an optimizer step, at a byte a weight of memory.

    For steps that read the weights more than once: of several micro-batches, or with checkpointing.
    """

    def on_step_begin(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        keep_weight_codes()

    def on_pre_optimizer_step(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        forget_weight_codes()

    def on_step_end(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        forget_weight_codes()

    def on_train_end(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        forget_weight_codes()
