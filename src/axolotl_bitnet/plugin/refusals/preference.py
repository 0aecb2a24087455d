"""Preference methods that cannot be made right with ternary weights."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

_METHODS = ("dpo", "ipo", "orpo", "simpo", "kto", "grpo", "gdpo")


_OWN_REFERENCE = ("kto", "grpo", "gdpo")  # TRL loads it itself, dense, and shards it at once


def preference_refusals(cfg: Mapping[str, Any]) -> list[str]:
    """Why this config's `rl:` method cannot work: sentences, empty when it can or there is none."""
    method = getattr(cfg.get("rl"), "value", cfg.get("rl"))
    if method is None:
        return []
    if method not in _METHODS:
        return [
            f"`rl: {method}` with `use_onebitllms`: it has not been checked that its models and rollouts are "
            f"the ternary policy's. Use one of {', '.join(_METHODS)}"
        ]
    found: list[str] = []
    trl = _block(cfg.get("trl"))
    sharded = [key for key in ("fsdp_config", "fsdp", "deepspeed") if cfg.get(key)]
    if sharded and method in _OWN_REFERENCE and has_reference(cfg):
        other = "" if method == "kto" else ", or set `trl.beta: 0` to do without a reference"
        found.append(
            f"`rl: {method}` with `{sharded[0]}` and `use_onebitllms`: TRL loads a dense reference model and "
            f"shards it before it could become ternary. Use DDP or one process{other}"
        )
    if method in ("grpo", "gdpo"):
        found += _rollout_refusals(cfg, trl)
    return found


def has_reference(cfg: Mapping[str, Any]) -> bool:
    """Whether this config's `rl:` method compares the policy with a reference model."""
    method = getattr(cfg.get("rl"), "value", cfg.get("rl"))
    trl = _block(cfg.get("trl"))
    beta = trl.get("beta") if trl.get("beta") is not None else cfg.get("rl_beta")
    return method in ("dpo", "ipo", "kto") or (method in ("grpo", "gdpo") and bool(beta))


def _rollout_refusals(cfg: Mapping[str, Any], trl: Mapping[str, Any]) -> list[str]:
    found: list[str] = []
    for key in ("async_prefetch", "use_data_producer"):
        if trl.get(key):
            found.append(
                f"`trl.{key}: true` with `use_onebitllms`: Axolotl's asynchronous trainer pushes no weights "
                "before the first step, so that vLLM would generate from the base's latents. Remove it"
            )
    if not trl.get("use_vllm"):
        return found
    if (cfg.get("context_parallel_size") or 1) > 1:
        found.append(
            "`context_parallel_size` above 1 with `trl.use_vllm` and `use_onebitllms`: that trainer pushes "
            "weights to vLLM by a path of its own, as latents. Use one of the two"
        )
    if trl.get("vllm_importance_sampling_correction") is False:
        found.append(
            "`trl.vllm_importance_sampling_correction: false` with `use_onebitllms`: vLLM does not quantize "
            "activations to 8 bits, so its samples are not quite the policy's and need the correction. "
            "Remove the key"
        )
    return found


def _block(value: Any) -> Mapping[str, Any]:
    return value if isinstance(value, Mapping) else {}
