"""A start for dense bases: latents fitted to the ternary grid before the first step.

1. A few batches of the run's own data go through the dense model. Of each layer's input, the mean square of
   every column is kept (each token normalized to size 1, so that attention's sinks count as one token): a
   vector per layer, whatever the model's size.
2. For each matrix the scale alpha that gives the least squared error of the layer's output, on a grid: by the
   mean squares h, ``sum_ij h_j (W - alpha round(W / alpha))_ij^2``.
3. The matrix is stretched (:mod:`axolotl_bitnet.layers.stretch`) to have alpha for its mean magnitude.

The result is two numbers per matrix. Checkpoints keep them: a ramp reads them, on resume too. Sums are over
shards where FSDP2 has sharded a matrix by rows.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Iterable, Iterator
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.distributed.fsdp import FSDPModule
from torch.distributed.tensor import DTensor, Shard
from transformers import TrainerCallback

from ..layers.bitlinear import BitLinear
from ..layers.stretch import stretched
from ..model.fingerprint import clean_name
from .log import info
from .ramp import set_ramp

TOKENS, WINDOW = 16_384, 2_048
FACTORS = [0.9 + 0.05 * i for i in range(27)]
"""alpha over the mean magnitude; 1.5 is normal weights' best."""

Total = Callable[[Tensor], Tensor]
Fits = dict[str, list[float]]
"""alpha and k by the clean name of a layer."""


class StretchError(ValueError):
    """Latents cannot be fitted to this base or with this data; the message has the reason."""


def fit(weight: Tensor, squares: Tensor, total: Total = lambda part: part) -> tuple[Tensor, Tensor] | None:
    """alpha and k of a matrix, float32 (); None of a matrix of zeros.

    Args:
        weight: (rows, columns), or some of the rows.
        squares: float32 (columns,), the mean square of the input's columns.
        total: adds a tensor up over the ranks that hold the other rows.
    """
    size = weight.to(torch.float32).abs()
    number, whole = total(torch.stack([size.new_tensor(size.numel()), size.sum()]).double())
    g = (whole / number).float()
    if not bool(torch.isfinite(g)) or not bool(g > 0):
        return None
    errors = []
    for factor in FACTORS:
        alpha = factor * g
        error = size - (size >= alpha / 2) * alpha
        errors.append((error.square_().sum(0) * squares).sum())
    alpha = FACTORS[int(total(torch.stack(errors).double()).argmin())] * g
    beyond = size >= alpha / 2
    inside = (size * ~beyond).sum()
    room = (size - alpha / 2).mul_(beyond).sum()
    count, inside, room = total(torch.stack([beyond.sum(), inside, room]).double())
    k = (number * alpha - inside - count * alpha / 2) / room.clamp(min=1e-30)
    return alpha, k.clamp(0.05, 100.0).float()


@torch.no_grad()
def stretch_latents(model: nn.Module, inputs: Iterable[Tensor]) -> Fits:
    """Fit all BitLinear layers of a dense model to the grid, in place. Every rank calls it, with the same
    inputs.

    Args:
        model: a converted model whose latents are dense weights; it may be sharded by FSDP2, before its
            weights are gathered as codes.
        inputs: int64 (1, tokens) each.

    Returns:
        alpha and k by layer. Matrices of zeros are left alone.
    """
    layers = {clean_name(name): m for name, m in model.named_modules() if isinstance(m, BitLinear)}
    squares = _mean_squares(model, layers, inputs)
    fits: Fits = {}
    for name, layer in layers.items():
        local, total = _rows(layer.weight)
        found = fit(local.to(squares[name].device), squares[name], total)
        if found is None:
            continue
        alpha, k = _of_rank_0(torch.stack(found))
        local.copy_(stretched(local.to(alpha.device), alpha, k))
        fits[name] = [float(alpha), float(k)]
    return fits


def remember(model: nn.Module, fits: Fits) -> None:
    """Let the ramp of stretched layers begin at the dense matrices."""
    for name, layer in model.named_modules():
        if isinstance(layer, BitLinear) and (found := fits.get(clean_name(name))):
            layer.stretch = torch.tensor(found, dtype=torch.float32, device=layer.weight.device)


