"""Llama's SwiGLU MLP and RMSNorm, fused with the quantization that follows them, and q, k and v together.

Both write a tensor only for a BitLinear to read and quantize it. Fused, the MLP never writes ``silu(gate) *
up`` (nor keeps it for backward: it is computed again from gate and up), and the norm quantizes its output
while it has it. The parameters keep their places and names, and the codes are those of the unfused layers:
only traffic and memory change.

Modules are recognized by class name, in transformers' own version and in Liger's. A module falls back to the
unfused formula whenever something watches or manages its parts: hooks, parameters that are not there
(ZeRO-3), a ramp under way.
"""

from __future__ import annotations

import logging
from typing import Any

import torch
from torch import Tensor, nn
from torch.autograd.function import once_differentiable

from .. import ops
from . import parts
from .bitlinear import (
    BitLinear,
    compute_dtype,
    has_any_global_hook,
    is_bare,
    no_autocast,
)
from .products import Backward
from .projections import has_projections, project_together
from .shared_input import share_activation_codes, shared_activation_codes
from .weight_codes import ternarize

LOG = logging.getLogger("axolotl.bitnet")

_MLPS = {"LlamaMLP", "MistralMLP", "Qwen2MLP", "Qwen3MLP", "LigerSwiGLUMLP"}
_NORMS = {"LlamaRMSNorm", "MistralRMSNorm", "Qwen2RMSNorm", "Qwen3RMSNorm", "LigerRMSNorm"}
_ATTENTIONS = {"LlamaAttention", "MistralAttention", "Qwen2Attention", "Qwen3Attention"}
_BEFORE_LINEARS = {"input_layernorm", "post_attention_layernorm"}


def fuse_layers(model: nn.Module) -> int:
    """Fuse what can be, in place, by swapping classes. Call it on a converted model.

    Returns:
        How many modules were fused.
    """
    if has_any_global_hook is None:
        LOG.warning(
            "torch %s has no _has_any_global_hook: MLPs and norms are not fused (the same codes, more "
            "slowly)",
            torch.__version__,
        )
        return 0
    count = 0
    for name, module in model.named_modules():
        if _is_swiglu(module):
            module.__class__ = SwiGLU
        elif name.rsplit(".", 1)[-1] in _BEFORE_LINEARS and _is_rmsnorm(module):
            module.__class__ = RMSNorm
        elif type(module).__name__ in _ATTENTIONS and has_projections(module):
            if project_together in module._forward_pre_hooks.values():
                continue
            module.register_forward_pre_hook(project_together, with_kwargs=True)
        else:
            continue
        count += 1
    return count


class SwiGLU(nn.Module):
    """``down_proj(silu(gate_proj(x)) * up_proj(x))``, ternary, as one autograd function."""

    gate_proj: BitLinear
    up_proj: BitLinear
    down_proj: BitLinear

    def forward(self, x: Tensor) -> Tensor:
        layers = (self.gate_proj, self.up_proj, self.down_proj)
        if not all(map(is_bare, layers)) or len({layer.weight.dtype for layer in layers}) > 1:
            return self.down_proj(nn.functional.silu(self.gate_proj(x)) * self.up_proj(x))
        gate, up, down = (layer.weight for layer in layers)
        return swiglu(x, gate, up, down, self.down_proj.backward)


class RMSNorm(nn.Module):
    """RMSNorm that leaves the codes of its output on it, for the linear layers that read it."""

    weight: nn.Parameter
    variance_epsilon: float

    def forward(self, hidden_states: Tensor) -> Tensor:
        x, eps = hidden_states, self.variance_epsilon
        if torch.compiler.is_compiling() or x.dtype != self.weight.dtype:
            x32 = x.to(torch.float32)
            x32 = x32 * torch.rsqrt(x32.pow(2).mean(-1, keepdim=True) + eps)
            return self.weight * x32.to(x.dtype)
        dtype = compute_dtype(x)
        with no_autocast(x):
            y, codes, r = _RMSNorm.apply(x, self.weight, eps, dtype)
        if not y.is_inference():
            share_activation_codes(y, dtype, codes, r)
        return y


def swiglu(x: Tensor, gate: Tensor, up: Tensor, down: Tensor, backward: Backward = "bf16") -> Tensor:
    """Functional form of :class:`SwiGLU`: x (..., hidden) and three latent weights, (..., hidden)."""
    dtype = compute_dtype(x)
    with no_autocast(x):
        codes, r = shared_activation_codes(x, dtype)
        edge, codes_h, r_h, codes_down, s = _SwiGLU.apply(x, codes, r, gate, up, down, dtype, backward)
        return _Down.apply(edge, codes_h, r_h, codes_down, s)


