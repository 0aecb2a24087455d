"""The way from a dense model to a ternary one, step by step instead of at once.

For bases that were never ternary. While lambda < 1 every BitLinear computes with ``(1 - lambda) W + lambda
codes / s`` and with activations mixed likewise, and the gradients go straight through to the latents. From
lambda = 1 on the layers are ordinary BitLinear layers, on the int8 path.

lambda is one tensor per device that the layers read and that is written to in place, so that a compiled model
is not compiled anew each step, but once, where the layers change paths. The model's config holds lambda, so a
model that is saved on the ramp is not taken for a ternary one.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor, nn
from transformers import TrainerCallback

from ..layers.bitlinear import BitLinear
from ..model.entry import CONFIG_KEY, RAMP_KEY
from ..model.layer_plan import too_short


def lambda_at(step: int, ramp_steps: int) -> float:
    """lambda of the step that follows ``step`` finished ones: linear, 1 from ``ramp_steps`` on."""
    return min(step / ramp_steps, 1.0) if ramp_steps else 1.0


def set_ramp(model: nn.Module, value: float) -> int:
    """Let all BitLinear layers of a model compute at lambda ``value`` from now on.

    In a training loop of your own call ``set_ramp(model, min(step / ramp_steps, 1))`` before each step, never
    between a forward and its backward, which would fail.

    Args:
        model: a converted model, wrapped or not.
        value: 0 (dense, the latents as they are) to 1 (ternary).

    Returns:
        The number of layers.

    Raises:
        ValueError: lambda is not within 0 and 1.
    """
    if not 0 <= value <= 1:
        raise ValueError(f"lambda is {value}: it goes from 0 (dense) to 1 (ternary)")
    layers = _layers(model)
    tensors = {layer.ramp.device: layer.ramp for layer in layers if layer.ramp is not None}
    with torch.inference_mode(False), torch.no_grad():
        for tensor in tensors.values():
            tensor.fill_(value)
        for layer in layers:
            if value == 1:
                vars(layer).pop("ramp", None)
            elif layer.ramp is None:
                device = layer.weight.device
                if device not in tensors:
                    tensors[device] = torch.tensor(value, dtype=torch.float32, device=device)
                layer.ramp = tensors[device]
    for entry in _config_entries(model):
        entry.pop(RAMP_KEY, None)
        if value < 1:
            entry[RAMP_KEY] = value
    return len(layers)


def ramping(model: nn.Module) -> bool:
    """Whether any layer computes at a lambda below 1."""
    return any(layer.ramp is not None for layer in _layers(model))


@contextmanager
def fully_ternary(model: nn.Module) -> Iterator[None]:
    """Inside, the layers compute ternary; then at the lambda that they had before."""
    held: list[tuple[BitLinear, Tensor]] = []
    for layer in _layers(model):
        if layer.ramp is not None:
            held.append((layer, layer.ramp))
            del layer.ramp
    try:
        yield
    finally:
        for layer, ramp in held:
            layer.ramp = ramp


class RampSchedule(TrainerCallback):
    """Sets lambda before every step, from the number of steps that are done: a resumed run continues at its
    lambda."""

    def __init__(self, ramp_steps: int) -> None:
        """
        Args:
            ramp_steps: number of steps after which lambda is 1.
        """
        self.ramp_steps = ramp_steps
        self.value: float | None = None

    def on_train_begin(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        """Raise ValueError when training would end before the ramp does."""
        if state.max_steps <= self.ramp_steps:
            raise ValueError(too_short(self.ramp_steps, state.max_steps))
        self._set(kwargs["model"], state.global_step)

    def on_step_begin(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        if self.value != 1:  # losses rise with lambda: the best so far is of another, denser model
            state.best_metric = state.best_model_checkpoint = state.best_global_step = None
        self._set(kwargs["model"], state.global_step)

    def logs(self) -> dict[str, float]:
        """What goes into the Trainer's log: ``bitnet/ramp``, lambda of the last step."""
        return {} if self.value is None else {"bitnet/ramp": round(self.value, 6)}

    def _set(self, model: nn.Module, step: int) -> None:
        value = lambda_at(step, self.ramp_steps)
        if value != self.value:
            set_ramp(model, value)
            self.value = value


def _layers(model: nn.Module) -> list[BitLinear]:
    return [module for module in model.modules() if isinstance(module, BitLinear)]


def _config_entries(model: nn.Module) -> list[dict[str, Any]]:
    """The configs' own entries of the converted models in here; a wrapped model's is below the wrapper."""
    configs = [vars(module).get("config") for module in model.modules()]
    entries = [getattr(config, CONFIG_KEY, None) for config in configs if config is not None]
    return list({id(entry): entry for entry in entries if isinstance(entry, dict)}.values())
