"""Activations are checkpointed once a layer, where Axolotl and accelerate both wrapped for it.

accelerate 1.13 wraps the parts of each layer that FSDP2 shards, and Axolotl 0.19 wraps the layer: the parts'
forward is computed three times a step. The wrappers inside others are taken away. (Axolotl 0.21 wraps once.)
"""

from __future__ import annotations

from typing import Any

from torch import nn
from torch.distributed.algorithms._checkpoint.checkpoint_wrapper import CheckpointWrapper
from transformers import TrainerCallback

from .log import info


def checkpoint_once(model: nn.Module) -> int:
    """Take away the activation checkpoints that lie inside another one, in place.

    Returns:
        How many there were.
    """
    wrappers = [module for module in model.modules() if isinstance(module, CheckpointWrapper)]
    inner = {
        (parent, name): child
        for outer in wrappers
        for parent in outer._checkpoint_wrapped_module.modules()
        for name, child in parent.named_children()
        if isinstance(child, CheckpointWrapper)
    }
    for (parent, name), child in inner.items():
        parent.register_module(name, child._checkpoint_wrapped_module)
    return len(inner)


class CheckpointOnce(TrainerCallback):
    """Calls :func:`checkpoint_once` when training begins, because layers are wrapped by then."""

    def on_train_begin(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        if count := checkpoint_once(kwargs["model"]):
            info("each layer is checkpointed once: removed %d checkpoints inside others", count)
