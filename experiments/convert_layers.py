"""What the study of conversion compares with the package's own ways: softened codes, a ramp that keeps what
the latents lack, and Muon."""

from __future__ import annotations

import math
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from axolotl_bitnet import BitLinear, ops

HOT = 0.7  # Hestia's first temperature: minimises E (q(z) - z)^2 of a normal z with mean |z| = 1


class _MixWeight(torch.autograd.Function):
    """(1 - lambda) (L + D) + lambda Q(L); Q hard with the gradient straight through, or soft (Hestia,
    arXiv:2601.20745) with its own gradient."""

    @staticmethod
    def forward(ctx: Any, w: Tensor, lacking: Tensor | None, lam: Tensor, tau: Tensor | None) -> Tensor:
        _, s, g = ops.ternarize(w)
        ctx.slope = None
        before = (w if lacking is None else w + lacking).float()
        if tau is None:
            return torch.lerp(before, ops.dequantized_weight(w, g, torch.float32), lam)
        u = w.float() / g
        size = u.abs()
        p = torch.softmax(torch.stack([-((size - 1) ** 2), -(size**2), -((size + 1) ** 2)]) / tau, 0)
        mean = p[0] - p[2]
        ctx.slope = torch.lerp(torch.ones_like(mean), (p[0] + p[2] - mean * mean) * (2 / tau), lam).to(
            w.dtype
        )
        return torch.lerp(before, mean * u.sign() / s.float(), lam)

    @staticmethod
    def backward(ctx: Any, dy: Tensor) -> tuple[Tensor, None, None, None]:
        return (dy if ctx.slope is None else dy * ctx.slope), None, None, None


class Mixed(BitLinear):
    """A BitLinear on its way, with what the study tries; the layer's own ``ramp`` is lambda."""

    lacking: Tensor | None = None
    tau: Tensor | None = None

    def forward(self, x: Tensor) -> Tensor:
        if self.ramp is None:
            return super().forward(x)
        dtype = (
            torch.get_autocast_dtype(x.device.type) if torch.is_autocast_enabled(x.device.type) else x.dtype
        )
        x = x.to(dtype)
        codes, r = ops.quantize_activations(x.detach(), dtype)
        x = x + self.ramp.to(dtype) * (ops.dequantize_activations(codes, r, dtype) - x).detach()
        return F.linear(
            x, _MixWeight.apply(self.weight, self.lacking, self.ramp, self.tau).to(dtype), self.bias
        )


def temperature_at(done: float) -> tuple[float, float]:
    """lambda and Hestia's temperature when this share of its way is done: pressure over the first third, then
    the temperature falls."""
    return min(1.0, 3 * done), max(HOT * 0.5 * (1 + math.cos(math.pi * min(done, 1.0))), 0.02)


class Muon:
    """Momentum made orthogonal (Jordan 2024), with AdamW's typical step size (0.2 sqrt(max(shape)))."""

    def __init__(self, members: list[nn.Parameter], decay: float) -> None:
        self._members, self._decay = members, decay
        self._momentum = {p: torch.zeros_like(p) for p in members}
        self.param_groups: list[dict[str, Any]] = [{"lr": 0.0, "base_lr": 0.0}]

    @torch.no_grad()
    def step(self) -> None:
        lr = self.param_groups[0]["lr"]
        shapes: dict[Any, list[nn.Parameter]] = {}
        for p in self._members:
            self._momentum[p].mul_(0.95).add_(p.grad)
            shapes.setdefault(p.shape, []).append(p)
        for shape, group in shapes.items():
            u = torch.stack([p.grad + 0.95 * self._momentum[p] for p in group]).bfloat16()
            tall = shape[0] > shape[1]
            u = u.transpose(1, 2) if tall else u
            u = u / (u.norm(dim=(1, 2), keepdim=True) + 1e-7)
            for _ in range(5):
                a = u @ u.transpose(1, 2)
                u = 3.4445 * u + (-4.7750 * a + 2.0315 * a @ a) @ u
            u = u.transpose(1, 2) if tall else u
            scale = 0.2 * math.sqrt(max(shape))
            for p, each in zip(group, u, strict=True):
                p.mul_(1 - lr * self._decay).add_(each.float(), alpha=-lr * scale)
