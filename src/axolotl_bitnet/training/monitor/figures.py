"""What the ternary codes of a model do while it trains: how many flip, flip back, are zero; where scales go.

The same elements of each matrix are measured each time (:mod:`axolotl_bitnet.training.monitor.sampling`).
Their absmean and their codes are taken for the matrix's; shares over the model weigh matrices by size. Three
bytes per element are kept: its codes at the start and at the last two measurements.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor, nn

from ...layers.bitlinear import BitLinear
from ...model.fingerprint import clean_name
from ...ternary import EPSILON, absmean, codes_of
from .sampling import add_shards, batches_of, fsdp2_class, pieces_of


@dataclass(frozen=True)
class LayerView:
    """One matrix. Shares are of its codes (0 to 1).

    Attributes:
        size: number of codes.
        zeros: share that is zero.
        flips, flips_total: share that differs from the measurement before, and from the start.
        oscillation: share that flipped since the measurement before, back to the code of one earlier.
        frozen: share of latents that one update cannot move (:func:`unmoved_above`); NaN if no learning rate
            was given.
        scale, scale_start: absmean of the latents, now and at the start.
    """

    size: int
    zeros: float
    flips: float
    flips_total: float
    oscillation: float
    frozen: float
    scale: float
    scale_start: float

    @property
    def scale_drift(self) -> float:
        return self.scale / self.scale_start - 1

    @property
    def was_zero(self) -> bool:
        """Whether all its latents were zero at the start: its absmean is the definition's least value."""
        return self.scale_start <= EPSILON


@dataclass(frozen=True)
class Observation:
    """A measurement of a model: :func:`observe`.

    Attributes:
        layers: by name, in the model's order.
        codes, before, start: this rank's int8 codes of the measured elements, now, one measurement ago and at
            the first: a tensor (layers, elements) for all layers of which equally many are measured.
        sharded: whether other ranks have other elements.
    """

    layers: Mapping[str, LayerView]
    codes: list[Tensor] = field(repr=False)
    before: list[Tensor] = field(repr=False)
    start: list[Tensor] = field(repr=False)
    sharded: bool = False

    def share(self, attribute: str, kind: str | None = None) -> float:
        """A share over all layers, or those of a kind (``q_proj``), each weighed by its size."""
        views = self._views(kind)
        total = sum(view.size for view in views)
        return sum(getattr(view, attribute) * view.size for view in views) / total

    def scale_drift(self, kind: str | None = None) -> float:
        """Mean over layers of their scale's relative change since the start."""
        views = self._views(kind)
        return sum(view.scale_drift for view in views) / len(views)

    @property
    def kinds(self) -> list[str]:
        """Last parts of the layers' names: ``q_proj``, ``gate_proj``, ..."""
        return list(dict.fromkeys(name.rsplit(".", 1)[-1] for name in self.layers))

    def metrics(self) -> dict[str, float]:
        """All figures of the model by the names they are logged under."""
        flips = self.share("flips")
        figures = {
            "bitnet/flips": flips,
            "bitnet/flips_total": self.share("flips_total"),
            "bitnet/zeros": self.share("zeros"),
            "bitnet/oscillation": self.share("oscillation") / flips if flips else 0.0,
            "bitnet/scale_drift": self.scale_drift(),
        }
        if not math.isnan(frozen := self.share("frozen")):
            figures["bitnet/frozen"] = frozen
        figures |= {f"bitnet/scale_drift/{kind}": self.scale_drift(kind) for kind in self.kinds}
        return {name: float(f"{value:.4g}") for name, value in figures.items()}

    def _views(self, kind: str | None) -> list[LayerView]:
        """Those that shares and means are over: not what was all zero at the start, if others were not."""
        views = [v for name, v in self.layers.items() if kind is None or name.rsplit(".", 1)[-1] == kind]
        return [view for view in views if not view.was_zero] or views


