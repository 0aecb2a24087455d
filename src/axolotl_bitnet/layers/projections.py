"""Query, key and value projections as one autograd function.

A short step waits for Python, not for the GPU, and three layers that read one tensor cost three times the
calls. Before an attention module runs, its three products are computed together and attached to the tensor
that it reads, where :class:`~axolotl_bitnet.layers.bitlinear.BitLinear` finds its own; under a compiler, to
an object in its place. The outputs and the
gradients of weights and biases are those of the separate layers, bit for bit; the gradient of x is summed in
the products, with one rounding less for each.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn

from .bitlinear import BitLinear, bitlinears, is_bare
from .shared_input import Projected, attach_outputs

_PROJECTIONS = ("q_proj", "k_proj", "v_proj")


def has_projections(attention: nn.Module) -> bool:
    """Whether the module has query, key and value projections that are ternary."""
    return all(type(getattr(attention, name, None)) is BitLinear for name in _PROJECTIONS)


def project_together(
    attention: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]
) -> tuple[tuple[Any, ...], dict[str, Any]] | None:
    """A forward pre-hook, with keywords, of an attention module that reads ``hidden_states``."""
    compiling = torch.compiler.is_compiling()
    x = args[0] if args else kwargs.get("hidden_states")
    if not isinstance(x, Tensor) or not (compiling or (x.requires_grad and torch.is_grad_enabled())):
        return None
    layers = [getattr(attention, name) for name in _PROJECTIONS]
    if not all(map(is_bare, layers)) or len({(layer.weight.dtype, layer.backward) for layer in layers}) > 1:
        return None
    outputs = bitlinears(x, [(layer.weight, layer.bias, layer.backward) for layer in layers])
    if not compiling:
        attach_outputs(x, layers, outputs)
        return None
    projected = Projected(x, layers, outputs)
    return ((projected, *args[1:]), kwargs) if args else (args, kwargs | {"hidden_states": projected})
