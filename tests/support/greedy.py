"""Greedy tokens of a transformers model, and how another engine's compare."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any, NamedTuple

import torch
from torch import Tensor


class Greedy(NamedTuple):
    """What a model says after a prompt: ``tokens``, and for each the log-probabilities (tokens, vocabulary)
    from which it was chosen."""

    tokens: list[int]
    rows: Tensor

    @property
    def margins(self) -> Tensor:
        """By how much each token was ahead of the second."""
        best = self.rows.topk(2).values
        return best[:, 0] - best[:, 1]

    def certain(self, margin: float) -> list[int]:
        """The tokens before the first that was ahead by less than ``margin``."""
        narrow = (self.margins < margin).tolist()
        return self.tokens[: narrow.index(True)] if True in narrow else self.tokens


@torch.no_grad()
def greedy(model: Any, ids: Sequence[int], count: int) -> Greedy:
    """``count`` tokens after a prompt, without a cache: each from the whole sequence."""
    tokens, rows = list(ids), []
    for _ in range(count):
        rows.append(model(torch.tensor([tokens]), use_cache=False).logits[0, -1].log_softmax(-1))
        tokens.append(int(rows[-1].argmax()))
    return Greedy(tokens[len(ids) :], torch.stack(rows))


def differences(
    expected: Greedy, tokens: Sequence[int], rows: Sequence[Mapping[int, float]]
) -> tuple[list[float], float | None]:
    """How far another engine is from a model that was given the same prompt.

    Args:
        expected: of the model.
        tokens: the engine's greedy tokens.
        rows: for each, some tokens' log-probabilities.

    Returns:
        The largest difference of a log-probability at each place up to the first where the tokens differ, and
        the model's margin there; None if all tokens are equal.
    """
    found: list[float] = []
    for place, (token, row) in enumerate(zip(tokens, rows, strict=True)):
        found.append(max(abs(value - float(expected.rows[place, at])) for at, value in row.items()))
        if token != expected.tokens[place]:
            return found, float(expected.margins[place])
    return found, None
