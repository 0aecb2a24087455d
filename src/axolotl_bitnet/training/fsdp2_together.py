"""FSDP2 takes small layers several at a time: one gather and one reduction for all of them.

FSDP2's work for a layer takes the CPU as long whether the layer is small or large, and steps of small models
wait for the CPU: with two layers at a time, a step of Falcon-E-1B under ``bitnet.backward: int8`` took x0.84
of the time (docs/log.md). The gradients of all of them are whole at once, so large layers stay alone.

accelerate and Axolotl shard a model layer by layer, when the Trainer lets them prepare it; both take
``fully_shard`` from ``torch.distributed.fsdp`` then. Meanwhile another function is there, which waits for
more layers. Run on accelerate 1.13 and 1.14, axolotl 0.19 and 0.21. Without these names layers are sharded
one by one. Test: tests/test_fsdp2_together.py.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

from torch import nn
from torch.distributed import fsdp
from transformers.modeling_layers import GradientCheckpointingLayer

from .log import info

_MOST_LAYERS = 4
_MOST_WEIGHTS = 128 * 2**20


def shard_together(accelerator: Any) -> None:
    """Let an accelerator shard layers together whenever it prepares a model."""
    prepare = accelerator.prepare

    def prepare_together(*args: Any, **kwargs: Any) -> Any:
        with layers_together():
            return prepare(*args, **kwargs)

    accelerator.prepare = prepare_together


@contextmanager
def layers_together() -> Iterator[None]:
    """Within the block, ``torch.distributed.fsdp.fully_shard`` of consecutive layers of a transformers model
    shards them as one unit: at most four, and 128 Mi weights. Their units are complete when anything else is
    sharded, as the whole model is in the end."""
    original = fsdp.fully_shard
    waiting: list[nn.Module] = []
    settings: dict[str, Any] = {}
    most = 1

    def shard_waiting() -> None:
        nonlocal most
        most = max(most, len(waiting))
        if waiting:
            original(waiting if len(waiting) > 1 else waiting[0], **settings)
            waiting.clear()

    def fully_shard(module: Any, **given: Any) -> Any:
        nonlocal settings
        fits = isinstance(module, GradientCheckpointingLayer) and (not waiting or given == settings)
        if not fits or _weights(*waiting, module) > _MOST_WEIGHTS:
            shard_waiting()
        if not isinstance(module, GradientCheckpointingLayer):
            return original(module, **given)
        settings = given
        waiting.append(module)
        if len(waiting) == _MOST_LAYERS:
            shard_waiting()
        return module

    fsdp.fully_shard = fully_shard
    try:
        yield
    finally:
        fsdp.fully_shard = original
    shard_waiting()
    if most > 1:
        info("FSDP2 takes up to %d layers at a time", most)


def _weights(*modules: nn.Module) -> int:
    return sum(parameter.numel() for module in modules for parameter in module.parameters())
