"""Tokens per second, and the share of the GPU's 8-bit peak that the ternary layers use.

The share is what papers call model FLOPs utilization, against the 8-bit peak and of the ternary layers alone:
6 operations per ternary weight and token (2 forward, 4 backward; what checkpointing computes again is not
counted) over the time from one logged step to the next. Attention, head and optimizer take time and add no
operations, so 1 is out of reach.

Changes ``Trainer.training_step`` of transformers (run on 5.16 and 5.20), to count tokens without waiting for
the GPU. Without that name, or without ``input_ids`` in a batch (preference methods), none is logged. Tests:
tests/test_speed.py.
"""

from __future__ import annotations

import time
from typing import Any

import torch
from transformers import TrainerCallback

from ..layers.bitlinear import BitLinear

OPERATIONS = 6  # per weight and token: y = x W forward, dx and dW backward

PEAKS = {
    "H200": 1979e12,
    "H100 PCIe": 1513e12,
    "H100": 1979e12,
    "A100": 624e12,
    "L40S": 733e12,
    "4090": 661e12,
}
"""Dense int8 operations per second (NVIDIA's data sheets), by a part of the GPU's name; the first fits."""


def peak_of(name: str) -> float | None:
    """Dense int8 operations per second of the GPU of this name; None if it is not in the table."""
    return next((peak for part, peak in PEAKS.items() if part in name), None)


class Speed(TrainerCallback):
    """Figures from one logged step to the next: none for the first, none across an evaluation or a save."""

    def __init__(self, trainer: Any) -> None:
        self.tokens = self.weights = 0
        self.since: float | None = None
        self.peak: float | None = None
        training_step = getattr(trainer, "training_step", None)
        if training_step is None:
            return

        def counted(model: Any, inputs: Any, *args: Any, **kwargs: Any) -> Any:
            self.tokens += inputs["input_ids"].numel() if "input_ids" in inputs else 0
            return training_step(model, inputs, *args, **kwargs)

        trainer.training_step = counted

    def on_train_begin(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        layers = [module for module in kwargs["model"].modules() if isinstance(module, BitLinear)]
        self.weights = sum(layer.in_features * layer.out_features for layer in layers)
        self.peak = peak_of(torch.cuda.get_device_name()) if torch.cuda.is_available() else None
        self.since = None

    def on_evaluate(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        self.since = None

    def on_save(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        self.since = None

    def logs(self) -> dict[str, float]:
        """Called when the Trainer has waited for the step's loss, so the clock shows what the GPU did."""
        now, since, tokens = time.perf_counter(), self.since, self.tokens
        self.since, self.tokens = now, 0
        if since is None or not tokens:
            return {}
        rate = tokens / (now - since)
        figures = {"bitnet/tokens_per_second": round(rate, 1)}
        if self.peak is not None:
            figures["bitnet/int8_peak"] = round(OPERATIONS * self.weights * rate / self.peak, 4)
        return figures
