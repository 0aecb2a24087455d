"""GRPO's rollouts without vLLM: the policy generates from 2-bit weights.

Changes ``generate`` of a trainer's ``model``, on that instance (run on TRL 1.9 and 1.14, whose trainers that
generate have ``use_vllm`` and call it). A TRL that generates in another way gets BitLinear's own, slower,
calls. Tests: tests/test_packed_rollouts.py, tests/gpu/test_rollouts_gpu.py.
"""

from __future__ import annotations

from typing import Any

from ...serving.rollouts import generate_packed


def roll_out_packed(trainer: Any) -> None:
    """Make a trainer's policy generate packed, if it is a trainer that generates, without vLLM."""
    if getattr(trainer, "use_vllm", None) is False and hasattr(trainer.model, "generate"):
        generate_packed(trainer.model)