def windows(rows: Iterable[Any], length: int, tokens: int = TOKENS) -> Iterator[Tensor]:
    """``tokens`` tokens from the beginning of a dataset, as int64 (1, length) each; samples follow one
    another.

    Raises:
        StretchError: the rows hold no ``input_ids``.
    """
    held = torch.empty(0, dtype=torch.int64)
    for row in rows:
        if "input_ids" not in row:
            raise StretchError(
                f"`bitnet.start: stretch` reads `input_ids` of the training data, which has {sorted(row)}. "
                "Remove it from the config"
            )
        held = torch.cat([held, torch.as_tensor(row["input_ids"]).flatten()])
        while len(held) >= length:
            yield held[None, :length]
            held, tokens = held[length:], tokens - length
            if tokens <= 0:
                return
    if len(held):
        yield held[None]


class Stretch(TrainerCallback):
    """Stretches the latents as training begins; in a resumed run it only gives the layers their alpha and k.

    Args:
        trainer: for its data and device.
        length: tokens of a sample.
        record: gets alpha and k as ``record["stretch"]["layers"]``; already there in a resumed run.
    """

    def __init__(self, trainer: Any, length: int, record: dict[str, Any]) -> None:
        self.trainer, self.length, self.record = trainer, length, record

    def on_train_begin(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        model = getattr(kwargs["model"], "_orig_mod", kwargs["model"])
        found = self.record.setdefault("stretch", {})
        if "layers" not in found:
            began = time.monotonic()
            device = next(iter(model.parameters())).device if args.device is None else args.device
            rows = windows(self.trainer.train_dataset, min(self.length, WINDOW))
            found["layers"] = stretch_latents(model, (ids.to(device) for ids in rows))
            info(
                "%d matrices stretched to the ternary grid in %.1f s",
                len(found["layers"]),
                time.monotonic() - began,
            )
        remember(model, found["layers"])


def _mean_squares(
    model: nn.Module, layers: dict[str, BitLinear], inputs: Iterable[Tensor]
) -> dict[str, Tensor]:
    sums: dict[str, Tensor] = {}

    def watch(name: str) -> Callable[[nn.Module, tuple[Tensor, ...]], None]:
        def add(_: nn.Module, args: tuple[Tensor, ...]) -> None:
            x = args[0].detach().float().flatten(0, -2).square()
            part = (x / x.mean(-1, keepdim=True).clamp(min=1e-24)).sum(0)
            sums[name] = sums[name] + part if name in sums else part

        return add

    was_training = model.training
    hooks = [layer.register_forward_pre_hook(watch(name)) for name, layer in layers.items()]
    set_ramp(model, 0.0)
    try:
        model.eval()
        count = 0
        for ids in inputs:
            model(input_ids=ids, use_cache=False)
            count += ids.numel()
    finally:
        for hook in hooks:
            hook.remove()
        set_ramp(model, 1.0)
        model.train(was_training)
        for module in model.modules():
            if isinstance(module, FSDPModule):
                module.reshard()  # weights that stay gathered would be stretched instead of their shards
    if silent := layers.keys() - sums.keys():
        raise StretchError(
            f"no data went through {sorted(silent)[0]}: the training data is empty, or the model does not "
            "call that layer. Remove `bitnet.start: stretch`"
        )
    return {name: part / max(count, 1) for name, part in sums.items()}


def _rows(weight: Tensor) -> tuple[Tensor, Total]:
    """A weight's rows that are here, and what adds up over all of them."""
    if not isinstance(weight, DTensor):
        return weight, lambda part: part
    groups = [
        weight.device_mesh.get_group(i)
        for i, placed in enumerate(weight.placements)
        if isinstance(placed, Shard)
    ]

    def total(part: Tensor) -> Tensor:
        for group in groups:
            dist.all_reduce(part, group=group)
        return part

    return weight._local_tensor, total


def _of_rank_0(values: Tensor) -> Tensor:
    """Ranks that add up in another order than rank 0 would have other latents."""
    if dist.is_available() and dist.is_initialized():
        dist.broadcast(values, 0)
    return values
