"""``torch_compile: true`` compiles each layer on its own, its checkpoint inside; and the loss.

A small step waits for Python: it calls every operation of every layer, forward, again, and backward. A
compiled layer is two calls, and three with its checkpoint outside. A compiler that is given the whole model
meets FSDP2's hooks, and attention that reads from the GPU whether rows are packed; it gives up inside a
checkpoint, and the layers stay as they are (accelerate 1.13, torch 2.11: 16,017 launches a step instead of
16,161). What is inside a layer's forward, it compiles whole.
"""

from __future__ import annotations

from collections.abc import Callable
from functools import partial
from typing import Any

import torch
from torch import nn
from torch.distributed.algorithms._checkpoint.checkpoint_wrapper import CheckpointImpl, CheckpointWrapper
from torch.utils.checkpoint import CheckpointPolicy, checkpoint, create_selective_checkpoint_contexts
from transformers import TrainerCallback
from transformers.modeling_layers import GradientCheckpointingLayer

from .log import info, warn

_GRAPHS = 32
"""Of a layer, more than torch's own limit of 8: for training in a ramp and after it, for evaluations, ternary
and not, for the teacher; each for packed rows and others, and anew when lengths vary. Beyond it a layer runs
uncompiled."""

_KEEPS_WHAT_FUNCTIONS_COMPUTE = tuple(map(int, torch.__version__.split(".")[:2])) < (2, 13)


def compile_layers(model: Any, **settings: Any) -> int:
    """Compile the forward of each layer of a transformers model, in place, and the model's loss. A layer's
    checkpoint moves inside, a wrapper's or transformers' own, if it is torch's; hooks stay outside.

    Args:
        settings: for ``torch.compile``.

    Returns:
        How many layers.
    """
    places = [
        (parent, name, child)
        for parent in model.modules()
        if not isinstance(parent, CheckpointWrapper)
        for name, child in parent.named_children()
    ]
    count = 0
    for parent, name, child in places:
        wrapped = _checkpoint_of(child)
        layer = child if wrapped is None else child._checkpoint_wrapped_module
        if not isinstance(layer, GradientCheckpointingLayer):
            continue
        forward = layer.forward
        if wrapped is not None:
            parent.register_module(name, layer)
            forward = partial(wrapped, forward)
        elif _is_checkpointed(layer):
            layer._gradient_checkpointing_func = _call
            forward = partial(_checkpointed, forward)
        layer.forward = torch.compile(_called(forward), **settings)
        count += 1
    if count and hasattr(model, "loss_function"):  # keeps no logits in float32
        settings.pop("mode", None)  # a CUDA graph would copy the logits
        model.loss_function = torch.compile(model.loss_function, **settings)
    return count


def keep_gradients(model: nn.Module) -> None:
    """Give each parameter without a gradient one of zeros. A CUDA graph writes gradients to the same memory
    every time: the first micro-batch's, which autograd would keep as it is, would be the second's."""
    for parameter in model.parameters():
        if parameter.requires_grad and parameter.grad is None:
            parameter.grad = torch.zeros_like(parameter)


def _checkpoint_of(module: nn.Module) -> Callable[..., Any] | None:
    """The function that checkpoints the module's forward, if one does that a compiler can trace."""
    if not isinstance(module, CheckpointWrapper) or module.checkpoint_impl != CheckpointImpl.NO_REENTRANT:
        return None
    function: partial[Any] = module.checkpoint_fn
    if _KEEPS_WHAT_FUNCTIONS_COMPUTE and "context_fn" not in function.keywords:
        return partial(function, context_fn=_COMPUTE_ALL_AGAIN)
    return function


def _is_checkpointed(layer: GradientCheckpointingLayer) -> bool:
    """Whether transformers checkpoints the layer by torch's function, and only as it does by default."""
    function = getattr(layer, "_gradient_checkpointing_func", None)
    return (
        layer.gradient_checkpointing
        and isinstance(function, partial)
        and function.func is checkpoint
        and function.keywords.keys() <= {"use_reentrant"}
    )


def _call(function: Callable[..., Any], *args: Any) -> Any:
    return function(*args)


def _checkpointed(forward: Any, *args: Any, **kwargs: Any) -> Any:
    """A layer's forward with the checkpoint inside that transformers put around it: in training only. The
    reentrant kind cannot be traced; the other gives the same gradients."""
    if not forward.__self__.training:
        return forward(*args, **kwargs)
    policy: dict[str, Any] = {"context_fn": _COMPUTE_ALL_AGAIN} if _KEEPS_WHAT_FUNCTIONS_COMPUTE else {}
    return checkpoint(forward, *args, use_reentrant=False, **policy, **kwargs)


def _prefer_recompute(*_: Any, **__: Any) -> CheckpointPolicy:
    return CheckpointPolicy.PREFER_RECOMPUTE


_COMPUTE_ALL_AGAIN = partial(create_selective_checkpoint_contexts, _prefer_recompute)


def _called(function: Callable[..., Any]) -> Callable[..., Any]:
    """One code for all layers: what is compiled for the first serves the others."""

    def forward(*args: Any, **kwargs: Any) -> Any:
        return function(*args, **kwargs)

    return forward


class CompileLayers(TrainerCallback):
    """Calls :func:`compile_layers` when training begins, because layers are wrapped by then; and where they
    are CUDA graphs, :func:`keep_gradients` in each step."""

    def __init__(self, *others: Any, **settings: Any) -> None:
        """
        Args:
            others: models beside the trained one, such as its teacher.
            settings: for ``torch.compile``.
        """
        self.others, self.settings = others, settings

    def on_train_begin(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        config = torch._dynamo.config
        config.recompile_limit = max(config.recompile_limit, _GRAPHS)
        if count := sum(compile_layers(model, **self.settings) for model in (kwargs["model"], *self.others)):
            info("%d layers are compiled, each on its own", count)
        else:
            warn(
                "torch_compile: this model has no layers as transformers' models have, so nothing is compiled"
            )

    def on_step_begin(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        if self.settings.get("mode") in ("reduce-overhead", "max-autotune"):
            keep_gradients(kwargs["model"])
