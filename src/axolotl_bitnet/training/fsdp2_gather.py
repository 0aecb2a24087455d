"""FSDP2's all-gather in 2 bits: every rank quantizes its own shard, and ternary codes are gathered.

A layer computes with codes, so codes are all that its other ranks need: a quarter of a byte per weight
instead of bfloat16's two. The absmean is of the whole weight: the ranks' float64 sums of all weights are
added in one all-reduce, when the first weight is gathered for a new forward. Latents never leave their shard,
and the gathered weight stays packed until a layer reads it. While weights are declared constant
(:mod:`axolotl_bitnet.layers.weight_codes`), sums and bytes are made once and kept: a quarter of a byte a
local weight.

FSDP2 asks its parameter objects what to gather and what to make of it. Those of BitLinear weights get a class
here that answers with codes; sharding, gradients, state dicts and clipping are FSDP2's own. A small step is
limited by the CPU, so the weights of a module that FSDP2 gathers together are one tensor: the first answers
for all.

Changes ``FSDPParam`` of torch (run on 2.11, 2.13 and 2.14), by a subclass. Without one of its names, or where
the codes that arrive are not those of the whole weight (:mod:`axolotl_bitnet.training.gather_callback`),
weights are gathered as FSDP2 does it, with a warning. Tests: tests/test_gather.py,
tests/test_upstream_names.py.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from functools import cache
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.distributed.fsdp import FSDPModule
from torch.distributed.fsdp._fully_shard._fsdp_common import TrainingState
from torch.distributed.fsdp._fully_shard._fsdp_param import FSDPParam

from .. import ops
from ..layers.bitlinear import BitLinear
from ..layers.gathered_weight import GatheredLayer, GatheredWeight
from ..layers.weight_codes import Window, window
from ..ternary import absmean, scale_of


class _Scales:
    """The absmeans and scales of all weights that are sharded over one process group."""

    def __init__(self, params: list[_TernaryParam], group: dist.ProcessGroup) -> None:
        self.params, self.group = params, group
        device = params[0].device
        sizes = [float(param._orig_size.numel()) for param in params]
        self.sizes = torch.tensor(sizes, dtype=torch.float64, device=device)
        # 16 bytes each: kernels are compiled for addresses that are a multiple of that.
        self.g = torch.ones(len(params), 4, dtype=torch.float32, device=device)
        self.s = torch.ones(len(params), 8, dtype=torch.bfloat16, device=device)
        self.round = 0
        self.window: Window | None = None

    def of(self, index: int) -> tuple[Tensor, Tensor]:
        """``g`` float32 () and ``s`` bfloat16 (1,) of a weight: views, filled anew by :meth:`refresh`."""
        return self.g[index, 0], self.s[index, :1]

    def ready_for(self, unit: _Unit, backward: bool) -> None:
        """A second gather of the same weights for a forward is a new forward: they may have changed, unless
        they are declared constant. A backward needs the scales that its forward had."""
        current = window()
        if current is not None:
            if self.window is not current:
                self.refresh()
        elif not backward and unit.round == self.round:
            self.refresh()
        self.window, unit.round = current, self.round

    def refresh(self) -> None:
        parts = [ops.abs_sum_parts(param.local()) for param in self.params]
        sums = torch.stack(parts).sum(dim=1)
        dist.all_reduce(sums, group=self.group)
        g = absmean(sums, self.sizes)
        unchanged = torch.autograd._unsafe_preserve_version_counter  # type: ignore[attr-defined]
        with unchanged((self.g, self.s)):
            self.g[:, 0] = g
            self.s[:, 0] = scale_of(g)
        self.round += 1


class _Unit:
    """The ternary weights that FSDP2 gathers together, packed one after the other."""

    def __init__(self, params: list[_TernaryParam], scales: _Scales, first: int) -> None:
        """
        Args:
            params: in FSDP2's order.
            scales: of all weights; these have the indices from ``first`` on.
        """
        self.params, self.scales, self.first = params, scales, first
        shapes = [tuple(param._orig_size) for param in params]
        self.layout = _layout(scales.group.size(), tuple(shapes))
        self.gathered: GatheredLayer | None = None
        self.stays = False  # gathered while weights are constant
        self.round = 0
        self._kept: tuple[Window, Tensor] | None = None

    def packed(self, backward: bool) -> Tensor:
        """uint8 (``layout.packed_size``,): this rank's shards as codes."""
        self.scales.ready_for(self, backward)
        current = window()
        if current is not None and self._kept is not None and self._kept[0] is current:
            return self._kept[1]
        self._kept = None
        pieces: list[Tensor] = []
        for index, (param, part) in enumerate(zip(self.params, self.layout.parts, strict=True), self.first):
            g, _ = self.scales.of(index)
            pieces.append(ops.pack_shard(param.local(), g, part.shard_rows).view(-1))
            if gap := -pieces[-1].numel() % 16:
                pieces.append(pieces[-1].new_zeros(gap))
        packed = torch.cat(pieces) if len(pieces) > 1 else pieces[0]
        if current is not None and not self.stays:
            self._kept = current, packed
        return packed

    def weight(self, place: int, dtype: torch.dtype) -> GatheredWeight:
        """The gathered weight of the place-th parameter, whose bytes are gathered in place from now on."""
        if self.gathered is None:
            flat = self.params[0].all_gather_outputs[0]
            self.gathered = GatheredLayer(flat.view(self.layout.shards, -1), self.layout)
        part, scales = self.layout.parts[place], self.scales.of(self.first + place)
        return GatheredWeight(self.gathered.views[place], *scales, part.rows, dtype, self.gathered, place)

    def forget(self) -> None:
        if self.gathered is not None:
            self.gathered.forget()


