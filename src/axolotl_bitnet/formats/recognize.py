"""What a stored model is, by its config.json alone. Without torch, so that `plan` starts at once."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, Literal

from ..model.entry import CONFIG_KEY, FORMAT_KEY

Kind = Literal["latents", "packed", "dense", "mlx", "third-party", "online", "quantized", "unlisted"]


@dataclass(frozen=True)
class Recognized:
    """What a stored model is, by its config.json.

    Attributes:
        kind: "latents", "packed", "dense" or "mlx": written by this package. "third-party": packed by another
            program in the way of BitNet. "online": Microsoft's bf16 BitNet, latents that transformers
            quantizes as it runs. "quantized": by another method. "unlisted": not in the config; a
            model that was never ternary, or one whose dense ternary layers nobody listed.
        method: ``quant_method`` of a quantized model.
        linear_class: transformers' class of a BitNet model's packed layers; ``autobitlinear`` multiplies by
            the scale, where ``bitlinear`` divides.
    """

    kind: Kind
    method: str | None = None
    linear_class: str | None = None


def recognize(config: Mapping[str, Any]) -> Recognized:
    """What the model beside a config.json is, by the config alone.

    A config of the architecture `bitnet` that names no ``linear_class`` can only be Microsoft's: no other
    program packs its sub-norms.
    """
    entry, ours = config.get(CONFIG_KEY), CONFIG_KEY in config
    quantization = config.get("quantization_config")
    if isinstance(quantization, Mapping):
        method = quantization.get("quant_method")
        microsoft = "autobitlinear" if config.get("model_type") == "bitnet" else "bitlinear"
        linear_class = quantization.get("linear_class", microsoft)
        online = linear_class == "autobitlinear" and quantization.get("quantization_mode") == "online"
        if method != "bitnet":
            return Recognized("packed" if ours else "quantized", method)
        return Recognized(
            "packed" if ours else "online" if online else "third-party", method, str(linear_class)
        )
    if isinstance(config.get("quantization"), Mapping):
        return Recognized("mlx")
    if not ours:
        return Recognized("unlisted")
    dense = isinstance(entry, Mapping) and entry.get(FORMAT_KEY) == "dense"
    return Recognized("dense" if dense else "latents")
