"""A config.json as mlx-lm reads it: RoPE, and what mlx-lm would compute otherwise than transformers.

Read in mlx-lm 0.32: its Llama, which computes Mistral too, and Qwen2 take ``rope_scaling`` at the top of the
config and know no ``rope_parameters``; Qwen3 takes either. All of them take yarn's ``mscale``, and none its
``attention_factor``.
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from typing import Any

from .config_json import rope_of, rope_type, sliding_window

_RUN = ("llama", "mistral", "qwen2", "qwen3")
"""Architectures whose logits the tests compare, with each scaling of RoPE below."""

_SCALINGS = ("default", "linear", "llama3", "yarn")


def rope_scaling(config: Mapping[str, Any]) -> dict[str, Any] | None:
    """``rope_scaling`` for the top of a config; None where RoPE is not scaled.

    transformers takes it in place of ``rope_parameters``, so that all of these are in it.
    """
    rope = rope_of(config)
    kind = rope_type(rope)
    if kind not in _SCALINGS[1:]:
        return None
    scaling = {key: value for key, value in rope.items() if key not in ("type", "rope_theta")}
    scaling = {key: value for key, value in scaling.items() if value is not None} | {"rope_type": kind}
    if kind != "yarn":
        return scaling
    before = scaling.setdefault("original_max_position_embeddings", config.get("max_position_embeddings"))
    factor = scaling.setdefault("factor", config.get("max_position_embeddings", before) / before)
    if "attention_factor" in scaling and factor > 1:  # as mscale: 0.1 mscale ln(factor) + 1
        scaling["mscale"] = (float(scaling["attention_factor"]) - 1) / (0.1 * math.log(factor))
        scaling["mscale_all_dim"] = 0.0
    elif not (scaling.get("mscale") and scaling.get("mscale_all_dim")):  # transformers takes both or none
        scaling.pop("mscale", None)
        scaling.pop("mscale_all_dim", None)
    return scaling


def computed_otherwise(config: Mapping[str, Any]) -> list[str]:
    """Why mlx-lm cannot run a model, or would silently compute another one."""
    name, rope = config.get("model_type"), rope_of(config)
    if name == "bitnet":
        return ["mlx-lm's `bitnet` architecture reads the packed layout only: use the packed folder"]
    kind, found = rope_type(rope), []
    if name not in _RUN:
        return [f"rope_type '{kind}': scaled RoPE of '{name}' has not been run in mlx-lm"] * (
            kind != "default"
        )
    if kind not in _SCALINGS:
        found.append(f"rope_type '{kind}': RoPE is written for mlx-lm scaled as linear, llama3 or yarn do")
    if kind == "yarn" and rope.get("truncate") is False:
        found.append("rope_type yarn with truncate false: mlx-lm always truncates")
    if kind == "yarn" and rope.get("attention_factor") is not None and float(rope.get("factor") or 2) <= 1:
        found.append(
            "rope_type yarn with an attention_factor and no factor above 1: mlx-lm has no such scale"
        )
    if rope.get("partial_rotary_factor", 1.0) != 1.0:
        found.append("partial_rotary_factor: mlx-lm rotates the whole of a head")
    if (act := config.get("hidden_act", "silu")) not in ("silu", "swish"):
        found.append(f"hidden_act '{act}': mlx-lm computes {name} with silu only")
    if window := sliding_window(config):
        found.append(f"{window}: mlx-lm computes {name} with full attention only")
    heads, hidden = config.get("num_attention_heads"), config.get("hidden_size")
    whole = heads and hidden and config.get("head_dim") not in (None, hidden // heads)
    if name == "qwen2" and whole:
        found.append(f"head_dim {config['head_dim']}: mlx-lm's qwen2 has hidden_size / num_attention_heads")
    if name == "qwen3" and config.get("attention_bias"):
        found.append("attention_bias: mlx-lm's qwen3 has no biases")
    return found
