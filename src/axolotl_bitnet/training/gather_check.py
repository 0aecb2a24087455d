"""Before training, FSDP2's gather of codes is tried on one layer: do the codes of the whole weight arrive?

The gather uses torch's private parameter objects (:mod:`axolotl_bitnet.training.fsdp2_gather`). A torch that
renamed one of their names, or calls them in another order, fails here, and the run gathers weights.
Without this check it would end later, or train something else.
"""

from __future__ import annotations

import torch
import torch.distributed as dist
from torch.distributed.fsdp import FSDPModule

from .. import ops
from ..layers.bitlinear import BitLinear
from ..layers.gathered_weight import GatheredWeight
from ..model.whole_weights import whole_weights


def problem_of(unit: FSDPModule, layer: BitLinear) -> str | None:
    """Gather one layer, on every rank, and compare it with its whole latents.

    Args:
        unit: what FSDP2 gathers at once; sharded at the moment, as it is afterwards.
        layer: one in it whose codes are to be gathered.

    Returns:
        On all ranks, what is wrong on one of them; None if the codes that arrived are the right ones.
    """
    found: str | None = None
    try:
        with torch.no_grad():
            ((_, whole),) = whole_weights(layer)
            expected = ops.ternarize(whole)[:2]
            unit.unshard()
            weight = layer.weight
            if not isinstance(weight, GatheredWeight):
                found = "a whole weight arrived instead of codes"
            elif not (torch.equal(weight.codes(), expected[0]) and torch.equal(weight.s, expected[1])):
                found = "other codes arrived than those of the whole weight"
            unit.reshard()
    except Exception as error:  # of torch's own, whatever it is that has changed there
        found = f"{type(error).__name__}: {error}"
    failed = torch.tensor(float(found is not None), device=layer.weight.device_mesh.device_type)  # type: ignore[attr-defined]
    dist.all_reduce(failed)
    return found or ("another process failed" if failed else None)