_layout = cache(ops.ShardLayout)


class _TernaryParam(FSDPParam):
    """FSDP2's handle of a BitLinear weight, gathered as codes."""

    unit: _Unit
    place: int
    param_group: Any

    def local(self) -> Tensor:
        """This rank's shard (its rows, columns) on the device that computes."""
        return self._sharded_local_tensor.to(self.device, non_blocking=True)

    @property
    def _sharded_local_tensor(self) -> Tensor:
        local = self.sharded_param._local_tensor  # type: ignore[attr-defined]
        # FSDP2 casts and copies parameters in one go unless they have these.
        local.fsdp_pre_all_gather = local.fsdp_post_all_gather = None
        return local

    @property
    def all_gather_inputs(self) -> list[Tensor]:
        if self.place:
            return []  # the first has answered
        return [self.unit.packed(self.param_group._training_state == TrainingState.PRE_BACKWARD)]

    def init_unsharded_param(self) -> None:
        if not self.place:
            self.unit.forget()
        if hasattr(self, "_unsharded_param"):
            return  # its bytes are gathered in place
        self._unsharded_inner_tensors: list[Tensor] = []
        weight = self.unit.weight(self.place, self.param_dtype or self.orig_dtype)
        self._unsharded_param = nn.Parameter(weight, requires_grad=self.sharded_param.requires_grad)

    def free_unsharded_param(self) -> None:
        super().free_unsharded_param()
        if not self.place:
            self.unit.forget()


def gather_ternary(model: nn.Module) -> int:
    """Gather the BitLinear weights of a model under FSDP2 as 2-bit codes from now on.

    Call it on every rank, after ``fully_shard``. The first forward must not be under way.

    Returns:
        How many weights: 0 if none is sharded. Those that are sharded otherwise than by rows, or resharded to
        a smaller mesh after the forward, are gathered as before.
    """
    found: dict[dist.ProcessGroup, list[list[_TernaryParam]]] = {}
    for module in model.modules():
        if isinstance(module, FSDPModule):
            module.reshard()
            for group in _param_groups(module):
                process_group = getattr(group.mesh_info, "shard_process_group", None)
                if process_group is None or group._use_post_forward_mesh:
                    continue
                params = [param for param in group.fsdp_params if _is_ternary(param)]
                for param in params:
                    param.__class__ = _TernaryParam
                    param.param_group = group
                    param.all_gather_outputs = []
                    vars(param).pop("_unsharded_param", None)
                # On one GPU FSDP2 gathers nothing, and needs an answer from each.
                units = [params] if process_group.size() > 1 else [[param] for param in params]
                if params:
                    found.setdefault(process_group, []).extend(units)
    count = 0
    for process_group, units in found.items():
        together = [param for unit in units for param in unit]
        count += len(together)
        scales = _Scales(together, process_group)
        first = 0
        for unit in units:
            made = _Unit(unit, scales, first)
            first += len(unit)
            for place, param in enumerate(unit):
                param.unit, param.place = made, place
    return count


def _param_groups(module: FSDPModule) -> Iterable[Any]:
    state = module._get_fsdp_state()
    groups = getattr(state, "_fsdp_param_groups", None)  # one only, in torch before 2.12
    return groups if groups is not None else filter(None, [state._fsdp_param_group])


def _is_ternary(param: Any) -> bool:
    info = param._module_info
    return (
        type(param) is FSDPParam
        and isinstance(info.module, BitLinear)
        and info.param_name == "weight"
        and not param.is_dtensor
        and param.fsdp_placement.dim == 0
    )


def gather_weights(model: nn.Module) -> None:
    """Let FSDP2 gather whole weights again, undoing :func:`gather_ternary`. No weight may be gathered."""
    for _, group, param in ternary_params(model):
        group._all_gather_result = None  # of a gather that failed
        local = param._sharded_local_tensor
        param.__class__ = FSDPParam
        for name in ("fsdp_pre_all_gather", "fsdp_post_all_gather"):
            delattr(local, name)
        param.all_gather_outputs = []
        vars(param).pop("_unsharded_param", None)


def ternary_params(model: nn.Module) -> Iterator[tuple[FSDPModule, Any, Any]]:
    """The parameters that are gathered as codes, with their unit and their group."""
    for module in model.modules():
        if isinstance(module, FSDPModule):
            for group in _param_groups(module):
                for param in group.fsdp_params:
                    if isinstance(param, _TernaryParam):
                        yield module, group, param
