"""Our entry in config.json, and what a format changes around it.

The entry says which layers are ternary and how they are stored; everything else in the file is transformers'
own.
"""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

from ..model.layer_plan import CONFIG_KEY, Plan
from ..storage.atomic import CheckpointError

FORMAT = "format"
"""Beside the list of ternary layers in config.json: how they are stored, where nothing else says it."""


DENSE = "dense"


def read_plan(config: Mapping[str, Any], where: str | Path) -> Plan:
    """Names of a checkpoint's ternary and dense linear layers, as conversion wrote them into its config.

    Raises:
        CheckpointError: the config has none, so the checkpoint was not trained with BitLinear layers of this
        package.
    """
    entry = config.get(CONFIG_KEY)
    if not isinstance(entry, dict) or not entry.get("converted"):
        raise CheckpointError(
            f"{where} does not say which layers are ternary (no '{CONFIG_KEY}' key): it was not trained by "
            "axolotl-bitnet. Load it, call convert_to_bitlinear(model) and save it again"
        )
    return Plan(list(entry["converted"]), list(entry.get("dense", [])), dict(entry.get("saved_as", {})))


def is_dense(config: Mapping[str, Any]) -> bool:
    """Whether a config.json says that its ternary layers are stored as ``codes / s``."""
    entry = config.get(CONFIG_KEY)
    return isinstance(entry, Mapping) and entry.get(FORMAT) == DENSE


def with_rope_theta(config: dict[str, Any]) -> dict[str, Any]:
    """A config with ``rope_theta`` at its top, where alone MLX looks for it: it would take 10000 without a
    word."""
    rope = config.get("rope_parameters")
    if not isinstance(rope, dict) or "rope_theta" not in rope:
        return config
    theta = config.get("rope_theta", rope["rope_theta"])
    return {key: value for key, value in config.items() if key != "rope_theta"} | {"rope_theta": theta}


def in_bfloat16(config: dict[str, Any]) -> dict[str, Any]:
    """A config, and those of a multimodal model's towers in it, that say how tensors are stored."""
    inside = {
        key: in_bfloat16(value)
        for key, value in config.items()
        if key.endswith("_config")
        and isinstance(value, dict)
        and ("dtype" in value or "torch_dtype" in value)
    }
    kept = {key: value for key, value in config.items() if key != "torch_dtype"}
    return kept | inside | {"dtype": "bfloat16"}


def _kind(config: Mapping[str, Any]) -> str | None:
    """The format that a config.json speaks of: ours, packed by others ("foreign"), or None: latents."""
    method = config.get("quantization_config")
    if isinstance(method, dict):
        return "packed" if CONFIG_KEY in config else "foreign"
    if isinstance(config.get("quantization"), dict):
        return "mlx"
    return "dense" if is_dense(config) else None