class _SwiGLU(torch.autograd.Function):
    """All but the last product, and the backward of the whole.

    Activation checkpointing computes a layer again up to the last tensor that its backward needs. This saves
    that tensor, so the product of :class:`_Down` is not computed again.
    """

    @staticmethod
    def forward(
        ctx: Any,
        x: Tensor,
        codes_x: Tensor,
        r: Tensor,
        w_gate: Tensor,
        w_up: Tensor,
        w_down: Tensor,
        dtype: torch.dtype,
        precision: Backward,
    ) -> tuple[Tensor, ...]:
        gate, up, codes_h, r_h, g_gate, g_up = parts.gate_and_up([w_gate, w_up], [], codes_x, r, dtype)
        codes, s, g_down = ternarize(w_down)
        ctx.save_for_backward(codes_x, r, gate, up, r_h, w_gate, w_up, w_down)
        ctx.means = g_gate, g_up, g_down
        ctx.x_dtype, ctx.precision = x.dtype, precision
        ctx.mark_non_differentiable(codes_h, r_h, codes, s)
        ctx.set_materialize_grads(False)
        edge = gate.new_empty(()).expand(*x.shape[:-1], w_down.shape[0])  # the result's shape, no memory
        return edge, codes_h, r_h, codes, s

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, dy: Tensor, *_: Any) -> tuple[Tensor | None, ...]:
        codes_x, r, gate, up, r_h, w_gate, w_up, w_down = ctx.saved_tensors
        g_gate, g_up, g_down = ctx.means
        needs_x, _, _, needs_gate, needs_up, needs_down, _, _ = ctx.needs_input_grad
        wanted, precision, dtype = [needs_x, needs_gate, needs_up], ctx.precision, w_gate.dtype
        with no_autocast(dy):
            dgate, dup, *rest = parts.down_backward(
                [w_down], [], [g_down], dy, gate, up, r_h, r, precision, needs_down, dtype
            )
            peaks, dw_down = (rest[:-1], rest[-1]) if needs_down else (rest, None)
            del gate, up
            dys, means = [dgate, dup], [g_gate, g_up]
            results = iter(
                parts.project_backward(
                    [w_gate, w_up], [], means, dys, peaks, codes_x, r, precision, wanted, dtype
                )
            )
        dx = next(results).to(ctx.x_dtype) if needs_x else None
        dw_gate = next(results) if needs_gate else None
        dw_up = next(results) if needs_up else None
        return dx, None, None, dw_gate, dw_up, dw_down, None, None


class _Down(torch.autograd.Function):
    """The last product of :class:`_SwiGLU`, to which its gradient is passed as it is."""

    @staticmethod
    def forward(ctx: Any, edge: Tensor, codes_h: Tensor, r_h: Tensor, codes: Tensor, s: Tensor) -> Tensor:
        return ops.matmul(codes_h, r_h, codes, s, None, edge.dtype)

    @staticmethod
    def backward(ctx: Any, dy: Tensor) -> tuple[Tensor | None, ...]:
        return dy, None, None, None, None


class _RMSNorm(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx: Any, x: Tensor, weight: Tensor, eps: float, dtype: torch.dtype
    ) -> tuple[Tensor, Tensor, Tensor]:
        y, codes, r, rstd = ops.rmsnorm_quantize(x, weight, eps, dtype)
        ctx.save_for_backward(x, weight, rstd)
        ctx.mark_non_differentiable(codes, r)
        return y, codes, r

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, dy: Tensor, *_: Any) -> tuple[Tensor | None, ...]:
        dx, dw = ops.rmsnorm_backward(dy, *ctx.saved_tensors)
        return dx, dw, None, None


def _is_swiglu(module: nn.Module) -> bool:
    if type(module).__name__ not in _MLPS:
        return False
    parts = [getattr(module, name, None) for name in ("gate_proj", "up_proj", "down_proj")]
    act = getattr(module, "act_fn", None)
    return all(isinstance(part, BitLinear) and part.bias is None for part in parts) and (
        act is None or type(act).__name__ in {"SiLU", "SiLUActivation"}
    )


def _is_rmsnorm(module: nn.Module) -> bool:
    return (
        type(module).__name__ in _NORMS
        and getattr(module, "offset", 0.0) == 0.0
        and getattr(module, "casting_mode", "llama") == "llama"
        and hasattr(module, "variance_epsilon")
        and isinstance(getattr(module, "weight", None), nn.Parameter)
    )
