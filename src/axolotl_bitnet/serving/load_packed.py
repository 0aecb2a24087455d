"""A packed folder as a transformers model whose layers run 2-bit weights as they are.

transformers can load the folder by itself: its layers unpack all weights at every call, and in bfloat16 they
round the activations' scales. Here transformers loads it too (weights as they stream in, devices, tied
embeddings), told by a quantizer of ours to put :class:`~.packed_linear.PackedLinear` where it would put its
own layers.
"""

from __future__ import annotations

from pathlib import Path
from typing import Any

import torch
from torch import nn
from transformers import AutoConfig, AutoModelForCausalLM
from transformers.quantizers.auto import register_quantization_config, register_quantizer
from transformers.quantizers.base import HfQuantizer
from transformers.quantizers.quantizers_utils import should_convert_module
from transformers.utils.quantization_config import QuantizationConfigMixin

from ..formats.third_party import multiplies
from ..storage.atomic import CheckpointError, read_json
from .packed_linear import PackedLinear, prepare

_METHOD = "axolotl_bitnet"


def load_packed(folder: str | Path, **options: Any) -> Any:
    """Load a packed model for inference: this package's, onebitllms's or Microsoft's.

    In float32 its logits are those of the trained model, bit for bit. In bfloat16 each layer gives
    BitLinear's bits for the same input, so whole logits are those of the trained model cast to bfloat16 (no
    autocast, the same attention).

    Args:
        folder: of the packed model.
        options: for ``AutoModelForCausalLM.from_pretrained``: ``dtype`` (float32, or bfloat16, the stored one
            and the default), ``device_map`` ("cuda"), ``attn_implementation``, ...

    Returns:
        The transformers model, in eval mode.

    Raises:
        CheckpointError: the folder is not packed, or in a way that is not known here.
        ValueError: a layer's scale is not positive and finite.
    """
    path = Path(folder) / "config.json"
    stored = read_json(path)
    if not (entry := stored.get("quantization_config")):
        raise CheckpointError(f"{path} has no quantization_config: it is not a packed model's")
    config = AutoConfig.from_pretrained(folder)
    config.quantization_config = {
        "quant_method": _METHOD,
        "multiplies": multiplies(stored, path),
        "dense": entry.get("modules_to_not_convert"),
    }
    return AutoModelForCausalLM.from_pretrained(folder, config=config, **{"dtype": "auto"} | options).eval()


@register_quantization_config(_METHOD)
class _PackedConfig(QuantizationConfigMixin):
    def __init__(self, multiplies: bool, dense: list[str] | None, **_: Any):
        self.quant_method = _METHOD
        self.multiplies, self.dense = multiplies, dense


@register_quantizer(_METHOD)
class _PackedQuantizer(HfQuantizer):
    requires_calibration = True  # the weights are packed already
    is_trainable = False

    def is_serializable(self) -> bool:
        return False  # on a CPU the layers hold no bytes any more; the folder is there to be copied

    def _process_model_before_weight_loading(self, model: Any, **_: Any) -> None:
        how = self.quantization_config
        dense = self.get_modules_to_not_convert(model, how.dense, model._keep_in_fp32_modules)
        for name, module in list(model.named_modules()):
            if isinstance(module, nn.Linear) and should_convert_module(name, dense):
                shape = module.in_features, module.out_features
                with torch.device("meta"):
                    layer = PackedLinear(*shape, module.bias is not None, module.weight.dtype)
                model.set_submodule(name, layer)

    def _process_model_after_weight_loading(self, model: Any, **_: Any) -> None:
        for name, module in model.named_modules():
            if isinstance(module, PackedLinear):
                prepare(module, [module.out_features], self.quantization_config.multiplies, name)
