"""bfloat16 latents with stochastic rounding: `optimizer: adamw_torch_8bit` and its `optim_args`."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

HIGHEST_BETA2 = 1 - 2.0**-8
"""From here on, a bfloat16 second moment cannot decay: its change is below half a unit in the last place."""


def rounds_stochastically(cfg: Mapping[str, Any]) -> bool:
    """Whether this config asks torchao's AdamW8bit to round bfloat16 weights stochastically."""
    optimizer = getattr(cfg.get("optimizer"), "value", cfg.get("optimizer"))
    if optimizer != "adamw_torch_8bit":
        return False
    given = cfg.get("optim_args") or {}
    if isinstance(given, str):
        given = dict(part.partition("=")[::2] for part in given.replace(" ", "").split(",") if part)
    asked = given.get("bf16_stochastic_round", False) if isinstance(given, Mapping) else False
    return str(asked).lower() in ("true", "1", "yes", "y", "on", "t")


def rounding_refusals(cfg: Mapping[str, Any]) -> list[str]:
    """Why this config's stochastic rounding cannot work: sentences, empty when it can or there is none."""
    if not rounds_stochastically(cfg):
        return []
    found = []
    options = cfg.get("bitnet")
    dtype = options.get("latent_dtype") if isinstance(options, Mapping) else None
    if dtype != "bfloat16":
        found.append(
            "`optim_args: bf16_stochastic_round=True` has no effect on float32 latents: set "
            "`bitnet.latent_dtype: bfloat16`, or remove it"
        )
    beta2 = cfg.get("adam_beta2")
    beta2 = 0.999 if beta2 is None else beta2  # transformers' default
    if isinstance(beta2, int | float) and beta2 >= HIGHEST_BETA2:
        found.append(
            f"`adam_beta2: {beta2}` with `optim_args: bf16_stochastic_round=True`: the second moments of "
            "norms are kept in bfloat16, where they cannot decay that slowly, and their updates would shrink "
            "for good. Set `adam_beta2: 0.95`"
        )
    sharding = cfg.get("fsdp_config")
    saves = str(cfg.get("save_strategy")) not in ("no", "False") and not cfg.get("save_only_model")
    if sharding and saves and _get(sharding, "state_dict_type") != "SHARDED_STATE_DICT":
        found.append(
            "`fsdp_config.state_dict_type` other than `SHARDED_STATE_DICT` with `optim_args: "
            "bf16_stochastic_round=True`: torchao's 8-bit moments cannot be gathered into a checkpoint that "
            'could be resumed. Set `state_dict_type: SHARDED_STATE_DICT`, or `save_strategy: "no"`. (The '
            "weights at the end are saved whole either way)"
        )
    return found


def _get(block: Any, key: str) -> Any:
    """A key of a block, before validation (a dict) or after it (a model)."""
    return block.get(key) if isinstance(block, Mapping) else getattr(block, key, None)
