"""What layers that read one tensor leave on it for each other: its codes, and outputs computed together.

It is an attribute of the tensor object, and is freed with it.
"""

from __future__ import annotations

import weakref
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from .. import ops


def shared_activation_codes(x: Tensor, dtype: torch.dtype) -> tuple[Tensor, Tensor]:
    """Codes and scales of ``x.to(dtype)``, made once for all layers that read the same tensor.

    They are an attribute of the tensor object, which q, k and v (or gate and up) get in turn, and are freed
    with it. A write through ``x.data`` between two readers is not detected. Only for a tensor of the graph:
    another may be the output of a CUDA graph, whose replays write to it undetected. Off in inference mode (no
    versions there) and under torch.compile (which finds common subexpressions itself).
    """
    if torch.compiler.is_compiling() or x.is_inference():
        return ops.quantize_activations(x.detach(), dtype)
    left = _left(x, _CODES)
    if left is not None and left[0] == dtype:
        return left[1], left[2]
    codes, r = ops.quantize_activations(x.detach(), dtype)
    if x.requires_grad:
        share_activation_codes(x, dtype, codes, r)
    return codes, r


def share_activation_codes(x: Tensor, dtype: torch.dtype, codes: Tensor, r: Tensor) -> None:
    """Leave on x the codes and scales of ``x.to(dtype)``, for :func:`shared_activation_codes`."""
    setattr(x, _CODES, _Left(weakref.ref(x), x._version, (dtype, codes, r)))


def leave_outputs(x: Tensor, layers: Sequence[nn.Module], outputs: Sequence[Tensor]) -> None:
    """Leave on x what the layers give for it; each takes its own when it is called, once."""
    by_layer = {id(layer): output for layer, output in zip(layers, outputs, strict=True)}
    setattr(x, _OUTPUTS, _Left(weakref.ref(x), x._version, by_layer))


def take_output(x: Tensor, layer: nn.Module) -> Tensor | None:
    """What was left on x for the layer, unless x has changed since."""
    if torch.compiler.is_compiling() or not torch.is_grad_enabled():
        return None
    left = _left(x, _OUTPUTS)
    return None if left is None else left.pop(id(layer), None)


_CODES = "_axolotl_bitnet_codes"
_OUTPUTS = "_axolotl_bitnet_outputs"


@dataclass(slots=True)
class _Left:
    """The attribute of a tensor. Copies and pickles of the tensor do not have it: their versions start
    anew."""

    owner: weakref.ref[Tensor]
    version: int
    value: Any

    def __deepcopy__(self, memo: Any) -> None:
        return None

    def __reduce__(self) -> Any:
        return _nothing, ()


def _left(x: Tensor, name: str) -> Any:
    left = getattr(x, name, None)
    return left.value if left is not None and left.owner() is x and left.version == x._version else None


def _nothing() -> None:
    return None
