"""A model in training generates as a packed one does: from 2 bits a weight, by the kernels for a few rows.

GRPO's rollouts call the policy a token at a time, and a BitLinear would quantize its whole latents for each.
While :func:`packed_layers` is open they are quantized once and held as bytes, a quarter of a byte a weight,
freed at its end. So the codes are always those of the weights that generate: a change could not be detected
later (:mod:`axolotl_bitnet.layers.weight_codes` says why). The outputs are BitLinear's, bit for bit.

Layers that read one tensor (q, k and v; gate and up) are one product. A layer is left alone that has no
kernels (on a CPU its codes would be unpacked at every call), whose weight is sharded (FSDP2, ZeRO-3), that a
ramp or a hook changes, or whose rows do not fill bytes.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from types import MethodType
from typing import Any, TypeGuard

import torch
from torch import Tensor, nn

from ..layers.bitlinear import BitLinear, compute_dtype, is_bare, no_autocast
from ..ops import ROWS_PER_BYTE, has_kernels, pack_codes, packed_matmul, ternarize

_TOGETHER = (("q_proj", "k_proj", "v_proj"), ("gate_proj", "up_proj"))


def generate_packed(model: Any) -> None:
    """Make a transformers model's ``generate`` run its ternary layers packed, on this instance only."""
    if "generate" not in vars(model):  # a method that somebody else put there may do without the layers
        model.generate = MethodType(_generate, model)


def _generate(model: Any, *args: Any, **options: Any) -> Any:
    # Compiled layers run as they are: each layer and length would be a graph, up to the number that a
    # function may have, and none would be left for training.
    with packed_layers(model), torch.compiler.set_stance("force_eager"):
        return type(model).generate(model, *args, **options)


@contextmanager
def packed_layers(model: nn.Module) -> Iterator[int]:
    """Run a model's BitLinears from 2-bit weights inside this block, where they can be; yields how many.

    No weight may change inside it. With gradients enabled the layers are BitLinears as always.
    """
    packed: list[_PackedBitLinear] = []
    try:
        for layers in _groups(model):
            together = _Together(layers)
            for place, layer in enumerate(layers):
                layer.__class__ = _PackedBitLinear
                assert isinstance(layer, _PackedBitLinear)
                layer.together, layer.place = together, place
                packed.append(layer)
        yield len(packed)
    finally:
        for layer in packed:
            del layer.together, layer.place
            layer.__class__ = BitLinear  # type: ignore[assignment]


class _PackedBitLinear(BitLinear):
    """What a BitLinear is inside :func:`packed_layers`."""

    together: _Together
    place: int

    def forward(self, input: Tensor) -> Tensor:
        if torch.is_grad_enabled():
            return super().forward(input)
        return self.together.output(self.place, input)


class _Together:
    """The bytes of layers that read one tensor, one below the other, and what they gave for the last one.

    Args:
        layers: all of them with a bias, or none.
    """

    def __init__(self, layers: Sequence[BitLinear]) -> None:
        coded = [ternarize(layer.weight.detach()) for layer in layers]
        self.sizes = [layer.out_features for layer in layers]
        self.packed = torch.cat([pack_codes(codes) for codes, _, _ in coded])
        self.s = torch.cat([s for _, s, _ in coded]).to(torch.float32)
        biases = [layer.bias.detach() for layer in layers if layer.bias is not None]
        self.bias = torch.cat(biases) if biases else None
        self._x: Tensor | None = None
        self._outputs: dict[int, Tensor] = {}

    def output(self, place: int, x: Tensor) -> Tensor:
        """The place-th layer's output. The first of the layers to ask for an x computes those of all."""
        if torch.compiler.is_compiling():  # without what lies between two calls
            row = sum(self.sizes[:place])
            return self._product(x, row, row + self.sizes[place], slice(place, place + 1))
        if self._x is not x or place not in self._outputs:
            self._outputs = dict(
                enumerate(self._product(x, 0, sum(self.sizes), slice(None)).split(self.sizes, dim=-1))
            )
        output = self._outputs.pop(place)
        self._x = x if self._outputs else None
        return output

    def _product(self, x: Tensor, begin: int, end: int, matrices: slice) -> Tensor:
        """Of some of the matrices, which have these rows."""
        dtype, bias = compute_dtype(x), None if self.bias is None else self.bias[begin:end]
        packed = self.packed[begin // ROWS_PER_BYTE : end // ROWS_PER_BYTE]
        with no_autocast(x):
            return packed_matmul(x, packed, self.s[matrices], self.sizes[matrices], bias, dtype)


def _groups(model: nn.Module) -> list[list[BitLinear]]:
    """The layers that can run packed, each once; those that read one tensor together."""
    found: list[list[BitLinear]] = []
    grouped: set[nn.Module] = set()
    for module in model.modules():
        for names in _TOGETHER:
            layers = [layer for name in names if _can_be_packed(layer := getattr(module, name, None))]
            alike = len(layers) == len(names) and len({layer.bias is None for layer in layers}) == 1
            if alike and grouped.isdisjoint(layers):
                found.append(layers)
                grouped.update(layers)
    alone = [module for module in model.modules() if module not in grouped and _can_be_packed(module)]
    return found + [[layer] for layer in alone]


def _can_be_packed(layer: Any) -> TypeGuard[BitLinear]:
    return (
        isinstance(layer, BitLinear)
        and is_bare(layer)
        and type(layer.weight) is nn.Parameter
        and has_kernels(layer.weight)
        and layer.weight.numel() > 0
        and layer.out_features % ROWS_PER_BYTE == 0
    )
