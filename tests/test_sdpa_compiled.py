"""Attention of compiled layers to packed rows: a conversation sees itself alone, as in Axolotl's own."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import pytest
import torch
from axolotl.monkeypatch.attention.sdpa_varlen import patch_sdpa_varlen, unpatch_sdpa_varlen

from axolotl_bitnet.plugin.upstream.sdpa_compiled import ask_before_the_layers
from axolotl_bitnet.training.layer_compile import compile_layers
from support.models import tiny_model

LENGTHS = (5, 9, 4)


@pytest.fixture
def patched() -> Iterator[None]:
    patch_sdpa_varlen()
    yield
    unpatch_sdpa_varlen()
    torch._dynamo.reset()


def positions(*lengths: int) -> torch.Tensor:
    return torch.cat([torch.arange(length) for length in lengths])[None]


def logits(model: Any, ids: torch.Tensor, *lengths: int) -> torch.Tensor:
    return model(input_ids=ids, position_ids=positions(*lengths), use_cache=False).logits


@pytest.mark.parametrize("compiled", [False, True], ids=["eager", "compiled"])
def test_packed_rows_are_their_conversations(patched: None, compiled: bool) -> None:
    torch.manual_seed(3)
    model = tiny_model("Llama", attn_implementation="sdpa")
    ids = torch.randint(3, 128, (1, sum(LENGTHS)))
    asked = logits(model, ids, *LENGTHS)
    apart = [logits(model, part, part.shape[1]) for part in ids.split(LENGTHS, 1)]
    assert ask_before_the_layers(model)
    if compiled:
        assert compile_layers(model, backend="eager", fullgraph=True) == 2
    told = logits(model, ids, *LENGTHS)
    torch.testing.assert_close(told, asked)
    torch.testing.assert_close(told, torch.cat(apart, 1))
    whole = logits(model, ids, sum(LENGTHS))
    assert (whole[:, 5:] - told[:, 5:]).abs().max() > 1e-3  # else the row would not show it


def test_a_padding_mask_without_padding_does_not_mix_conversations(patched: None) -> None:
    """transformers drops a mask of ones before the layers: what is packed is known from positions alone."""
    torch.manual_seed(3)
    model = tiny_model("Llama", attn_implementation="sdpa")
    ids = torch.randint(3, 128, (1, sum(LENGTHS)))
    ask_before_the_layers(model)
    compile_layers(model, backend="eager", fullgraph=True)
    masked = model(
        input_ids=ids, attention_mask=torch.ones_like(ids), position_ids=positions(*LENGTHS), use_cache=False
    ).logits
    torch.testing.assert_close(masked, logits(model, ids, *LENGTHS))


def test_a_model_that_does_not_ask_beforehand_asks_as_axolotl_does(patched: None) -> None:
    """It shares the compiled model's attention, and is not hooked."""
    torch.manual_seed(3)
    model, other = (tiny_model("Llama", attn_implementation="sdpa") for _ in range(2))
    ids = torch.randint(3, 128, (1, sum(LENGTHS)))
    before = logits(other, ids, *LENGTHS)
    assert ask_before_the_layers(model)
    assert torch.equal(logits(other, ids, *LENGTHS), before)


def test_another_attention_is_left_alone() -> None:
    from transformers.modeling_utils import ALL_ATTENTION_FUNCTIONS

    model, before = tiny_model("Llama"), ALL_ATTENTION_FUNCTIONS["sdpa"]
    assert not ask_before_the_layers(model)
    assert ALL_ATTENTION_FUNCTIONS["sdpa"] is before and not model.base_model._forward_pre_hooks