@torch.no_grad()
def observe(
    model: nn.Module,
    previous: Observation | None = None,
    learning_rate: float | Callable[[Tensor], float] | None = None,
    precision: torch.dtype | None = None,
) -> Observation:
    """Measure a model's ternary codes, between two steps; the model does not change.

    Under FSDP every rank must call it, with the wrapped model, and all get the same figures.

    Args:
        model: a converted model, wrapped or not.
        previous: the measurement before, of the same model; None for the first.
        learning_rate: of all layers, or as a function of a layer's weight, for :attr:`LayerView.frozen`.
        precision: dtype that updates are made in, where that is not the weights' own.

    Raises:
        Unwatchable: the latents are sharded by ZeRO-3, or flattened by FSDP1.
        ValueError: the model has no BitLinear layer, or ``previous`` is of other layers.
    """
    layers = {clean_name(n): module for n, module in model.named_modules() if isinstance(module, BitLinear)}
    if not layers:
        raise ValueError(f"{type(model).__name__} has no BitLinear layer to measure: convert it first")
    sharded = fsdp2_class()
    for module in model.modules():
        if isinstance(module, sharded):
            module.reshard()  # an evaluation leaves the root's weights gathered
    pieces = pieces_of(model, layers)
    device = pieces[0].device
    numels = [float(layer.out_features * layer.in_features) for layer in layers.values()]
    sizes = _on(device, numels, torch.float64)
    factors = _on(device, [piece.stands_for for piece in pieces], torch.float64)
    limits = _on(
        device, [_limit(layer.weight, learning_rate, precision) for layer in layers.values()], torch.float32
    )

    batches = batches_of(pieces)
    rows = [_on(device, indices, torch.int64) for indices in batches]
    latents = [torch.stack([pieces[i].elements for i in batch]).to(device) for batch in batches]
    sums = torch.zeros_like(sizes)
    for index, w in zip(rows, latents, strict=True):
        sums[index] = w.to(torch.bfloat16).abs().sum(1, dtype=torch.float64) * factors[index]
    g = absmean(add_shards(sums, pieces), sizes)

    codes = [codes_of(w, g[index, None]) for index, w in zip(rows, latents, strict=True)]
    before, earlier, start = _history(previous, codes)
    counts = torch.zeros(len(pieces), 5, dtype=torch.float64, device=device)
    for i, (index, now, w) in enumerate(zip(rows, codes, latents, strict=True)):
        flipped = now != before[i]
        back = flipped & (before[i] != earlier[i]) & (now == earlier[i])
        still = w.to(torch.float32).abs() >= limits[index, None]
        masks = (now == 0, flipped, now != start[i], back, still)
        counts[index] = torch.stack([mask.sum(1) for mask in masks], 1) * factors[index, None]
    shares = add_shards(counts, pieces) / sizes[:, None]
    if learning_rate is None:
        shares[:, 4] = math.nan

    table = torch.cat([shares, g[:, None].to(torch.float64)], 1).tolist()
    views = {}
    for name, size, row in zip(layers, numels, table, strict=True):
        zeros, flips, total, swings, frozen, scale = row
        first = previous.layers[name].scale_start if previous else scale
        views[name] = LayerView(int(size), zeros, flips, total, swings, frozen, scale, first)
    return Observation(views, codes, before, start, any(piece.groups for piece in pieces))


def unmoved_above(dtype: torch.dtype, learning_rate: float) -> float:
    """The least power of two from which on an update of ``learning_rate`` leaves a number of ``dtype`` as it
    is: it is less than half the distance to the next number, and rounded away.

    AdamW's updates are about as large as the learning rate, rarely larger.
    """
    if learning_rate <= 0:
        return 0.0
    mantissa = -math.log2(torch.finfo(dtype).eps)
    return 2.0 ** (math.floor(math.log2(learning_rate) + mantissa + 1) + 1)


def _history(
    previous: Observation | None, codes: list[Tensor]
) -> tuple[list[Tensor], list[Tensor], list[Tensor]]:
    """Codes one measurement ago, two measurements ago, and at the start."""
    if previous is None:
        return codes, codes, codes
    if [one.shape for one in previous.codes] != [one.shape for one in codes]:
        raise ValueError("the previous observation is of other layers, or of other shards of them")
    return previous.codes, previous.before, previous.start


def _limit(
    weight: Tensor, learning_rate: float | Callable[[Tensor], float] | None, precision: torch.dtype | None
) -> float:
    if learning_rate is None:
        return 0.0
    rate = learning_rate if isinstance(learning_rate, float | int) else learning_rate(weight)
    return unmoved_above(precision or weight.dtype, rate)


def _on(device: torch.device, values: list[Any], dtype: torch.dtype) -> Tensor:
    """Numbers on a device, without waiting for what it computes: a measurement begins while a step still
    runs."""
    return torch.tensor(values, dtype=dtype, pin_memory=device.type == "cuda").to(device, non_blocking=True)
