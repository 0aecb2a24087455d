"""Ternary codes kept while no weight can change: between one optimizer step and the next.

A step of several micro-batches, or with activation checkpointing, reads every weight more than once, and
would quantize it each time. Whether a weight changed in between cannot be told by looking: fused optimizers
do not bump its version, and writes through ``.data`` never do. So nothing is kept unless the one who runs the
loop says that no weight changes, and until when: here the Trainer's own callbacks do, from the first
micro-batch to the optimizer step. What is kept is a byte a weight. A step of any torch optimizer ends the
window too, should an interrupted run have left it open.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from functools import cache

import torch
from torch import Tensor
from torch.optim.optimizer import register_optimizer_step_post_hook

from .. import ops

_Codes = tuple[Tensor, Tensor, Tensor]  # codes, s, g
_kept: dict[int, tuple[Tensor, int, int, _Codes]] | None = None


def ternarize(weight: Tensor) -> _Codes:
    """:func:`axolotl_bitnet.ops.ternarize`, once for as long as the weights are said not to change."""
    if torch.compiler.is_compiling() or _kept is None:
        return ops.ternarize(weight)
    address = weight.data_ptr()
    entry = _kept.get(id(weight))
    if entry is not None and entry[0] is weight and entry[1:3] == (weight._version, address):
        return entry[3]
    codes = ops.ternarize(weight)
    _kept[id(weight)] = weight, weight._version, address, codes
    return codes


def keep_weight_codes() -> None:
    """From now on, no weight changes. What an earlier call kept is forgotten."""
    global _kept
    _forget_after_optimizer_steps()
    _kept = {}


def forget_weight_codes() -> None:
    """From now on, weights may change."""
    global _kept
    _kept = None


@cache
def _forget_after_optimizer_steps() -> None:
    register_optimizer_step_post_hook(lambda *_: forget_weight_codes())


@contextmanager
def weights_unchanged() -> Iterator[None]:
    """For training loops of one's own: no weight changes inside this block."""
    keep_weight_codes()
    try:
        yield
    finally:
        forget_weight_codes()
