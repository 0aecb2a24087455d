"""The operations that BitLinear is made of, each in plain torch and as a Triton kernel with the same results.

An operation takes and gives plain tensors; it knows neither layers nor models.
"""

from .operations import (
    dequantize_activations,
    dequantized_weight,
    has_kernels,
    matmul,
    pack_codes,
    quantize_activations,
    register,
    rmsnorm_backward,
    rmsnorm_quantize,
    run,
    swiglu_backward,
    swiglu_quantize,
    ternarize,
    transposed_codes,
    unpack_codes,
)

__all__ = [
    "dequantize_activations",
    "dequantized_weight",
    "has_kernels",
    "matmul",
    "pack_codes",
    "quantize_activations",
    "register",
    "rmsnorm_backward",
    "rmsnorm_quantize",
    "run",
    "swiglu_backward",
    "swiglu_quantize",
    "ternarize",
    "transposed_codes",
    "unpack_codes",
]
