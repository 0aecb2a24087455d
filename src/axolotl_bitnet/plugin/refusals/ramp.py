"""`bitnet.ramp_steps` in a run that ends too early, or with another model beside the policy."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from .preference import has_reference


def ramp_refusals(cfg: Mapping[str, Any]) -> list[str]:
    """Why this config's `bitnet.ramp_steps` cannot work: sentences, empty when it can or there is none."""
    steps = _ramp_steps(cfg)
    if not steps:
        return []
    found: list[str] = []
    max_steps = cfg.get("max_steps")
    if isinstance(max_steps, int) and 0 < max_steps <= steps:
        from ...model.layer_plan import too_short  # imports torch

        found.append(too_short(steps, max_steps))
    method = getattr(cfg.get("rl"), "value", cfg.get("rl"))
    if has_reference(cfg):
        found.append(
            f"`bitnet.ramp_steps` with `rl: {method}`: the reference model is fully ternary, and on a base "
            "that needs a ramp it is broken until it has trained; rewards would compare with that. Train "
            "with the ramp by supervised fine-tuning first, then run the preference method on its output"
        )
    trl = cfg.get("trl")
    if isinstance(trl, Mapping) and trl.get("use_vllm"):
        found.append(
            "`bitnet.ramp_steps` with `trl.use_vllm`: vLLM would get ternary weights while the policy is "
            "still on the way to them. Train with the ramp by supervised fine-tuning first"
        )
    return found


def _ramp_steps(cfg: Mapping[str, Any]) -> int:
    bitnet = cfg.get("bitnet")
    steps = bitnet.get("ramp_steps") if isinstance(bitnet, Mapping) else None
    return steps if isinstance(steps, int) else 0  # anything else is refused by its type
