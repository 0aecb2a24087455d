"""Axolotl's kd plugin, with samples packed: no conversation may see another.

Changes the trainer's ``data_collator`` and ``eval_data_collator`` (run on Axolotl 0.19 and 0.21). A trainer
without them is refused before training. Tests: tests/test_distillation.py, tests/test_upstream_names.py.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any


class PackedApart:
    """A collator's batches without their attention mask, where position ids say what is one sample.

    The kd plugin's collator pads by ``tokenizer.pad``, which adds a mask of ones. With a mask, attention goes
    by that and not by the position ids, so that packed samples attend to each other; the teacher saw each
    alone. What pads a row has position 0 everywhere: samples of one token, without labels.
    """

    def __init__(self, collate: Callable[..., Any]) -> None:
        self.collate = collate

    def __call__(self, *args: Any, **kwargs: Any) -> Any:
        batch = self.collate(*args, **kwargs)
        if "position_ids" in batch:
            batch.pop("attention_mask", None)
        return batch


def keep_packed_apart(trainer: Any) -> None:
    """Give a kd trainer collators that keep packed samples apart.

    Raises:
        RuntimeError: this trainer has none to give.
    """
    if getattr(trainer, "data_collator", None) is None:
        raise RuntimeError(
            "`kd_trainer` with `sample_packing` and `use_onebitllms`: this trainer has no data_collator, and "
            "packed conversations would attend to each other. Set `sample_packing: false`"
        )
    for name in ("data_collator", "eval_data_collator"):
        if (collate := getattr(trainer, name, None)) is not None:
            setattr(trainer, name, PackedApart(collate))
