"""Which nn.Linear become BitLinear, and the swap.

Every nn.Linear of the language model becomes ternary, except the output head, what the user names, vision and
audio towers, and MoE routers. The swap changes a module's class in place: the Parameter object, its device
(meta too), its hooks and its sharding stay. The names are written to the model's config, and that list is the
only one that packing and verification use.
"""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import replace
from types import MethodType
from typing import get_args

from torch import nn

from ..layers.bitlinear import BitLinear
from ..layers.fused_llama import fuse_layers
from ..layers.products import Backward
from .entry import CONFIG_KEY
from .layer_plan import _is_auto_bitlinear, _saved_as, plan_conversion


def convert_to_bitlinear(
    model: nn.Module, skip_modules: Iterable[str] = (), fuse: bool = True, backward: Backward = "bf16"
) -> list[str]:
    """Make a model ternary, in place.

    Args:
        model: any model; one of transformers also gets the list of names into its config.
        skip_modules: linear layers to leave dense, beside the output head: a full name
            (``model.layers.0.mlp.up_proj``), the end of one (``down_proj``), a parent (``model.layers.0``) or
            a glob (``*.layers.0.*``).
        fuse: fuse Llama-shaped MLPs and norms with the quantization behind them
            (:func:`axolotl_bitnet.layers.fused_llama.fuse_layers`): the same codes, less traffic and memory.
        backward: ``bf16``; with ``int8_dx`` gradients of the layers' inputs come from int8 tensor cores, with
            ``int8`` those of the weights too.

    Returns:
        The names of the BitLinear layers.

    Raises:
        ConversionError: a layer cannot be packed or would bypass its module, or a pattern matches nothing.
        ValueError: no such ``backward``.
    """
    if backward not in get_args(Backward):
        raise ValueError(f"backward is one of {', '.join(get_args(Backward))}, not {backward!r}")
    plan = plan_conversion(model, skip_modules)
    saved_as = _saved_as(model, plan.converted)
    if any(_is_auto_bitlinear(model.get_submodule(name)) for name in plan.converted):
        _forget_quantizer(model)
    for name in plan.converted:
        _swap(model.get_submodule(name), backward)
    if fuse:
        fuse_layers(model)
    config = getattr(model, "config", None)
    if config is not None:
        setattr(config, CONFIG_KEY, replace(plan, saved_as=saved_as).to_entry())
    return plan.converted


def _forget_quantizer(model: nn.Module) -> None:
    """Microsoft's bf16 BitNet loads as a quantized model; with BitLinear it is a plain one, saved and trained
    as such."""
    config = getattr(model, "config", None)
    for owner, attribute in (
        (model, "hf_quantizer"),
        (model, "quantization_method"),
        (config, "quantization_config"),
    ):
        if hasattr(owner, attribute):
            delattr(owner, attribute)
    model.is_quantized = False  # type: ignore[assignment]


def _swap(module: nn.Module, backward: Backward) -> None:
    if _is_auto_bitlinear(module):
        for leftover in ("online_quant", "rms_norm"):
            if hasattr(module, leftover):
                delattr(module, leftover)
    module.__class__ = BitLinear
    if backward != BitLinear.backward:
        module.backward = backward  # type: ignore[assignment]
    if "_old_forward" in vars(module):  # accelerate's hooks (device_map) keep the forward that they wrap
        module._old_forward = MethodType(BitLinear.forward, module)  # type: ignore[assignment]
