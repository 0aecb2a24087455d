"""The codes of a weight, from its latents, from what was kept of them, or from a gathered weight.

A step of several micro-batches, or with activation checkpointing, reads every weight more than once, and
would quantize it each time. A change in between cannot be detected: fused optimizers do not increase a
weight's version, and writes through ``.data`` never do. So nothing is kept unless the training loop declares
that no weight changes, and until when. Here the Trainer's own callbacks do, from the first micro-batch to the
optimizer step. A byte per weight is kept; under FSDP2, where no rank has whole weights to keep, the gather
packs each shard once instead. Compiled layers keep codes where they read few rows: there Python takes longer
to make codes than the GPU to use them. A step of any torch optimizer ends the window too, in case an
interrupted run left it open.
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
FEW_ROWS = 8191
"""Rows of x, at most, with which compiled layers keep codes."""


class Window:
    """A time in which no weight changes, and the codes kept for it."""

    def __init__(self, whole: bool, compiled: bool) -> None:
        self.whole, self.compiled = whole, compiled
        self.kept: dict[int, tuple[Tensor, int, _Codes]] = {}


_window: Window | None = None
_inside_compiled = False


def ternarize(weight: Weight, rows: int = 0) -> _Codes:
    """:func:`axolotl_bitnet.ops.ternarize`, once for as long as the weights are declared constant.

    Args:
        rows: of the x that is multiplied with the weight.
    """
    if isinstance(weight, Shards):
        return weight.codes(), weight.s, weight.g
    if torch.compiler.is_compiling():
        return ops.ternarize(weight)
    if type(weight) is GatheredWeight:  # not through torch's dispatcher: it takes longer than a launch
        return weight.codes(), weight.s, weight.g
    if _window is None or not _window.whole:
        return ops.ternarize(weight)
    if _inside_compiled:
        if not _window.compiled or rows > FEW_ROWS:
            return ops.ternarize(weight)
        codes, s, g = _kept(_window, weight)
        return codes, s, g.clone()
    return _kept(_window, weight)


def _kept(window: Window, weight: Tensor) -> _Codes:
    """By address, for a compiler's code gives other objects of the same storage; that of an entry is held by
    its weight."""
    address = weight.data_ptr()
    entry = window.kept.get(address)
    if entry is not None and entry[1] == weight._version and _alike(entry[0], weight, address):
        return entry[2]
    codes = ops.ternarize(weight)
    window.kept[address] = weight, weight._version, codes
    return codes


def _alike(one: Tensor, other: Tensor, address: int) -> bool:
    return (
        one.data_ptr() == address
        and one.dtype == other.dtype
        and one.shape == other.shape
        and one.stride() == other.stride()
    )


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


def keep_weight_codes(whole: bool = True, compiled: bool = False) -> None:
    """Declare all weights constant from now on. What an earlier call kept is dropped.

    Args:
        whole: keep the codes of whole weights. Under FSDP these are not there for long.
        compiled: compiled layers keep them too. They must not be CUDA graphs, which read the same memory
            every time.
    """
    global _window
    _forget_after_optimizer_steps()
    _window = Window(whole, compiled)


def forget_weight_codes() -> None:
    """Declare that weights may change from now on."""
    global _window
    _window = None


def window() -> Window | None:
    """The window without a change that is open now, if there is one."""
    return _window


@contextmanager
def inside_compiled() -> Iterator[None]:
    """Around what a compiler's code calls: it may write to what it is given, so no kept absmean is given."""
    global _inside_compiled
    before, _inside_compiled = _inside_compiled, True
    try:
        yield
    finally:
        _inside_compiled = before


@cache
def _forget_after_optimizer_steps() -> None:
    register_optimizer_step_post_hook(lambda *_: forget_weight_codes())


@contextmanager
def weights_unchanged(compiled: bool = False) -> Iterator[None]:
    """For a training loop of your own: no weight changes inside this block. ``compiled`` is that of
    :func:`keep_weight_codes`."""
    keep_weight_codes(compiled=compiled)
    try:
        yield
    finally:
        forget_weight_codes()
