"""Ternary weights stay gathered from a step's first micro-batch to its last backward pass.

FSDP2 gathers a layer for every forward and again for every backward: eight times in a step of four
micro-batches. The CPU prepares each, and a small step waits for the CPU. But weights are constant until the
optimizer step (:mod:`axolotl_bitnet.layers.weight_codes`), and 2-bit codes are small. So they stay gathered,
even with ``reshard_after_forward: true``, which is there for weights of two bytes. In an evaluation every
module reshards as configured.

Reads ``_orig_size`` of ``FSDPParam``, and ``fsdp_params`` and ``_reshard_after_forward`` of
``FSDPParamGroup`` (torch 2.11, 2.13 and 2.14). Without them codes are gathered anew in every pass, with a
warning. Tests: tests/test_gather.py.
"""

from __future__ import annotations

from typing import Any

from accelerate.state import GradientState
from torch import nn
from torch.distributed.fsdp import FSDPModule

from ..layers.weight_codes import window
from .fsdp2_gather import ternary_params

_BYTES, _BYTES_TERNARY = 2.0, 0.25  # of a gathered parameter, of a gathered ternary one


def keep_gathered(model: nn.Module) -> int:
    """Keep gathered ternary weights for as long as they are declared constant, and accelerate's
    ``GradientState`` says that another micro-batch follows; after the last backward pass they are shards.

    Call it after :func:`~axolotl_bitnet.training.fsdp2_gather.gather_ternary`, between steps.

    Returns:
        How many modules stay gathered: those whose other parameters take no more than their codes.
    """
    resharding: dict[FSDPModule, bool] = {}  # after a forward, as configured
    for module, group, param in ternary_params(model):
        ternary = [each for each in group.fsdp_params if type(each) is type(param)]
        codes = sum(each._orig_size.numel() for each in ternary) * _BYTES_TERNARY
        others = sum(each._orig_size.numel() for each in group.fsdp_params if each not in ternary) * _BYTES
        if param.unit.stays or others <= codes:
            resharding[module], param.unit.stays = group._reshard_after_forward, True
    if resharding:
        model.register_forward_pre_hook(_Keep(resharding))
    return len(resharding)


class _Keep:
    """A forward pre-hook that tells modules when to reshard."""

    def __init__(self, resharding: dict[FSDPModule, bool]) -> None:
        self.resharding = resharding
        self.said: tuple[bool, bool] | None = None

    def __call__(self, model: nn.Module, args: tuple[Any, ...]) -> None:
        constant = model.training and window() is not None
        last = not constant or GradientState().sync_gradients
        if self.said == (constant, last):
            return
        self.said = constant, last
        for module, configured in self.resharding.items():
            module.set_reshard_after_forward(configured and not constant, recurse=False)
            module.set_reshard_after_backward(last, recurse=False)
