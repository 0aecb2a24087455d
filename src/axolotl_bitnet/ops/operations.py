"""The operations that BitLinear is made of: which implementation runs, and how torch.compile sees them.

Each is written twice: in plain torch (:mod:`axolotl_bitnet.ternary` and :mod:`axolotl_bitnet.ops.plain`)
and in Triton (:mod:`axolotl_bitnet.ops.kernels`), with the same results. The kernels run on NVIDIA GPUs of
compute capability 8.0 and later; everything else takes plain torch.

A compiler fuses what it can see into, and drops the roundings to bfloat16 in between: the codes would no
longer be the definition's. So under torch.compile the operations are opaque (``torch.ops.axolotl_bitnet.*``),
and there is no graph break; in eager mode they are plain calls, without the cost of the dispatcher.
"""

from __future__ import annotations

import importlib.util
from collections.abc import Callable
from functools import cache
from typing import Any

import torch
from torch import Tensor
from torch.nn import Parameter

from .. import ternary
from . import plain

_KERNEL_DTYPES = {torch.float32, torch.bfloat16, torch.float16}
MAX_COLUMNS = 32768
"""Longest row that a kernel holds in registers; beyond it, rows are quantized in plain torch."""


def ternarize(weight: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """int8 codes of the weight's shape, ``s`` bfloat16 (1,), and the absmean ``g`` float32 ()."""
    return run(_ternarize, _ternarize_here, weight)


def dequantized_weight(weight: Tensor, g: Tensor, dtype: torch.dtype) -> Tensor:
    """``codes / s`` as ``dtype``: what dY is multiplied with. ``g`` is :func:`ternarize`'s."""
    return run(_dequantized_weight, _dequantized_weight_here, weight, g, dtype)


def transposed_codes(weight: Tensor, g: Tensor) -> tuple[Tensor, Tensor]:
    """int8 codes of the transposed weight (columns, rows), and ``s``. ``g`` is :func:`ternarize`'s."""
    return run(_transposed_codes, _transposed_codes_here, weight, g)


def quantize_activations(
    x: Tensor, dtype: torch.dtype, floor: float = ternary.EPSILON
) -> tuple[Tensor, Tensor]:
    """int8 codes and scales ``r`` (..., 1) of ``x.to(dtype)``; max|x| counts as ``floor`` at least."""
    return run(_quantize_activations, _quantize_activations_here, x, dtype, floor)


def dequantize_activations(codes: Tensor, r: Tensor, dtype: torch.dtype) -> Tensor:
    """``codes / r`` as ``dtype``: what dY^T is multiplied with."""
    return run(_dequantize_activations, _dequantize_activations_here, codes, r, dtype)


def matmul(
    codes_x: Tensor, r: Tensor, codes_w: Tensor, s: Tensor, bias: Tensor | None, dtype: torch.dtype
) -> Tensor:
    """``(codes_x . codes_w^T) / (r * s)`` as ``dtype``, plus the bias: (..., out_features)."""
    return run(_matmul, _matmul_here, codes_x, r, codes_w, s, bias, dtype)


def swiglu_quantize(gate: Tensor, up: Tensor) -> tuple[Tensor, Tensor]:
    """int8 codes and scales ``r`` of ``silu(gate) * up``."""
    return run(_swiglu_quantize, _swiglu_quantize_here, gate, up)


def swiglu_backward(dh: Tensor, gate: Tensor, up: Tensor, r: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """Gradients of gate and up, and ``silu(gate) * up`` as it was quantized (codes / r)."""
    return run(_swiglu_backward, _swiglu_backward_here, dh, gate, up, r)


def rmsnorm_quantize(
    x: Tensor, weight: Tensor, eps: float, dtype: torch.dtype
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """y, its int8 codes and scales ``r`` (of ``y.to(dtype)``), and 1 / rms, float32 (..., 1)."""
    return run(_rmsnorm_quantize, _rmsnorm_quantize_here, x, weight, eps, dtype)


def rmsnorm_backward(dy: Tensor, x: Tensor, weight: Tensor, rstd: Tensor) -> tuple[Tensor, Tensor]:
    """Gradients of x and of the norm's weight."""
    return run(_rmsnorm_backward, _rmsnorm_backward_here, dy, x, weight, rstd)


def pack_codes(codes: Tensor) -> Tensor:
    """int8 codes (rows, columns), rows a multiple of 4, to uint8 (rows / 4, columns): 2 bits a code."""
    return run(_pack_codes, _pack_codes_here, codes)


def unpack_codes(packed: Tensor) -> Tensor:
    """uint8 (rows / 4, columns) to int8 codes (rows, columns)."""
    return run(_unpack_codes, _unpack_codes_here, packed)


def has_kernels(x: Tensor, dtype: torch.dtype = torch.bfloat16) -> bool:
    """Whether the kernels run on x's device and compute in ``dtype``."""
    return x.is_cuda and dtype in _KERNEL_DTYPES and _gpu_has_kernels(x.get_device())


@cache
def _gpu_has_kernels(index: int) -> bool:
    return (
        torch.version.hip is None
        and torch.cuda.get_device_capability(index) >= (8, 0)
        and importlib.util.find_spec("triton") is not None
    )


def run(operation: Callable[..., Any], here: Callable[..., Any], x: Tensor, *rest: Any) -> Any:
    """Call ``here``, or the opaque ``operation`` that :func:`register` made of it."""
    opaque = torch.compiler.is_compiling() or not (type(x) is Tensor or type(x) is Parameter)
    return operation(x, *rest) if opaque else here(x, *rest)


def _ternarize_here(weight: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    if has_kernels(weight) and weight.numel():
        from .kernels import weights

        return weights.ternarize(weight)
    return plain.ternarize(weight)


def _dequantized_weight_here(weight: Tensor, g: Tensor, dtype: torch.dtype) -> Tensor:
    if has_kernels(weight, dtype) and weight.numel():
        from .kernels import weights

        return weights.dequantized_weight(weight, g, dtype)
    return plain.dequantized_weight(weight, g, dtype)


def _transposed_codes_here(weight: Tensor, g: Tensor) -> tuple[Tensor, Tensor]:
    if has_kernels(weight) and weight.numel():
        from .kernels import weights

        return weights.transposed_codes(weight, g)
    return plain.transposed_codes(weight, g)


def _quantize_activations_here(x: Tensor, dtype: torch.dtype, floor: float) -> tuple[Tensor, Tensor]:
    if has_kernels(x, dtype) and x.numel() and x.shape[-1] <= MAX_COLUMNS:
        from .kernels import activations

        return activations.quantize_activations(x, dtype, floor)
    return plain.quantize_activations(x, dtype, floor)


def _dequantize_activations_here(codes: Tensor, r: Tensor, dtype: torch.dtype) -> Tensor:
    if has_kernels(codes, dtype) and codes.numel():
        from .kernels import activations

        return activations.dequantize_activations(codes, r, dtype)
    return plain.dequantize_activations(codes, r, dtype)


def _matmul_here(
    codes_x: Tensor, r: Tensor, codes_w: Tensor, s: Tensor, bias: Tensor | None, dtype: torch.dtype
) -> Tensor:
    if has_kernels(codes_x, dtype) and codes_x.numel() and codes_w.numel():
        from .kernels import matmul as kernel

        return kernel.matmul(codes_x, r, codes_w, s, bias, dtype)
    return plain.matmul(codes_x, r, codes_w, s, bias, dtype)


def _swiglu_quantize_here(gate: Tensor, up: Tensor) -> tuple[Tensor, Tensor]:
    if has_kernels(gate, gate.dtype) and gate.numel() and gate.shape[-1] <= MAX_COLUMNS:
        from .kernels import swiglu

        return swiglu.swiglu_quantize(gate, up)
    return plain.swiglu_quantize(gate, up)


def _swiglu_backward_here(dh: Tensor, gate: Tensor, up: Tensor, r: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    if has_kernels(gate, gate.dtype) and gate.numel():
        from .kernels import swiglu

        return swiglu.swiglu_backward(dh, gate, up, r)
    return plain.swiglu_backward(dh, gate, up, r)


def _rmsnorm_quantize_here(
    x: Tensor, weight: Tensor, eps: float, dtype: torch.dtype
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    if has_kernels(x, x.dtype) and x.numel() and x.shape[-1] <= MAX_COLUMNS:
        from .kernels import rmsnorm

        return rmsnorm.rmsnorm_quantize(x, weight, eps, dtype)
    return plain.rmsnorm_quantize(x, weight, eps, dtype)


def _rmsnorm_backward_here(dy: Tensor, x: Tensor, weight: Tensor, rstd: Tensor) -> tuple[Tensor, Tensor]:
    if has_kernels(x, x.dtype) and x.numel() and x.shape[-1] <= MAX_COLUMNS:
        from .kernels import rmsnorm

        return rmsnorm.rmsnorm_backward(dy, x, weight, rstd)
    return plain.rmsnorm_backward(dy, x, weight, rstd)


def _pack_codes_here(codes: Tensor) -> Tensor:
    if has_kernels(codes) and codes.numel() and codes.shape[0] % plain.ROWS_PER_BYTE == 0:
        from .kernels import packing

        return packing.pack_codes(codes)
    return plain.pack_codes(codes)


def _unpack_codes_here(packed: Tensor) -> Tensor:
    if has_kernels(packed) and packed.numel():
        from .kernels import packing

        return packing.unpack_codes(packed)
    return plain.unpack_codes(packed)


_library = torch.library.Library("axolotl_bitnet", "DEF")


def register(here: Callable[..., Any], fake: Callable[..., Any]) -> Callable[..., Any]:
    """The lower level of ``torch.library.custom_op``: a call costs a quarter of what it does there."""
    name = here.__name__.removeprefix("_").removesuffix("_here")
    _library.define(name + torch.library.infer_schema(here, mutates_args=()))
    _library.impl(name, here, "CompositeExplicitAutograd")
    torch.library.register_fake(f"axolotl_bitnet::{name}", fake, lib=_library)
    return getattr(torch.ops.axolotl_bitnet, name).default


def _codes_and_r(x: Tensor) -> tuple[Tensor, Tensor]:
    return x.new_empty(x.shape, dtype=torch.int8), x.new_empty((*x.shape[:-1], 1), dtype=torch.float32)


_ternarize = register(
    _ternarize_here,
    lambda weight: (
        weight.new_empty(weight.shape, dtype=torch.int8),
        weight.new_empty(1, dtype=torch.bfloat16),
        weight.new_empty((), dtype=torch.float32),
    ),
)
_dequantized_weight = register(
    _dequantized_weight_here, lambda weight, g, dtype: weight.new_empty(weight.shape, dtype=dtype)
)
_transposed_codes = register(
    _transposed_codes_here,
    lambda weight, g: (
        weight.new_empty(weight.shape[::-1], dtype=torch.int8),
        weight.new_empty(1, dtype=torch.bfloat16),
    ),
)
_quantize_activations = register(_quantize_activations_here, lambda x, dtype, floor: _codes_and_r(x))
_dequantize_activations = register(
    _dequantize_activations_here, lambda codes, r, dtype: codes.new_empty(codes.shape, dtype=dtype)
)
_matmul = register(
    _matmul_here,
    lambda codes_x, r, codes_w, s, bias, dtype: codes_x.new_empty(
        (*codes_x.shape[:-1], codes_w.shape[0]), dtype=dtype
    ),
)
_swiglu_quantize = register(_swiglu_quantize_here, lambda gate, up: _codes_and_r(gate))
_swiglu_backward = register(
    _swiglu_backward_here, lambda dh, gate, up, r: tuple(gate.new_empty(gate.shape) for _ in range(3))
)
_rmsnorm_quantize = register(
    _rmsnorm_quantize_here,
    lambda x, weight, eps, dtype: (
        x.new_empty(x.shape),
        *_codes_and_r(x),
        x.new_empty((*x.shape[:-1], 1), dtype=torch.float32),
    ),
)
_rmsnorm_backward = register(
    _rmsnorm_backward_here,
    lambda dy, x, weight, rstd: (x.new_empty(x.shape), weight.new_empty(weight.shape)),
)
_pack_codes = register(
    _pack_codes_here,
    lambda codes: codes.new_empty((codes.shape[0] // plain.ROWS_PER_BYTE, codes.shape[1]), dtype=torch.uint8),
)
_unpack_codes = register(
    _unpack_codes_here,
    lambda packed: packed.new_empty(
        (packed.shape[0] * plain.ROWS_PER_BYTE, packed.shape[1]), dtype=torch.int8
    ),
)
