"""In compiled layers, attention without dropout is computed again without the state of the random numbers.

Replaced: ``has_recomputable_rng_ops`` of ``torch._functorch.partitioners``, in torch before 2.14, which has
the same (``is_rng_op``). Run on torch 2.11 and 2.13. Without these names nothing changes, and layers are
slower. Test: tests/test_compiled_attention_rng.py.

A checkpoint computes a layer's attention twice. torch counts attention among the operations that draw random
numbers, and a compiled layer then sets the generator's state around it each time: 6 % of the CPU's time in a
small step. Without dropout nothing is drawn.
"""

from __future__ import annotations

from importlib import import_module
from typing import Any

import torch


def without_random_state() -> bool:
    """Let a compiler see which operations of a checkpoint draw random numbers.

    Returns:
        Whether it did not already, and does now.
    """
    try:
        partitioners: Any = import_module("torch._functorch.partitioners")
        must_recompute = partitioners.must_recompute
    except (ImportError, AttributeError):
        return False
    if hasattr(partitioners, "is_rng_op") or not hasattr(partitioners, "has_recomputable_rng_ops"):
        return False

    def has_recomputable_rng_ops(fx_g: torch.fx.GraphModule) -> bool:
        return any(must_recompute(node) and _draws(node) for node in fx_g.graph.nodes)

    partitioners.has_recomputable_rng_ops = has_recomputable_rng_ops
    return True


def _draws(node: torch.fx.Node) -> bool:
    target: Any = node.target
    if torch.Tag.nondeterministic_seeded not in getattr(target, "tags", ()):
        return False
    for place, argument in enumerate(target._schema.arguments):
        if argument.name == "dropout_p":
            given = node.args[place] if place < len(node.args) else node.kwargs.get("dropout_p", 0.0)
            return not (isinstance(given, float) and given == 0.0)
    return True
