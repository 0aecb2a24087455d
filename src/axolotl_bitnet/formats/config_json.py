"""Our entry in config.json, and what a format changes around it.

The entry lists the ternary layers and how they are stored; everything else in the file is transformers' own.
"""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

from ..model.entry import CONFIG_KEY
from ..model.layer_plan import Plan
from ..storage.atomic import CheckpointError, read_json


def read_config(folder: Path, known: Mapping[str, Any] | None) -> dict[str, Any]:
    """A folder's config.json, to be changed by the caller; ``known`` is what it holds, if it was read."""
    return read_json(folder / "config.json") if known is None else dict(known)


def read_plan(config: Mapping[str, Any], where: str | Path) -> Plan:
    """Names of a checkpoint's ternary and dense linear layers, as conversion wrote them into its config.

    Raises:
        CheckpointError: the config has none, so the checkpoint was not trained with BitLinear layers of this
        package.
    """
    try:
        plan = Plan.from_entry(config.get(CONFIG_KEY))
    except ValueError as error:
        raise CheckpointError(f"{where}: its '{CONFIG_KEY}' is damaged: {error}") from error
    if plan is None:
        raise CheckpointError(
            f"{where} does not say which layers are ternary (no '{CONFIG_KEY}' key): it was not trained by "
            "axolotl-bitnet. Load it, call convert_to_bitlinear(model) and save it again"
        )
    return plan


def with_rope_theta(config: dict[str, Any]) -> dict[str, Any]:
    """A config with ``rope_theta`` at its top, the only place where MLX reads it: without it MLX would
    silently take 10000."""
    rope = config.get("rope_parameters")
    if not isinstance(rope, dict) or "rope_theta" not in rope:
        return config
    theta = config.get("rope_theta", rope["rope_theta"])
    return {key: value for key, value in config.items() if key != "rope_theta"} | {"rope_theta": theta}


def in_bfloat16(config: dict[str, Any]) -> dict[str, Any]:
    """A config, and those of a multimodal model's towers in it, that hold how tensors are stored."""
    inside = {
        key: in_bfloat16(value)
        for key, value in config.items()
        if key.endswith("_config")
        and isinstance(value, dict)
        and ("dtype" in value or "torch_dtype" in value)
    }
    kept = {key: value for key, value in config.items() if key != "torch_dtype"}
    return kept | inside | {"dtype": "bfloat16"}


def architecture_name(config: Mapping[str, Any]) -> str:
    """transformers' class of the model, as a config.json names it; "" if it names none."""
    names = config.get("architectures")
    return names[0] if isinstance(names, list) and names and isinstance(names[0], str) else ""


def rope_of(config: Mapping[str, Any]) -> dict[str, Any]:
    """RoPE's parameters, whichever of transformers' two ways the config has them in."""
    rope = config.get("rope_parameters") or config.get("rope_scaling") or {}
    top = {key: config[key] for key in ("rope_theta", "partial_rotary_factor") if config.get(key) is not None}
    return top | dict(rope)


def rope_type(rope: Mapping[str, Any]) -> str:
    """How RoPE's parameters scale it: "default", "linear", "yarn", "llama3", ..."""
    return str(rope.get("rope_type") or rope.get("type") or "default")


def sliding_window(config: Mapping[str, Any]) -> str | None:
    """The config's window of attention, if it is shorter than the positions, in words; None without one.

    Mistral's window is on unless it is null, Qwen's is off unless ``use_sliding_window`` is on.
    """
    if config.get("use_sliding_window"):
        return "use_sliding_window"
    window, positions = config.get("sliding_window"), config.get("max_position_embeddings")
    if config.get("model_type") != "mistral" or not isinstance(window, int):
        return None
    return None if isinstance(positions, int) and positions <= window else f"sliding_window: {window}"
