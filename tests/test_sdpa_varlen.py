"""Axolotl's attention for packed rows asks once a batch what is packed, and gets the right answer."""

from __future__ import annotations

import importlib

import pytest
import torch

from axolotl_bitnet.plugin.upstream.sdpa_varlen import SYMBOLS, ask_ahead, ask_once_a_batch

PACKED = torch.tensor([[0, 1, 2, 0, 1, 0, 1, 2]])
WHOLE = torch.arange(8)[None]


@pytest.fixture
def originals(monkeypatch: pytest.MonkeyPatch) -> dict[str, object]:
    """The functions as they are upstream, and back there afterwards."""
    found = {}
    for module_name, name in SYMBOLS:
        module = importlib.import_module(module_name)
        function = getattr(module, name)
        found[name] = getattr(function, "__wrapped__", function)
        monkeypatch.setattr(module, name, found[name])
    return found


def test_the_answers_are_upstreams_for_each_batch(originals) -> None:
    from transformers import modeling_flash_attention_utils as flash

    assert ask_once_a_batch() == []
    packed = importlib.import_module(SYMBOLS[0][0])
    for position_ids in (PACKED.clone(), WHOLE.clone(), PACKED.clone()):
        for _ in range(3):
            assert packed._is_packed(position_ids) is originals["_is_packed"](position_ids)
            (q, k), longest = flash.prepare_fa_kwargs_from_position_ids(position_ids)
            (q2, k2), expected = originals["prepare_fa_kwargs_from_position_ids"](position_ids)
            assert torch.equal(q, q2) and torch.equal(k, k2)
            assert longest == tuple(map(int, expected)) and all(type(one) is int for one in longest)


def test_upstream_is_asked_once_a_tensor_and_again_after_a_write(monkeypatch, originals) -> None:
    module = importlib.import_module(SYMBOLS[0][0])
    asked = []
    monkeypatch.setattr(module, "_is_packed", lambda ids: asked.append(ids) or len(asked))
    ask_once_a_batch()
    ids = PACKED.clone()
    assert [module._is_packed(ids) for _ in range(3)] == [1, 1, 1]
    ids[0, 0] = 5
    assert [module._is_packed(ids) for _ in range(2)] == [2, 2]
    assert module._is_packed(ids.clone()) == 3  # equal, but another
    assert module._is_packed(ids) == 2  # kept, though another came between
    with torch.inference_mode():
        fixed = PACKED.clone()
        assert [module._is_packed(fixed) for _ in range(2)] == [4, 5]


def test_changed_once_only(originals) -> None:
    ask_once_a_batch()
    before = [getattr(importlib.import_module(module), name) for module, name in SYMBOLS]
    ask_once_a_batch()
    assert [getattr(importlib.import_module(module), name) for module, name in SYMBOLS] == before


@pytest.mark.parametrize("module_name, name", SYMBOLS)
def test_a_name_that_is_gone_is_named_and_nothing_else_happens(
    module_name, name, monkeypatch, originals
) -> None:
    monkeypatch.delattr(importlib.import_module(module_name), name)
    assert ask_once_a_batch() == [f"{module_name}.{name}"]


class Fetches:
    """A Trainer as far as batches go."""

    def __init__(self, batches: list[object]) -> None:
        self.batches = batches

    def get_batch_samples(self, iterator: object, count: int, device: object = None) -> tuple[object, int]:
        return self.batches[:count], 7


def test_a_steps_batches_are_asked_about_when_they_are_fetched(monkeypatch, originals) -> None:
    asked: list[tuple[str, object]] = []
    for module_name, name in SYMBOLS:
        module, function = importlib.import_module(module_name), originals[name]

        def ask(ids, name=name, function=function):
            asked.append((name, ids))
            return function(ids)

        monkeypatch.setattr(module, name, ask)
    ask_once_a_batch()
    ids = [PACKED.clone(), WHOLE.clone(), PACKED.clone()]
    trainer = Fetches([*({"position_ids": one} for one in ids), {"input_ids": WHOLE}, "no batch"])
    ask_ahead(trainer)
    batches, items = trainer.get_batch_samples(None, 5)
    assert batches == trainer.batches and items == 7
    assert [name for name, _ in asked] == [SYMBOLS[k][1] for k in (0, 1, 0, 0, 1)]
    is_packed, lengths_of = (getattr(importlib.import_module(module), name) for module, name in SYMBOLS)
    assert [is_packed(one) for one in ids] == [True, False, True]
    assert lengths_of(ids[0])[1] == (3, 3) and len(asked) == 5  # no layer has anything to ask


@pytest.mark.parametrize("module_name, name", SYMBOLS)
def test_nothing_is_asked_ahead_without_its_names(module_name, name, monkeypatch, originals) -> None:
    trainer = Fetches([])
    before = trainer.get_batch_samples
    monkeypatch.delattr(importlib.import_module(module_name), name)
    ask_ahead(trainer)
    assert trainer.get_batch_samples == before
    ask_ahead(object())
