"""FSDP2's all-gather in 2 bits: every rank quantizes its own shard, and ternary codes travel.

A layer computes with codes, so codes are all that its other ranks need: a quarter of a byte a weight instead
of bfloat16's two. The absmean is of the whole weight: the ranks' float64 sums of all weights are added in one
all-reduce, when the first weight is gathered for a new forward. Latents never leave their shard, and the
gathered weight stays packed until a layer reads it.

FSDP2 asks its parameter objects what to gather and what to make of it. Those of BitLinear weights get a class
here that answers with codes; sharding, gradients, state dicts and clipping are FSDP2's own.

Changes ``FSDPParam`` of torch (run on 2.11, 2.13 and 2.14), by a subclass. Without one of its names, or where
the codes that arrive are not those of the whole weight (:mod:`axolotl_bitnet.training.gather_check`), weights
are gathered as FSDP2 does it, and the log says so. Tests: tests/test_gather.py, tests/test_upstream_names.py.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from contextlib import suppress
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.distributed.fsdp import FSDPModule
from torch.distributed.fsdp._fully_shard._fsdp_common import TrainingState
from torch.distributed.fsdp._fully_shard._fsdp_param import FSDPParam
from transformers import TrainerCallback

from .. import ops
from ..layers.bitlinear import BitLinear
from ..layers.gathered_weight import GatheredWeight
from ..ternary import absmean, scale_of
from .gather_check import problem_of
from .log import warn
from .ramp import ramping


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

    def of(self, index: int) -> tuple[Tensor, Tensor]:
        """``g`` float32 () and ``s`` bfloat16 (1,) of a weight: views, filled anew by :meth:`refresh`."""
        return self.g[index, 0], self.s[index, :1]

    def ready_for(self, param: _TernaryParam, backward: bool) -> None:
        """A second gather of the same weight for a forward is a new forward: weights may have changed. A
        backward wants the scales that its forward had."""
        if not backward:
            if param.round == self.round:
                self.refresh()
            param.round = self.round

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


class _TernaryParam(FSDPParam):
    """FSDP2's handle of a BitLinear weight, gathered as codes."""

    scales: _Scales
    index: int
    round: int
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
        backward = self.param_group._training_state == TrainingState.PRE_BACKWARD
        self.scales.ready_for(self, backward)
        g, _ = self.scales.of(self.index)
        return [ops.pack_shard(self.local(), g, self.padded_sharded_param_size[0]).view(-1)]

    def init_unsharded_param(self) -> None:
        if hasattr(self, "_unsharded_param"):
            return  # its bytes are gathered in place
        rows, columns = self._orig_size
        weight = GatheredWeight(
            self.all_gather_outputs[0].view(-1, columns),
            *self.scales.of(self.index),
            self.scales.group.size(),
            rows,
            self.param_dtype or self.orig_dtype,
        )
        self._unsharded_inner_tensors: list[Tensor] = []
        self._unsharded_param = nn.Parameter(weight, requires_grad=self.sharded_param.requires_grad)


def gather_ternary(model: nn.Module) -> int:
    """Gather the BitLinear weights of a model under FSDP2 as 2-bit codes from now on.

    Call it on every rank, after ``fully_shard``. The first forward must not be under way.

    Returns:
        How many weights: 0 if none is sharded. Those that are sharded otherwise than by rows, or resharded to
        a smaller mesh after the forward, are gathered as before.
    """
    found: dict[dist.ProcessGroup, list[_TernaryParam]] = {}
    for module in model.modules():
        if isinstance(module, FSDPModule):
            module.reshard()
            for group in _param_groups(module):
                process_group = getattr(group.mesh_info, "shard_process_group", None)
                if process_group is None or group._use_post_forward_mesh:
                    continue
                for param in group.fsdp_params:
                    if _is_ternary(param):
                        param.__class__ = _TernaryParam
                        param.param_group, param.round = group, 0
                        param.all_gather_outputs = []
                        vars(param).pop("_unsharded_param", None)
                        found.setdefault(process_group, []).append(param)
    for process_group, params in found.items():
        scales = _Scales(params, process_group)
        for index, param in enumerate(params):
            param.scales, param.index = scales, index
    return sum(map(len, found.values()))


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
    for _, group, param in _ternary_params(model):
        group._all_gather_result = None  # of a gather that failed
        local = param._sharded_local_tensor
        param.__class__ = FSDPParam
        for name in ("fsdp_pre_all_gather", "fsdp_post_all_gather"):
            delattr(local, name)
        param.all_gather_outputs = []
        vars(param).pop("_unsharded_param", None)


def _ternary_params(model: nn.Module) -> Iterator[tuple[FSDPModule, Any, Any]]:
    """The parameters that are gathered as codes, with their unit and their group."""
    for module in model.modules():
        if isinstance(module, FSDPModule):
            for group in _param_groups(module):
                for param in group.fsdp_params:
                    if isinstance(param, _TernaryParam):
                        yield module, group, param


def _try(model: nn.Module) -> str | None:
    """Gather codes from now on, if the codes of one layer arrive as they should; else why not."""
    try:
        if not gather_ternary(model):
            return None
        unit, _, param = next(_ternary_params(model))
        problem = problem_of(unit, param._module_info.module)
    except (AttributeError, TypeError) as error:
        problem = f"{type(error).__name__}: {error}"
    if problem:
        with suppress(AttributeError):  # where groups cannot be listed, nothing has been changed
            gather_weights(model)
    return problem


class GatherTernary(TrainerCallback):
    """Makes FSDP2 gather codes when training begins, for models are sharded by then; or when a ramp ends, for
    until then layers need latents."""

    def __init__(self, *references: nn.Module, required: bool = False) -> None:
        """
        Args:
            references: models beside the policy that may be sharded too.
            required: end the run where codes cannot be gathered, instead of gathering weights.
        """
        self.references, self.required = references, required
        self.done = False

    def on_train_begin(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        self.done = False
        self.on_step_begin(args, state, control, **kwargs)

    def on_step_begin(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        """Raise RuntimeError where codes are required and do not arrive."""
        if self.done or ramping(kwargs["model"]):
            return
        self.done = True
        problems = [_try(model) for model in (kwargs["model"], *self.references)]
        if not (reason := next(filter(None, problems), None)):
            return
        reason = f"torch {torch.__version__} gathers otherwise than is known here: {reason}"
        if self.required:
            raise RuntimeError(f"`bitnet.gather: ternary`: {reason}. Remove `gather`")
        warn(f"FSDP2 gathers weights as they are, not 2-bit codes: {reason}")
