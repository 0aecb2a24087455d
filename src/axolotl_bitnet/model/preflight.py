"""The base model measured before training: is it latent, already ternary, broken, or was it never ternary?

A base whose matrices are dense ternary (``codes / s``: the Falcon3-10B "prequantized", any bf16 revert) would
silently lose scale when quantized again, by the share of its non-zeros. Such a matrix is replaced by latents
that quantize to exactly the codes and the scale it has.
"""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass, field

import torch
from torch import Tensor, nn

from ..ternary import dequantize, latents_of, scale_of, ternarize
from .names import first_few
from .scales import lost, several_scales
from .whole_weights import gathered

NEVER_TERNARY = 0.4
"""Mean relative change by quantization above which a base may never have been ternary (Gaussian: 0.51)."""

SAMPLE = 1 << 18
"""Elements of a matrix that are quantized to measure it. All of 3 billion take 45 s in one thread."""


@dataclass
class Preflight:
    """What the base's ternary-to-be matrices are.

    Attributes:
        rescaled: dense ternary matrices that were replaced by latents with the same codes and scale.
        shrunk: dense ternary matrices for which there are no such latents: their scale will shrink.
        several: matrices that are ternary with a scale per row or group, and which of the two.
        zero: matrices of zeros only.
        broken: matrices that hold a NaN or an Inf.
        change: mean over the matrices of ``|W - codes / s| / |W|`` (Frobenius norms), how far quantization
            moves them; of large ones, every n-th row is measured.
    """

    rescaled: list[str] = field(default_factory=list)
    shrunk: list[str] = field(default_factory=list)
    several: dict[str, str] = field(default_factory=dict)
    zero: list[str] = field(default_factory=list)
    broken: list[str] = field(default_factory=list)
    change: float = 0.0

    def warnings(self, maybe_dense: bool = True) -> list[str]:
        """Sentences that warn before the run.

        Args:
            maybe_dense: whether the base can be a dense model: not if its config shows ternary training, or
                its weights are random.
        """
        lines = []
        if self.broken:
            lines.append(
                f"the base holds NaN or Inf in {first_few(self.broken)}: every output of these layers will "
                "be NaN"
            )
        if self.zero:
            lines.append(
                f"the base is all zero in {first_few(self.zero)}: these layers cannot learn a scale from "
                "zeros"
            )
        if self.shrunk:
            lines.append(
                f"the base is dense ternary in {first_few(self.shrunk)} with a scale that latents cannot "
                "carry: "
                "these layers start smaller than they were"
            )
        if self.several:
            layouts = ", ".join(sorted(set(self.several.values())))
            lines.append(
                f"the base is {lost(layouts, len(self.several))}. Training starts from another model than "
                f"the base was: quantization changes its matrices by {self.change:.0%} on average"
            )
        elif maybe_dense and self.change > NEVER_TERNARY:
            lines.append(
                "this base may never have been ternary: quantization changes its matrices by "
                f"{self.change:.0%} on average. Expect a first loss far above the dense model's, and a long "
                "training (bitnet.ramp_steps and bitnet.teacher shorten it)"
            )
        return lines


@torch.no_grad()
def preflight(model: nn.Module, names: Iterable[str]) -> Preflight:
    """Inspect, and where needed rescale in place, the weights of the named layers. Weights on meta are
    skipped; those that ZeRO-3 partitioned are gathered one at a time, so every rank must call this.

    Args:
        model: the model, loaded, before any sharding.
        names: its BitLinear layers.
    """
    result = Preflight()
    changes = []
    for name in names:
        weight = model.get_submodule(name).get_parameter("weight")
        with gathered(weight, write=True):
            if weight.is_meta or weight.numel() == 0:
                continue
            change = _inspect(name, weight.data, result)
        if change is not None:
            changes.append(change)
    if changes:
        result.change = float(torch.stack(changes).mean())
    return result


def _inspect(name: str, weight: Tensor, result: Preflight) -> Tensor | None:
    low, high = torch.aminmax(weight)  # NaN if there is one
    magnitude = torch.maximum(high, -low)
    if not bool(torch.isfinite(magnitude)):
        result.broken.append(name)
        return None
    if not bool(magnitude):
        result.zero.append(name)
        return None
    sample = weight[:: -(-weight.numel() // SAMPLE)]
    if not bool(sample.any()):
        sample = weight
    if _two_valued(sample, magnitude) and _two_valued(weight, magnitude):
        own, scale = scale_of(magnitude.to(torch.float32)), ternarize(weight)[1]
        if not torch.equal(own, scale):
            try:
                weight.copy_(latents_of(torch.sign(weight).to(torch.int8), own))
                result.rescaled.append(name)
            except ValueError:
                result.shrunk.append(name)
        return torch.zeros((), device="cpu")
    if (layout := several_scales(sample)) and several_scales(weight) == layout:
        result.several[name] = layout
    latent = sample.to(torch.float32)
    return ((latent - dequantize(*ternarize(sample))).norm() / latent.norm()).cpu()


def _two_valued(weight: Tensor, magnitude: Tensor) -> bool:
    return bool(((weight == 0) | (weight.abs() == magnitude)).all())
