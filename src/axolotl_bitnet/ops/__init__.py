"""The operations that BitLinear is made of, each in plain torch and as a Triton kernel with the same results.

An operation takes and gives plain tensors; it knows neither layers nor models. Each is written once, in
:mod:`~axolotl_bitnet.ops.activations`, :mod:`~axolotl_bitnet.ops.weights`,
:mod:`~axolotl_bitnet.ops.gradients` or :mod:`~axolotl_bitnet.ops.packed`.
"""

from .activations import (
    dequantize_activations,
    matmul,
    matmul_onto,
    quantize_activations,
    rmsnorm_backward,
    rmsnorm_quantize,
    swiglu_backward,
    swiglu_quantize,
)
from .gradients import (
    GRADIENT_FLOOR,
    MOST_TOKENS,
    gradient_peaks,
    quantize_gradient,
    swiglu_gradients,
    transposed_activations,
    weight_product,
)
from .operation import has_kernels
from .packed import packed_matmul
from .weights import (
    ROWS_PER_BYTE,
    ShardLayout,
    abs_sum_parts,
    dequantize_shards,
    dequantized_weight,
    pack_codes,
    pack_shard,
    ternarize,
    transposed_codes,
    transposed_shards,
    unpack_codes,
    unpack_layer,
    unpack_shards,
)

__all__ = [
    "GRADIENT_FLOOR",
    "MOST_TOKENS",
    "ROWS_PER_BYTE",
    "ShardLayout",
    "abs_sum_parts",
    "dequantize_activations",
    "dequantize_shards",
    "dequantized_weight",
    "gradient_peaks",
    "has_kernels",
    "matmul",
    "matmul_onto",
    "pack_codes",
    "pack_shard",
    "packed_matmul",
    "quantize_activations",
    "quantize_gradient",
    "rmsnorm_backward",
    "rmsnorm_quantize",
    "swiglu_backward",
    "swiglu_gradients",
    "swiglu_quantize",
    "ternarize",
    "transposed_activations",
    "transposed_codes",
    "transposed_shards",
    "unpack_codes",
    "unpack_layer",
    "unpack_shards",
    "weight_product",
]
