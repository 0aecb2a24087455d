"""Ramp and monitor in an Axolotl run: what is refused, and what is added to the trainer."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch

from ..convert import too_short
from .preference import has_reference

if TYPE_CHECKING:
    from .args import BitNetConfig


def ramp_refusals(cfg: Mapping[str, Any]) -> list[str]:
    """Why this config's `bitnet.ramp_steps` cannot work: sentences, empty when it can or there is none."""
    steps = _ramp_steps(cfg)
    if not steps:
        return []
    found: list[str] = []
    max_steps = cfg.get("max_steps")
    if isinstance(max_steps, int) and 0 < max_steps <= steps:
        found.append(too_short(steps, max_steps))
    method = getattr(cfg.get("rl"), "value", cfg.get("rl"))
    if has_reference(cfg):
        found.append(
            f"`bitnet.ramp_steps` with `rl: {method}`: the reference model is fully ternary, and on a base "
            "that needs a ramp it is broken until it has trained; rewards would measure that. Train with "
            "the ramp by supervised fine-tuning first, then run the preference method on its output"
        )
    trl = cfg.get("trl")
    if isinstance(trl, Mapping) and trl.get("use_vllm"):
        found.append(
            "`bitnet.ramp_steps` with `trl.use_vllm`: vLLM would get ternary weights while the policy is "
            "still on the way to them. Train with the ramp by supervised fine-tuning first"
        )
    return found


def watch(cfg: Any, trainer: Any, options: BitNetConfig, resumed: Path | None) -> list[Any]:
    """The callbacks of a run's ramp and monitor; what they have to say goes into the trainer's log."""
    from ..training.logs import log_through  # transformers: not where a config is only checked
    from ..training.monitor import Monitor
    from ..training.ramp import RampSchedule, log_ternary_loss

    callbacks: list[Any] = []
    if options.ramp_steps:
        callbacks.append(RampSchedule(options.ramp_steps))
        log_ternary_loss(trainer)
    if options.monitor:
        callbacks.append(Monitor(resumed, torch.float32 if cfg.deepspeed else None))  # its masters' dtype
    log_through(trainer, *callbacks)
    return callbacks


def _ramp_steps(cfg: Mapping[str, Any]) -> int:
    bitnet = cfg.get("bitnet")
    steps = bitnet.get("ramp_steps") if isinstance(bitnet, Mapping) else None
    return steps if isinstance(steps, int) else 0  # anything else is refused by its type
