"""BitLinear: an nn.Linear whose forward is ternary and whose backward goes straight through.

The layer keeps the *latent* weight, the same Parameter object that nn.Linear had, and quantizes it on the
way. It adds no buffer and no state, so wrappers (FSDP2, DDP, checkpointing, torch.compile) and checkpoints
see a plain linear.

With ``y = (codes_x . codes_w^T) / (r s)`` the straight-through estimator (Bengio et al. 2013,
arXiv:1308.3432) gives::

    dX = dY . (codes_w / s)        dW = dY^T . (codes_x / r)        dB = sum dY

No gradient flows through the scales and nothing is masked. Backward needs the codes of x (a byte per
element), its scales, the weight Parameter itself and its absmean; a copy of the weight would pin every
unsharded matrix under FSDP, so the codes are made again.

``backward`` computes dX, or both products, on the int8 tensor cores too
(:mod:`axolotl_bitnet.layers.products`).

On the way from a dense model (``ramp``, lambda < 1) both operands lie between what they were and their codes,
``(1 - lambda) W + lambda codes / s``, and the products are dense ones; the gradients go straight through, to
the latents, as above.
"""

from __future__ import annotations

from collections.abc import Sequence
from contextlib import AbstractContextManager, nullcontext
from itertools import chain
from typing import Any

import torch
from torch import Tensor, nn
from torch.autograd.function import once_differentiable

from .. import ops
from . import parts
from .gathered_weight import GatheredWeight
from .products import Backward, weight_gradient
from .shared_input import Projected, shared_activation_codes, take_output
from .stretch import unstretched
from .weight_codes import dequantized_weight, ternarize

# Private to torch; without it global hooks on all modules cannot be detected.
has_any_global_hook = getattr(nn.modules.module, "_has_any_global_hook", None)


class BitLinear(nn.Linear):
    """Linear layer with ternary weights and 8-bit activations, for training and for inference.

    Shapes are nn.Linear's: x (..., in_features) gives (..., out_features) in x's dtype, or in the autocast
    dtype under autocast. ``weight`` holds the latents (out_features, in_features), float32 or bfloat16.
    """

    backward: Backward = "bf16"
    """Precision of the backward's products; set on an instance by the conversion."""

    ramp: Tensor | None = None
    """lambda < 1, float32 (), written to in place; set by :func:`axolotl_bitnet.training.ramp.set_ramp`."""

    stretch: Tensor | None = None
    """alpha and k, float32 (2,), where a ramp begins at another matrix than the latents
    (:mod:`axolotl_bitnet.layers.stretch`)."""

    def forward(self, input: Tensor) -> Tensor:
        if self.ramp is not None:
            return ramped_linear(input, self.weight, self.bias, self.ramp, self.stretch)
        if isinstance(input, Projected):
            return input.output_of(self)
        if (output := take_output(input, self)) is not None:
            return output
        return bitlinear(input, self.weight, self.bias, self.backward)


def bitlinear(x: Tensor, weight: Tensor, bias: Tensor | None = None, backward: Backward = "bf16") -> Tensor:
    """Functional form of :class:`BitLinear`.

    Args:
        x: (..., in_features), floating point, any rank >= 1.
        weight: latents (out_features, in_features).
        bias: (out_features,) or None.
        backward: precision of the backward's products.

    Returns:
        (..., out_features) in x's dtype (the autocast dtype under autocast).
    """
    (y,) = bitlinears(x, [(weight, bias, backward)])
    return y


def bitlinears(x: Tensor, layers: Sequence[tuple[Tensor, Tensor | None, Backward]]) -> tuple[Tensor, ...]:
    """:func:`bitlinear` of one x with several weights, biases and ``backward``, as one autograd function.

    The weights have one dtype, and ``backward`` is the same for all. The gradient of x is summed in the
    products, with a rounding less for each than by separate layers.
    """
    dtype = compute_dtype(x)
    with no_autocast(x):
        codes, r = shared_activation_codes(x, dtype)
        return _BitLinear.apply(x, codes, r, dtype, *chain.from_iterable(layers))


class _BitLinear(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx: Any, x: Tensor, codes_x: Tensor, r: Tensor, dtype: torch.dtype, *parameters: Any
    ) -> tuple[Tensor, ...]:
        # Three per layer: with two, a compiler without gradients takes ctx for superfluous, by their number.
        weights, biases, (ctx.precision, *_) = parameters[::3], parameters[1::3], parameters[2::3]
        results = parts.project([*weights], [], codes_x, r, [*biases], dtype)
        ctx.save_for_backward(codes_x, r, *weights)
        ctx.means = results[len(weights) :]  # one number each: not worth a saved-tensor hook
        ctx.x_dtype = x.dtype
        ctx.set_materialize_grads(False)
        return tuple(results[: len(weights)])

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, *dys: Tensor | None) -> tuple[Tensor | None, ...]:
        codes_x, r, *weights = ctx.saved_tensors
        needs_x, _, _, _, *needs = ctx.needs_input_grad
        gradients: list[Tensor | None] = [None] * len(needs)
        given = [(place, dy) for place, dy in enumerate(dys) if dy is not None]
        if not given:
            return None, None, None, None, *gradients
        wanted = [needs_x, *(needs[3 * place] for place, _ in given)]
        with no_autocast(given[0][1]):
            results = iter(
                parts.project_backward(
                    [weights[place] for place, _ in given],
                    [],
                    [ctx.means[place] for place, _ in given],
                    [dy for _, dy in given],
                    [],
                    codes_x,
                    r,
                    ctx.precision,
                    wanted,
                    weights[0].dtype,
                )
            )
            dx = next(results).to(ctx.x_dtype) if needs_x else None
            for place, dy in given:
                if needs[3 * place]:
                    gradients[3 * place] = next(results)
                if needs[3 * place + 1]:
                    gradients[3 * place + 1] = dy.flatten(0, -2).sum(0) if dy.dim() > 1 else dy
        return dx, None, None, None, *gradients


