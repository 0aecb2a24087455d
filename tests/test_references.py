"""Reference models and reward models that must be ternary, without Axolotl's runs around them."""

from __future__ import annotations

from collections.abc import Callable
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from torch import nn

pytest.importorskip("trl")

from axolotl_bitnet.layers.bitlinear import BitLinear
from axolotl_bitnet.model.convert import convert_to_bitlinear
from axolotl_bitnet.model.entry import CONFIG_KEY
from axolotl_bitnet.plugin.upstream.trl_reference import is_ternary, refuse_dense_judges, settle_reference
from axolotl_bitnet.plugin.upstream.trl_reference_cache import key_precomputed_references

MakeModel = Callable[..., nn.Module]


class _Accelerator:
    def prepare_model(self, model: nn.Module, evaluation_mode: bool = False) -> nn.Module:
        assert evaluation_mode  # else DDP would wrap a model that has no gradients
        return model


def _trainer(reference: nn.Module | None, callbacks: tuple[Any, ...] = (), **flags: bool) -> Any:
    handler = SimpleNamespace(callbacks=list(callbacks))
    return SimpleNamespace(ref_model=reference, accelerator=_Accelerator(), callback_handler=handler, **flags)


def _ternary(tiny_model: MakeModel, **overrides: Any) -> nn.Module:
    model = tiny_model("Llama", **overrides)
    convert_to_bitlinear(model)
    return model


def test_a_dense_reference_is_replaced_everywhere(tiny_model: MakeModel) -> None:
    dense, loaded = tiny_model("Llama"), _ternary(tiny_model).to(torch.bfloat16).train()
    sync, other = SimpleNamespace(ref_model=dense), SimpleNamespace()
    trainer = _trainer(dense, (other, sync))
    assert settle_reference(trainer, loaded) is loaded
    assert trainer.ref_model is loaded and sync.ref_model is loaded and not vars(other)
    assert not loaded.training
    assert {p.dtype for p in loaded.parameters()} == {torch.float32}  # it will be mixed with the policy


@pytest.mark.slow
def test_a_reference_that_stays_as_it_is_keeps_its_dtype(tiny_model: MakeModel) -> None:
    loaded = _ternary(tiny_model).to(torch.bfloat16)
    settle_reference(_trainer(tiny_model("Llama")), loaded)
    assert {p.dtype for p in loaded.parameters()} == {torch.bfloat16}


def test_ternary_references_and_none_at_all_are_left_alone(tiny_model: MakeModel) -> None:
    ternary = _ternary(tiny_model)
    trainer = _trainer(ternary)
    assert settle_reference(trainer, _ternary(tiny_model)) is ternary and trainer.ref_model is ternary
    assert settle_reference(_trainer(None), ternary) is None
    assert settle_reference(SimpleNamespace(), ternary) is None


@pytest.mark.parametrize(
    ("flags", "loads", "reason"),
    [
        ({"is_fsdp_enabled": True}, "ternary", "under FSDP it is sharded already"),
        ({"is_deepspeed_enabled": True}, "ternary", "under DeepSpeed"),
        ({}, "nothing", "loaded no ternary reference"),
        ({}, "dense", "loaded no ternary reference"),
    ],
)
def test_what_cannot_be_replaced_is_refused(
    flags: dict[str, bool], loads: str, reason: str, tiny_model: MakeModel
) -> None:
    loaded = {"ternary": _ternary(tiny_model), "nothing": None, "dense": tiny_model("Llama")}[loads]
    dense = tiny_model("Llama")
    trainer = _trainer(dense, **flags)
    with pytest.raises(RuntimeError, match=reason):
        settle_reference(trainer, loaded)
    assert trainer.ref_model is dense


def test_ternary_models_have_another_hash_and_dense_ones_keep_theirs(
    tiny_model: MakeModel, monkeypatch: pytest.MonkeyPatch
) -> None:
    from trl.trainer import dpo_trainer, utils

    monkeypatch.setattr(dpo_trainer, "hash_module", utils.hash_module)
    dense, whole, part = (tiny_model("Llama") for _ in range(3))
    for model in (whole, part):
        model.load_state_dict(dense.state_dict())
    convert_to_bitlinear(whole)
    convert_to_bitlinear(part, skip_modules=["down_proj"])
    before = dpo_trainer.hash_module(dense)
    assert dpo_trainer.hash_module(whole) == before  # what would let one take the other's cache

    key_precomputed_references()
    key_precomputed_references()  # as the next run in this process does
    assert dpo_trainer.hash_module(dense) == before
    assert len({before, dpo_trainer.hash_module(whole), dpo_trainer.hash_module(part)}) == 3
    again = dpo_trainer.hash_module(whole)
    next(m for m in whole.modules() if isinstance(m, BitLinear)).weight.data.mul_(2)
    assert dpo_trainer.hash_module(whole) != again


def test_a_trl_that_keys_otherwise_is_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    from trl.trainer import dpo_trainer

    monkeypatch.delattr(dpo_trainer, "hash_module")
    with pytest.raises(RuntimeError, match=r"precompute_ref_log_probs.*no hash_module"):
        key_precomputed_references()


def test_a_ternary_reward_model_must_be_packed_to_judge(tiny_model: MakeModel) -> None:
    latents = tiny_model("Llama", "SequenceClassification", num_labels=1)
    dense_config = dict(vars(latents.config))
    judges = SimpleNamespace(reward_funcs=[lambda prompts, completions: [0.0], latents])
    refuse_dense_judges(judges)  # never ternary
    convert_to_bitlinear(latents)
    assert vars(latents.config).keys() - dense_config.keys() == {CONFIG_KEY}
    with pytest.raises(ValueError, match=r"reward_funcs.*packed/"):
        refuse_dense_judges(judges)
    latents.config.quantization_config = {"quant_method": "bitnet"}
    refuse_dense_judges(judges)
    refuse_dense_judges(SimpleNamespace())


def test_is_ternary(tiny_model: MakeModel) -> None:
    assert not is_ternary(tiny_model("Llama")) and is_ternary(_ternary(tiny_model))
