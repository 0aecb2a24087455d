"""Every ternary config that is refused, and its reason: sentences, before anything is loaded.

A file for each subject; a rule is a function of the config that returns sentences. Those that
need the base model's layers are in base_model, those that need a checkpoint in resume.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from .commands import command_refusals
from .keys import key_refusals
from .preference import preference_refusals
from .ramp import ramp_refusals
from .rounding import rounding_refusals, rounds_stochastically
from .sharding import fsdp_refusals, launch_refusal, sharding_refusals
from .teacher import teacher_refusals

__all__ = ["fsdp_refusals", "launch_refusal", "refusals", "rounds_stochastically"]


def refusals(cfg: Mapping[str, Any]) -> list[str]:
    """Why this ternary config cannot work: sentences, empty when it can."""
    rules = (
        key_refusals,
        sharding_refusals,
        preference_refusals,
        command_refusals,
        ramp_refusals,
        rounding_refusals,
        teacher_refusals,
    )
    return [sentence for rule in rules for sentence in rule(cfg)]
