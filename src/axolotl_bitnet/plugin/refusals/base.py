"""The base model, by its config.json: quantized already, unknown to FSDP, or not to be exported as asked."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from ...formats.recognize import recognize
from ...formats.registry import FORMATS


def base_refusals(cfg: Mapping[str, Any], base: Mapping[str, Any]) -> list[str]:
    """Why this base cannot be trained ternary: sentences, empty when it can."""
    found = []
    if base.get("model_type") == "falcon" and cfg.get("fsdp_config"):
        found.append(
            "FSDP does not support the Falcon architecture (Falcon-E and Falcon3 are Llamas, and work)"
        )
    stored = recognize(base)
    if stored.kind in ("packed", "third-party", "quantized"):
        found.append(
            f"{cfg.get('base_model')} is quantized already ({stored.method}): training needs its latents. "
            "Take the bf16 or 'prequantized' variant of the model"
        )
    return found


def export_refusals(
    cfg: Mapping[str, Any], base: Mapping[str, Any], folder: Path | None, export: Sequence[str]
) -> list[str]:
    """Why an artifact that `bitnet.export` asks for could not be written after the training.

    Args:
        cfg: Axolotl's config.
        base: the base's config.json.
        folder: where the base's files are, if on this machine.
        export: names of formats.
    """
    own = folder if (cfg.get("tokenizer_config") or cfg.get("base_model")) == cfg.get("base_model") else None
    return [
        f"`bitnet.export: [{name}]` would fail when {cfg.get('base_model')} is trained: {reason}. Take it "
        "out of `export`"
        for name in export
        for reason in FORMATS[name].format.refusals(base, own)
    ]
