"""The whole weights of a live model, one unit or one matrix at a time, however it is sharded.

FSDP2 keeps rows of each matrix (DTensors); the pieces of FSDP1 (of a flat parameter) and of ZeRO-3 end
anywhere in a row. All ranks must gather, in the same order.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager, nullcontext
from typing import Any

import torch
from torch import Tensor, nn

from ..layers.bitlinear import BitLinear
from ..layers.gathered_weight import GatheredWeight


def whole_weights(model: nn.Module) -> Iterator[tuple[str, Tensor]]:
    """Names and whole latents (out_features, in_features) of a model's BitLinear layers, to be read only.

    A weight is whole until the next one is asked for: go through all of them, on every rank. At most one
    FSDP1 unit, or one matrix, is gathered at a time.

    Raises:
        RuntimeError: a weight is sharded by something else; the message names its layer.
    """
    units = _fsdp1_units(model)
    held: dict[str | None, list[tuple[str, BitLinear]]] = {None: [], **{name: [] for name in units}}
    for name, module in model.named_modules():
        if isinstance(module, BitLinear):
            held[_innermost(name, units)].append((name, module))
    for unit, layers in held.items():
        # The outermost unit comes first even without layers: FSDP1 takes the first it sees for the root.
        if layers or (unit is not None and _outermost(unit, units)):
            with nullcontext() if unit is None else _summoned(units[unit]):
                for name, layer in layers:
                    with gathered(layer.weight):
                        yield name, _whole(name, layer)


def gathered(weight: Tensor, write: bool = False) -> AbstractContextManager[Any]:
    """Gathers a weight that ZeRO-3 partitioned, within the block; does nothing to any other.

    Args:
        weight: the parameter.
        write: whether rank 0's changes are kept, on all ranks.
    """
    if not hasattr(weight, "ds_id"):
        return nullcontext()
    import deepspeed

    return deepspeed.zero.GatheredParameters([weight], modifier_rank=0 if write else None)


def fsdp1_unit_of(model: nn.Module) -> Callable[[nn.Module], nn.Module | None]:
    """A function that gives the FSDP1 unit which holds a module's weights, or None."""
    units = _fsdp1_units(model)
    names = {id(module): name for name, module in model.named_modules()} if units else {}

    def unit_of(module: nn.Module) -> nn.Module | None:
        unit = _innermost(names[id(module)], units) if units else None
        return None if unit is None else units[unit]

    return unit_of


def _whole(name: str, layer: BitLinear) -> Tensor:
    weight: Any = layer.weight
    if isinstance(weight, GatheredWeight):  # the codes are whole
        return weight
    if hasattr(weight, "device_mesh"):  # a DTensor, whose shards may be offloaded to the CPU
        weight = weight.to(weight.device_mesh.device_type).full_tensor()
    shape = (layer.out_features, layer.in_features)
    if weight.shape != shape or (weight.numel() and not weight.untyped_storage().size()):
        raise RuntimeError(
            f"{name}: its weight is a shard of shape {tuple(weight.shape)}, not {shape}, and not one of FSDP "
            "or ZeRO-3 that could be gathered. Pass the wrapped model, with its process group alive"
        )
    return weight


def _fsdp1_units(model: nn.Module) -> dict[str, nn.Module]:
    if not (torch.distributed.is_available() and torch.distributed.is_initialized()):
        return {}
    from torch.distributed.fsdp import FullyShardedDataParallel

    return {n: module for n, module in model.named_modules() if isinstance(module, FullyShardedDataParallel)}


def _summoned(unit: Any) -> AbstractContextManager[Any]:
    return unit.summon_full_params(unit, recurse=False, writeback=False)


def _innermost(name: str, units: dict[str, nn.Module]) -> str | None:
    """The unit that holds the module of this name: the one with the longest name that begins it."""
    parts = name.split(".") if name else []
    prefixes = (".".join(parts[:count]) for count in range(len(parts), -1, -1))
    return next((prefix for prefix in prefixes if prefix in units), None)


def _outermost(name: str, units: dict[str, nn.Module]) -> bool:
    return name == "" or _innermost(name.rpartition(".")[0], units) is None
