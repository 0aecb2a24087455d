"""What layers that read one tensor attach to it for each other: its codes, and outputs computed together.

These are attributes of the tensor object, and are freed with it. A write through ``x.data`` between two
readers is not detected.
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

    Only for a tensor of the graph: another may be the output of a CUDA graph, whose replays write to it
    undetected. Off in inference mode (no versions there) and under torch.compile (which finds common
    subexpressions itself).
    """
    if torch.compiler.is_compiling() or x.is_inference():
        return ops.quantize_activations(x.detach(), dtype)
    attached = _attached(x, _CODES)
    if attached is not None and attached[0] == dtype:
        return attached[1], attached[2]
    codes, r = ops.quantize_activations(x.detach(), dtype)
    if x.requires_grad:
        share_activation_codes(x, dtype, codes, r)
    return codes, r


def share_activation_codes(x: Tensor, dtype: torch.dtype, codes: Tensor, r: Tensor) -> None:
    """Attach to x the codes and scales of ``x.to(dtype)``, for :func:`shared_activation_codes`."""
    setattr(x, _CODES, _Attached(weakref.ref(x), x._version, (dtype, codes, r)))


def attach_outputs(x: Tensor, layers: Sequence[nn.Module], outputs: Sequence[Tensor]) -> None:
    """Attach to x what the layers give for it; each takes its own when it is called, once."""
    by_layer = {id(layer): output for layer, output in zip(layers, outputs, strict=True)}
    setattr(x, _OUTPUTS, _Attached(weakref.ref(x), x._version, by_layer))


def take_output(x: Tensor, layer: nn.Module) -> Tensor | None:
    """What was attached to x for the layer, unless x has changed since."""
    if torch.compiler.is_compiling() or not torch.is_grad_enabled():
        return None
    attached = _attached(x, _OUTPUTS)
    return None if attached is None else attached.pop(id(layer), None)


class Projected:
    """What stands for x in a compiled attention module, whose projections of it have been computed: a
    compiler knows no attributes of tensors. Everything else is x's."""

    def __init__(self, x: Tensor, layers: Sequence[nn.Module], outputs: Sequence[Tensor]) -> None:
        self.x, self.pairs = x, tuple(zip(layers, outputs, strict=True))

    def output_of(self, layer: nn.Module) -> Tensor:
        return next(output for other, output in self.pairs if other is layer)

    def __getattr__(self, name: str) -> Any:
        return getattr(self.x, name)


_CODES = "_axolotl_bitnet_codes"
_OUTPUTS = "_axolotl_bitnet_outputs"


@dataclass(slots=True)
class _Attached:
    """The attribute of a tensor. Copies and pickles of the tensor do not have it: their versions start
    anew."""

    owner: weakref.ref[Tensor]
    version: int
    value: Any

    def __deepcopy__(self, memo: Any) -> None:
        return None

    def __reduce__(self) -> Any:
        return _nothing, ()


def _attached(x: Tensor, name: str) -> Any:
    found = getattr(x, name, None)
    return found.value if found is not None and found.owner() is x and found.version == x._version else None


def _nothing() -> None:
    return None
