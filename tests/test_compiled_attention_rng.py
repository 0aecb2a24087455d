"""Attention that a compiled checkpoint computes again: the generator's state is kept only for dropout."""

from __future__ import annotations

from collections.abc import Iterator

import pytest
import torch
from torch import Tensor
from torch._functorch import partitioners
from torch.nn.functional import dropout, scaled_dot_product_attention
from torch.utils.checkpoint import checkpoint

from axolotl_bitnet.training.compiled_attention_rng import without_random_state


@pytest.fixture
def states(monkeypatch: pytest.MonkeyPatch) -> Iterator[list[bool]]:
    """An entry for each compiled graph that keeps the generator's state."""
    found: list[bool] = []
    functionalize = partitioners.functionalize_rng_ops

    def functionalized(*args: object, **kwargs: object) -> object:
        found.append(True)
        return functionalize(*args, **kwargs)

    monkeypatch.setattr(partitioners, "functionalize_rng_ops", functionalized)
    monkeypatch.setattr(
        partitioners, "has_recomputable_rng_ops", partitioners.has_recomputable_rng_ops
    )  # put back afterwards
    torch._dynamo.reset()
    yield found
    torch._dynamo.reset()


def gradient(x: Tensor, attention_dropout: float, output_dropout: float) -> Tensor:
    def layer(x: Tensor) -> Tensor:
        y = scaled_dot_product_attention(x, x, x, dropout_p=attention_dropout, is_causal=True)
        return dropout(y.sin(), output_dropout) if output_dropout else y.sin()

    x = x.clone().requires_grad_()
    compiled = torch.compile(
        lambda x: checkpoint(layer, x, use_reentrant=False), backend="aot_eager_decomp_partition"
    )
    torch.manual_seed(1)
    compiled(x).square().sum().backward()
    assert x.grad is not None
    return x.grad


@pytest.mark.parametrize(
    ("attention_dropout", "output_dropout", "draws"), [(0.0, 0.0, False), (0.5, 0.0, True), (0.0, 0.5, True)]
)
def test_the_state_is_kept_where_numbers_are_drawn(
    states: list[bool], attention_dropout: float, output_dropout: float, draws: bool
) -> None:
    x = torch.randn(1, 2, 8, 16)
    before = gradient(x, attention_dropout, output_dropout)
    torch._dynamo.reset()
    states.clear()
    without_random_state()
    after = gradient(x, attention_dropout, output_dropout)
    assert bool(states) == draws
    assert torch.equal(before, after)


@pytest.mark.parametrize("name", ["must_recompute", "has_recomputable_rng_ops"])
def test_a_torch_without_a_name_is_left_as_it_is(monkeypatch: pytest.MonkeyPatch, name: str) -> None:
    monkeypatch.delattr(partitioners, name)
    before = dict(vars(partitioners))
    assert not without_random_state()
    assert vars(partitioners) == before
