"""Declares weights constant from a step's first micro-batch to its optimizer step."""

from __future__ import annotations

from typing import Any

from transformers import TrainerCallback

from ..layers.weight_codes import forget_weight_codes, keep_weight_codes


class KeepWeightCodes(TrainerCallback):
    """Each weight is quantized once an optimizer step.

    For steps that read the weights more than once: of several micro-batches, or with checkpointing.

    Args:
        whole: keep the codes of whole weights, a byte per weight. Under FSDP2 the gather keeps a shard's
            bytes instead, a quarter of a byte per local weight.
        compiled: compiled layers of few rows keep them too; not where they are CUDA graphs.
    """

    def __init__(self, whole: bool = True, compiled: bool = False) -> None:
        self.whole, self.compiled = whole, compiled

    def on_step_begin(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        keep_weight_codes(self.whole, self.compiled)

    def on_pre_optimizer_step(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        forget_weight_codes()

    def on_step_end(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        forget_weight_codes()

    def on_train_end(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        forget_weight_codes()
