"""Axolotl's attention for packed rows, without a wait for the GPU in every layer.

Changed: ``_is_packed`` of ``axolotl.monkeypatch.attention.sdpa_varlen``, and
``prepare_fa_kwargs_from_position_ids`` of ``transformers.modeling_flash_attention_utils``, and
``get_batch_samples`` of transformers' Trainer. Run on axolotl 0.19 and 0.21, transformers 5.16 and 5.20.
Test: tests/test_sdpa_varlen.py.

Both functions read position ids back from the GPU, in every layer's forward and again when it is recomputed:
the CPU waits until the GPU has nothing left to do, and the GPU then waits for the CPU. The position ids of a
micro-batch are one tensor for all layers, so the answers are kept; and they are asked for when the Trainer
has fetched a step's batches, which waits for the GPU anyway. Without these names nothing changes: the run is
right, and slower.
"""

from __future__ import annotations

import importlib
import weakref
from collections.abc import Callable, Mapping
from functools import wraps
from typing import Any

from torch import Tensor

SYMBOLS = (
    ("axolotl.monkeypatch.attention.sdpa_varlen", "_is_packed"),
    ("transformers.modeling_flash_attention_utils", "prepare_fa_kwargs_from_position_ids"),
)

_MOST = 256  # answers kept; a step's micro-batches are fewer


def ask_once_a_batch() -> list[str]:
    """Let both functions keep their last answer; before Axolotl patches attention.

    Returns:
        The names that are not there to be changed.
    """
    missing = []
    for module_name, name in SYMBOLS:
        function = find(module_name, name)
        if function is None:
            missing.append(f"{module_name}.{name}")
        elif not hasattr(function, "_axolotl_bitnet"):
            setattr(importlib.import_module(module_name), name, _kept(function))
    return missing


def ask_ahead(trainer: Any) -> None:
    """Let a transformers Trainer ask for all batches of a step when it has fetched them. After
    :func:`ask_once_a_batch`."""
    get_batch_samples = getattr(trainer, "get_batch_samples", None)
    if get_batch_samples is None or any(find(*symbol) is None for symbol in SYMBOLS):
        return

    def fetch_and_ask(*args: Any, **kwargs: Any) -> Any:
        fetched = get_batch_samples(*args, **kwargs)
        is_packed, lengths_of = (find(*symbol) for symbol in SYMBOLS)
        for batch in fetched[0]:
            ids = batch.get("position_ids") if isinstance(batch, Mapping) else None
            if isinstance(ids, Tensor) and ids.dim() == 2 and is_packed(ids):
                lengths_of(ids)
        return fetched

    trainer.get_batch_samples = fetch_and_ask


def find(module_name: str, name: str) -> Any:
    """A function of another package as it is now, patched perhaps; None where there is none."""
    try:
        return getattr(importlib.import_module(module_name), name, None)
    except ImportError:
        return None


def _kept(function: Callable[[Tensor], Any]) -> Callable[[Tensor], Any]:
    """``function``, asked once for a tensor, and again if it was written to."""
    kept: dict[int, tuple[weakref.ref[Tensor], int, Any]] = {}

    @wraps(function)
    def answer(position_ids: Tensor) -> Any:
        if position_ids.is_inference():  # has no version
            return function(position_ids)
        last = kept.get(id(position_ids))
        if last is not None and last[0]() is position_ids and last[1] == position_ids._version:
            return last[2]
        found = _on_the_cpu(function(position_ids))
        if len(kept) >= _MOST:
            kept.clear()
        kept[id(position_ids)] = weakref.ref(position_ids), position_ids._version, found
        return found

    answer._axolotl_bitnet = True  # type: ignore[attr-defined]
    return answer


def _on_the_cpu(found: Any) -> Any:
    """Single numbers among tuples as Python's: each reader would wait for the GPU to read them."""
    if isinstance(found, tuple):
        return tuple(map(_on_the_cpu, found))
    return found.item() if isinstance(found, Tensor) and found.dim() == 0 else found
