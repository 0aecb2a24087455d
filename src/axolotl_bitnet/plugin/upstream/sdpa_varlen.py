"""Axolotl's attention for packed rows, without a wait for the GPU in every layer.

Changed: ``_is_packed`` of ``axolotl.monkeypatch.attention.sdpa_varlen``, and
``prepare_fa_kwargs_from_position_ids`` of ``transformers.modeling_flash_attention_utils``. Run on axolotl
0.19 and 0.21, transformers 5.16 and 5.20. Test: tests/test_sdpa_varlen.py.

Both read position ids back from the GPU, in every layer's forward and again when it is recomputed: the CPU
waits until the GPU has nothing left to do, and the GPU then waits for the CPU. The position ids of a
micro-batch are one tensor for all layers, so the answer is kept until another tensor comes. Without these
names nothing changes: the run is right, and slower.
"""

from __future__ import annotations

import importlib
import weakref
from collections.abc import Callable
from functools import wraps
from typing import Any

from torch import Tensor

SYMBOLS = (
    ("axolotl.monkeypatch.attention.sdpa_varlen", "_is_packed"),
    ("transformers.modeling_flash_attention_utils", "prepare_fa_kwargs_from_position_ids"),
)


def ask_once_a_batch() -> list[str]:
    """Let both functions keep their last answer; before Axolotl patches attention.

    Returns:
        The names that are not there to be changed.
    """
    missing = []
    for module_name, name in SYMBOLS:
        try:
            module = importlib.import_module(module_name)
            function = getattr(module, name)
        except (ImportError, AttributeError):
            missing.append(f"{module_name}.{name}")
            continue
        if not hasattr(function, "_axolotl_bitnet"):
            setattr(module, name, _kept(function))
    return missing


def _kept(function: Callable[[Tensor], Any]) -> Callable[[Tensor], Any]:
    """``function``, asked again only for another tensor, or one that was written to."""
    last: tuple[weakref.ref[Tensor], int, Any] | None = None

    @wraps(function)
    def answer(position_ids: Tensor) -> Any:
        nonlocal last
        if position_ids.is_inference():  # has no version
            return function(position_ids)
        if last is not None and last[0]() is position_ids and last[1] == position_ids._version:
            return last[2]
        found = _on_the_cpu(function(position_ids))
        last = weakref.ref(position_ids), position_ids._version, found
        return found

    answer._axolotl_bitnet = True  # type: ignore[attr-defined]
    return answer


def _on_the_cpu(found: Any) -> Any:
    """Single numbers among tuples as Python's: each reader would wait for the GPU to read them."""
    if isinstance(found, tuple):
        return tuple(map(_on_the_cpu, found))
    return found.item() if isinstance(found, Tensor) and found.dim() == 0 else found
