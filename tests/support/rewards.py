"""A reward function for GRPO runs, named in their configs as `support.rewards.low_tokens`."""

from __future__ import annotations

from typing import Any


def low_tokens(prompts: list[Any], completions: list[Any], **columns: Any) -> list[float]:
    """The share of a completion's tokens in the lower half of the demo's vocabulary."""
    return [sum(token < 256 for token in ids) / max(len(ids), 1) for ids in columns["completion_ids"]]
