"""BitLinear: an nn.Linear whose forward is ternary and whose backward goes straight through.

The layer keeps the *latent* weight, the same Parameter object that nn.Linear had, and quantizes it on the
way. It adds no buffer and no state, so wrappers (FSDP2, DDP, checkpointing, torch.compile) and checkpoints
see a plain linear.

With ``y = (codes_x . codes_w^T) / (r s)`` the straight-through estimator (Bengio et al. 2013,
arXiv:1308.3432) gives::

    dX = dY . (codes_w / s)        dW = dY^T . (codes_x / r)        dB = sum dY

No gradient flows through the scales and nothing is masked. Backward needs the codes of x, its scales and the
weight Parameter itself; a copy of the weight would pin every unsharded matrix under FSDP, so the codes are
made again.
"""

from __future__ import annotations

import threading
from typing import Any

import torch
from torch import Tensor, nn
from torch.autograd.function import once_differentiable
from torch.utils.weak import TensorWeakRef

from . import ops
from .ternary import dequantize


class BitLinear(nn.Linear):
    """Linear layer with ternary weights and 8-bit activations, for training and for inference.

    Shapes are nn.Linear's: x (..., in_features) gives (..., out_features) in x's dtype, or in the autocast
    dtype under autocast. ``weight`` holds the latents (out_features, in_features), float32 or bfloat16.
    """

    def forward(self, input: Tensor) -> Tensor:
        return bitlinear(input, self.weight, self.bias)


def bitlinear(x: Tensor, weight: Tensor, bias: Tensor | None = None) -> Tensor:
    """Functional form of :class:`BitLinear`.

    Args:
        x: (..., in_features), floating point, any rank >= 1.
        weight: latents (out_features, in_features).
        bias: (out_features,) or None.

    Returns:
        (..., out_features) in x's dtype (the autocast dtype under autocast).
    """
    device = "cpu" if x.is_meta else x.device.type  # autocast knows no meta
    dtype = torch.get_autocast_dtype(device) if torch.is_autocast_enabled(device) else x.dtype
    # A backward called inside an autocast region would turn float32 codes into bf16, and lose the integers.
    with torch.autocast(device, enabled=False):
        codes, scale = _shared_codes(x, dtype)
        return _BitLinear.apply(x.to(dtype), codes, scale, weight, bias)


class _BitLinear(torch.autograd.Function):
    @staticmethod
    def forward(x: Tensor, codes_x: Tensor, r: Tensor, weight: Tensor, bias: Tensor | None) -> Tensor:
        codes_w, s = ops.ternarize(weight)
        y = ops.matmul(codes_x, r, codes_w, s, x.dtype)
        return y if bias is None else y + bias.to(x.dtype)

    @staticmethod
    def setup_context(ctx: Any, inputs: tuple[Any, ...], output: Tensor) -> None:
        _, codes_x, r, weight, _ = inputs
        ctx.save_for_backward(codes_x, r, weight)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, dy: Tensor) -> tuple[Tensor | None, ...]:
        codes_x, r, weight = ctx.saved_tensors
        needs_x, _, _, needs_weight, needs_bias = ctx.needs_input_grad
        dx = dw = db = None
        with torch.autocast(dy.device.type, enabled=False):
            if needs_x:
                dx = _input_gradient(dy, *ops.ternarize(weight))
            if needs_weight:
                x_hat = dequantize(codes_x, r, dy.dtype)
                dw = dy.flatten(0, -2).t() @ x_hat.flatten(0, -2) if dy.dim() > 1 else torch.outer(dy, x_hat)
                dw = dw.to(weight.dtype)
            if needs_bias:
                db = dy.flatten(0, -2).sum(0) if dy.dim() > 1 else dy
        return dx, None, None, dw, db


def _input_gradient(dy: Tensor, codes_w: Tensor, s: Tensor) -> Tensor:
    """``dY . (codes_w / s)``. Codes are exact in bf16 where ``1 / s`` is not, so the scale comes last."""
    if dy.dtype == torch.float16:  # unscaled sums overflow there; 1 / s loses little in 11 bits
        return dy @ dequantize(codes_w, s, dy.dtype)
    return dequantize(dy @ codes_w.to(dy.dtype), s, dy.dtype)


class _Slot(threading.local):
    """The last quantized activation of this thread, held weakly: q, k and v read it in turn."""

    held: tuple[TensorWeakRef, TensorWeakRef, TensorWeakRef] | None = None  # x, its codes, its scales
    key: tuple[int, torch.dtype] | None = None


_slot = _Slot()


def _shared_codes(x: Tensor, dtype: torch.dtype) -> tuple[Tensor, Tensor]:
    """Codes and scales of ``x.to(dtype)``, made once for layers that read the same tensor one after another.

    A write through ``x.data`` between two readers goes unseen. Off in inference mode (no versions there) and
    under torch.compile (which finds common subexpressions itself).
    """
    if torch.compiler.is_compiling() or x.is_inference():
        return ops.quantize_activations(x.detach().to(dtype))
    key = (x._version, dtype)
    if _slot.held is not None and _slot.key == key:
        source, codes, scale = (reference() for reference in _slot.held)
        if source is x and codes is not None and scale is not None:
            return codes, scale
    codes, scale = ops.quantize_activations(x.detach().to(dtype))
    _slot.held = (TensorWeakRef(x), TensorWeakRef(codes), TensorWeakRef(scale))
    _slot.key = key
    return codes, scale
