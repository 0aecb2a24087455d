"""The codes of a weight, from its latents, from what was kept of them, or from a gathered weight.

A step of several micro-batches, or with activation checkpointing, reads every weight more than once, and
would quantize it each time. A change in between cannot be detected: fused optimizers do not increase a
weight's version, and writes through ``.data`` never do. So nothing is kept unless the training loop declares
that no weight changes, and until when. Here the Trainer's own callbacks do, from the first micro-batch to the
optimizer step. A byte per weight is kept; under FSDP2, where no rank has whole weights to keep, the gather
packs each shard once instead. A step of any torch optimizer ends the window too, in case an interrupted run
left it open.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from functools import cache

import torch
from torch import Tensor
from torch.optim.optimizer import register_optimizer_step_post_hook

from .. import ops
from .gathered_weight import GatheredWeight, Shards

Weight = Tensor | Shards
_Codes = tuple[Tensor, Tensor, Tensor]  # codes, s, g


class Window:
    """A time in which no weight changes, and the codes kept for it."""

    def __init__(self, whole: bool) -> None:
        self.whole = whole
        self.kept: dict[int, tuple[Tensor, int, int, _Codes]] = {}


_window: Window | None = None


def ternarize(weight: Weight) -> _Codes:
    """:func:`axolotl_bitnet.ops.ternarize`, once for as long as the weights are declared constant."""
    if isinstance(weight, Shards):
        return weight.codes(), weight.s, weight.g
    if torch.compiler.is_compiling():
        return ops.ternarize(weight)
    if type(weight) is GatheredWeight:  # not through torch's dispatcher: it takes longer than a launch
        return weight.codes(), weight.s, weight.g
    if _window is None or not _window.whole:
        return ops.ternarize(weight)
    kept, address = _window.kept, weight.data_ptr()
    entry = kept.get(id(weight))
    if entry is not None and entry[0] is weight and entry[1:3] == (weight._version, address):
        return entry[3]
    codes = ops.ternarize(weight)
    kept[id(weight)] = weight, weight._version, address, codes
    return codes


def dequantized_weight(weight: Weight, g: Tensor, dtype: torch.dtype) -> Tensor:
    """:func:`axolotl_bitnet.ops.dequantized_weight` of latents or of a gathered weight."""
    if isinstance(weight, Shards):
        return weight.dense(dtype)
    if type(weight) is GatheredWeight and not torch.compiler.is_compiling():
        return weight.dense(dtype)
    return ops.dequantized_weight(weight, g, dtype)


def transposed_codes(weight: Weight, g: Tensor) -> tuple[Tensor, Tensor]:
    """:func:`axolotl_bitnet.ops.transposed_codes` of latents or of a gathered weight."""
    if isinstance(weight, Shards):
        return weight.transposed_codes(), weight.s
    if type(weight) is GatheredWeight and not torch.compiler.is_compiling():
        return weight.transposed_codes(), weight.s
    return ops.transposed_codes(weight, g)


def keep_weight_codes(whole: bool = True) -> None:
    """Declare all weights constant from now on. What an earlier call kept is dropped.

    Args:
        whole: keep the codes of whole weights. Under FSDP these are not there for long.
    """
    global _window
    _forget_after_optimizer_steps()
    _window = Window(whole)


def forget_weight_codes() -> None:
    """Declare that weights may change from now on."""
    global _window
    _window = None


def window() -> Window | None:
    """The window without a change that is open now, if there is one."""
    return _window


@contextmanager
def made_anew() -> Iterator[None]:
    """Inside, no codes are kept, nor are kept ones given."""
    global _window
    before, _window = _window, None
    try:
        yield
    finally:
        _window = before


@cache
def _forget_after_optimizer_steps() -> None:
    register_optimizer_step_post_hook(lambda *_: forget_weight_codes())


@contextmanager
def weights_unchanged() -> Iterator[None]:
    """For a training loop of your own: no weight changes inside this block."""
    keep_weight_codes()
    try:
        yield
    finally:
        forget_weight_codes()