def ramped_linear(
    x: Tensor, weight: Tensor, bias: Tensor | None, ramp: Tensor, stretch: Tensor | None = None
) -> Tensor:
    """:func:`bitlinear` part of the way from a dense layer (ramp 0) to the ternary one (1).

    The dense layer has the latents for its weight, or what they were before they were stretched.

    Raises:
        RuntimeError: the weight was gathered as codes; there are no latents to mix them with.
    """
    if isinstance(weight, GatheredWeight):
        raise RuntimeError("a ramp mixes codes with latents, and FSDP2 gathers codes only: gather natively")
    dtype = compute_dtype(x)
    with no_autocast(x):
        codes, r = shared_activation_codes(x, dtype)
        stretch = None if stretch is None else stretch.to(x.device)
        return _Ramped.apply(x, codes, r, weight, bias, ramp.to(x.device), stretch, dtype)


class _Ramped(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx: Any,
        x: Tensor,
        codes_x: Tensor,
        r: Tensor,
        weight: Tensor,
        bias: Tensor | None,
        ramp: Tensor,
        stretch: Tensor | None,
        dtype: torch.dtype,
    ) -> Tensor:
        _, _, g = ternarize(weight)
        ctx.save_for_backward(x, codes_x, r, weight, ramp, stretch)
        ctx.g, ctx.dtype = g, dtype
        mixed = _mixed_activations(x, codes_x, r, ramp, dtype)
        bias = None if bias is None else bias.to(dtype)
        return nn.functional.linear(mixed, _mixed_weight(weight, g, ramp, stretch, dtype), bias)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, dy: Tensor) -> tuple[Tensor | None, ...]:
        x, codes_x, r, weight, ramp, stretch = ctx.saved_tensors
        needs_x, _, _, needs_weight, needs_bias, *_ = ctx.needs_input_grad
        dx = dw = db = None
        with no_autocast(dy):
            if needs_x:
                dx = (dy @ _mixed_weight(weight, ctx.g, ramp, stretch, dy.dtype)).to(x.dtype)
            if needs_weight:
                dw = weight_gradient(dy, _mixed_activations(x, codes_x, r, ramp, ctx.dtype), weight.dtype)
            if needs_bias:
                db = dy.flatten(0, -2).sum(0) if dy.dim() > 1 else dy
        return dx, None, None, dw, db, None, None, None


def _mixed_weight(
    weight: Tensor, g: Tensor, ramp: Tensor, stretch: Tensor | None, dtype: torch.dtype
) -> Tensor:
    before = weight if stretch is None else unstretched(weight, stretch)
    return _mix(before, dequantized_weight(weight, g, torch.float32), ramp, dtype)


def _mixed_activations(x: Tensor, codes: Tensor, r: Tensor, ramp: Tensor, dtype: torch.dtype) -> Tensor:
    return _mix(x.to(dtype), ops.dequantize_activations(codes, r, torch.float32), ramp, dtype)


def _mix(before: Tensor, after: Tensor, ramp: Tensor, dtype: torch.dtype) -> Tensor:
    """Exactly ``before`` where ramp is 0. Float32 in between: near 0 and 1 one of the two is a small part."""
    return torch.lerp(before.to(torch.float32), after, ramp).to(dtype)


def compute_dtype(x: Tensor) -> torch.dtype:
    """The dtype a layer computes in: autocast's, or x's own."""
    device = _autocast_device(x)
    return torch.get_autocast_dtype(device) if torch.is_autocast_enabled(device) else x.dtype


def no_autocast(x: Tensor) -> AbstractContextManager[object]:
    """Autocast would turn float32 codes into bfloat16, in a backward too, and lose the integers."""
    device = _autocast_device(x)
    return torch.autocast(device, enabled=False) if torch.is_autocast_enabled(device) else nullcontext()


def _autocast_device(x: Tensor) -> str:
    return "cpu" if x.is_meta else x.device.type  # autocast knows no meta


def is_bare(layer: nn.Module) -> bool:
    """Whether calling the layer would do nothing but its own forward, ternary."""
    return (
        type(layer) is BitLinear
        and layer.ramp is None
        and not layer._forward_hooks
        and not layer._forward_pre_hooks
        and not layer._backward_hooks
        and not layer._backward_pre_hooks
        and "forward" not in vars(layer)
        and layer.weight.dim() == 2
        and (torch.compiler.is_compiling() or (has_any_global_hook is not None and not has_any_global_hook()))
    )
