"""Packed models in vLLM: the quantization method "bitnet", which vLLM itself does not have.

vLLM finds :func:`register` by the entry-point group ``vllm.general_plugins`` and calls it in each of its
processes. The layers are vLLM's own; the arithmetic is that of :mod:`.packed_linear`.

Tensor parallelism is refused. A packed row of bytes holds rows r, r + n/4, r + n/2 and r + 3n/4 of a matrix,
so a slice of the bytes is no slice of rows; and a layer that is divided by columns would quantize a part of
each token by itself.
"""

from __future__ import annotations

from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from transformers.quantizers.quantizers_utils import should_convert_module
from vllm.model_executor.layers.linear import (
    LinearBase,
    LinearMethodBase,
    UnquantizedLinearMethod,
    register_weight_loader_v2_supported_method,
)
from vllm.model_executor.layers.quantization import register_quantization_config
from vllm.model_executor.layers.quantization.base_config import QuantizationConfig
from vllm.model_executor.parameter import PackedColumnParameter, PerTensorScaleParameter

from ..formats.third_party import multiplies
from ..ops import ROWS_PER_BYTE
from .packed_linear import apply, prepare


class BitNetConfig(QuantizationConfig):
    """The ``quantization_config`` of a packed model, whoever packed it."""

    def __init__(self, entry: dict[str, Any]):
        super().__init__()
        self.entry = entry
        self.multiplies = False

    def get_name(self) -> str:
        return "bitnet"

    def get_supported_act_dtypes(self) -> list[torch.dtype]:
        return [torch.bfloat16, torch.float16, torch.float32]

    @classmethod
    def get_min_capability(cls) -> int:
        return 80

    @staticmethod
    def get_config_filenames() -> list[str]:
        return []

    @classmethod
    def from_config(cls, config: dict[str, Any]) -> BitNetConfig:
        return cls(config)

    def maybe_update_config(
        self, model_name: str, hf_config: Any = None, revision: str | None = None
    ) -> None:
        config = hf_config.to_dict() | {"quantization_config": self.entry}
        self.multiplies = multiplies(config, Path(model_name) / "config.json")

    def get_quant_method(self, layer: Any, prefix: str) -> LinearMethodBase | None:
        if "Expert" in type(layer).__name__ or "MoE" in type(layer).__name__:
            raise ValueError(
                f"'{prefix}': layers of experts cannot be packed, so they cannot be served packed"
            )
        if not isinstance(layer, LinearBase):
            return None
        parent, _, own = prefix.rpartition(".")
        names = [f"{parent}.{part}" for part in self.packed_modules_mapping.get(own, [own])]
        packed = {
            name: should_convert_module(name, self.entry.get("modules_to_not_convert")) for name in names
        }
        if not any(packed.values()):
            return UnquantizedLinearMethod()
        if not all(packed.values()):
            dense = next(name for name, is_packed in packed.items() if not is_packed)
            raise ValueError(
                f"vLLM computes {', '.join(names)} as one layer, and '{dense}' is dense while others are "
                "packed: train with all or none of them in bitnet.skip_modules, or serve the dense export"
            )
        return BitNetLinearMethod(self, prefix)


@register_weight_loader_v2_supported_method
class BitNetLinearMethod(LinearMethodBase):
    """A linear layer of vLLM's, maybe of several matrices, with packed weights."""

    def __init__(self, config: BitNetConfig, name: str):
        self.config, self.name = config, name

    def create_weights(
        self,
        layer: Any,
        input_size_per_partition: int,
        output_partition_sizes: list[int],
        input_size: int,
        output_size: int,
        params_dtype: torch.dtype,
        **attributes: Any,
    ) -> None:
        if layer.tp_size > 1:
            raise ValueError(
                "packed models cannot be served with --tensor-parallel-size above 1: a slice of packed bytes "
                "is no slice of rows. Use --data-parallel-size or --pipeline-parallel-size, or serve the "
                "dense export"
            )
        loader = attributes["weight_loader"]
        rows = sum(output_partition_sizes) // ROWS_PER_BYTE
        weight = torch.empty(rows, input_size_per_partition, dtype=torch.uint8)
        layer.register_parameter(
            "weight",
            PackedColumnParameter(
                data=weight, output_dim=0, packed_dim=0, packed_factor=ROWS_PER_BYTE, weight_loader=loader
            ),
        )
        scale = torch.full((len(output_partition_sizes),), torch.nan, dtype=torch.float32)
        layer.register_parameter("weight_scale", PerTensorScaleParameter(data=scale, weight_loader=loader))
        self.sizes = output_partition_sizes

    def process_weights_after_loading(self, layer: Any) -> None:
        prepare(layer, self.sizes, self.config.multiplies, self.name)

    def apply(self, layer: Any, x: Tensor, bias: Tensor | None = None) -> Tensor:
        return apply(layer, x, bias)


def register() -> None:
    """Add the method "bitnet" to this process's vLLM; again does nothing."""
    register_quantization_config("bitnet")(BitNetConfig)
