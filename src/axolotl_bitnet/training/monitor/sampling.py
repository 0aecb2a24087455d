"""Which latents are measured, wherever a matrix's shards are.

Exact counts would read every latent at every log, which is too slow for a training step. So of each matrix
the same elements are measured each time: all of a small one, else every n-th (n has no factor in common with
the length of a row, so that all columns occur).

Each rank measures its own shard of a matrix, and the sums are added over the ranks.
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor, nn

from ...layers.bitlinear import BitLinear
from ...model.whole_weights import fsdp1_unit_of

ELEMENTS = 2**23
"""Elements measured in a model, at most. Each matrix has an equal part, whether it needs it or not."""


class Unwatchable(RuntimeError):
    """The latents cannot be measured; the message has the reason."""


@dataclass(frozen=True)
class Piece:
    """What this rank measures of a matrix.

    Attributes:
        elements: (count,), a view of this rank's shard.
        stands_for: how many elements of the shard each of them stands for.
        groups: the process groups that the matrix is sharded over.
        device: where to compute.
    """

    elements: Tensor
    stands_for: float
    groups: tuple[dist.ProcessGroup, ...]
    device: torch.device


def pieces_of(model: nn.Module, layers: Mapping[str, BitLinear]) -> list[Piece]:
    most = max(ELEMENTS // len(layers), 1)
    unit_of = fsdp1_unit_of(model)
    pieces = []
    for name, layer in layers.items():
        local, groups, device = _shard(name, layer.weight, unit_of(layer))
        ranks = math.prod(group.size() for group in groups)
        numel = local.numel()
        step = max(-(-numel * ranks // most), 1)
        while math.gcd(step, layer.in_features) > 1:
            step += 1
        count = -(-numel // step)
        elements = local.contiguous().as_strided((count,), (step,))
        pieces.append(Piece(elements, numel / count if count else 0.0, groups, device))
    return pieces


def _shard(name: str, weight: Any, unit: Any) -> tuple[Tensor, tuple[dist.ProcessGroup, ...], torch.device]:
    """This rank's part of a weight, the groups over which the parts are spread, and the device."""
    if hasattr(weight, "ds_id"):
        raise Unwatchable("under ZeRO-3 no rank holds a whole weight, and measuring would gather all of them")
    if hasattr(weight, "device_mesh"):
        mesh = weight.device_mesh
        dims = [dim for dim, placement in enumerate(weight.placements) if placement.is_shard()]
        groups = tuple(mesh.get_group(dim) for dim in dims)
        local = weight.to_local().detach()
        device = local.device
        if device.type != mesh.device_type:  # offloaded
            device = torch.device(
                mesh.device_type, torch.get_device_module(mesh.device_type).current_device()
            )
        return local, groups, device
    if unit is not None:
        if not isinstance(weight, nn.Parameter):
            raise Unwatchable(
                "FSDP1 flattens weights (use_orig_params: false) and keeps none of their shapes"
            )
        if weight.dim() == 1:
            return weight.detach(), (unit.process_group,), weight.device
    return weight.detach(), (), weight.device


def batches_of(pieces: list[Piece]) -> list[list[int]]:
    """Indices of pieces that fit into one tensor."""
    found: dict[Any, list[int]] = {}
    for index, piece in enumerate(pieces):
        elements = piece.elements
        if elements.numel():
            key = (elements.numel(), elements.dtype, elements.device)
            found.setdefault(key, []).append(index)
    return list(found.values())


def add_shards(values: Tensor, pieces: list[Piece]) -> Tensor:
    """Add up rows of ``values`` (a matrix each) over the ranks that hold parts of that matrix."""
    rows: dict[tuple[dist.ProcessGroup, ...], list[int]] = {}
    for index, piece in enumerate(pieces):
        rows.setdefault(piece.groups, []).append(index)
    rows.pop((), None)  # whole, here
    for groups, indices in rows.items():
        part = values[indices]
        for group in groups:
            dist.all_reduce(part, group=group)
        values[indices] = part
    return values


def fsdp2_class() -> Any:
    if not dist.is_available():
        return ()
    from torch.distributed.fsdp import FSDPModule

    return FSDPModule
