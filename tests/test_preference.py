"""Preference methods in real Axolotl runs on the CPU: a ternary policy against a ternary reference."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch

pytest.importorskip("axolotl.cli")  # sets up logging, and would take away a handler that was there before

from transformers import AutoModelForCausalLM
from trl import DPOTrainer, GRPOTrainer

from axolotl_bitnet.layers.bitlinear import BitLinear
from axolotl_bitnet.model.convert import convert_to_bitlinear
from axolotl_bitnet.plugin.refusals.preference import preference_refusals
from support.methods import ROWS, STEPS, flipped, grpo_block, save_base, settings_of
from support.runs import prepare, train


@pytest.fixture(scope="module")
def base(tmp_path_factory: pytest.TempPathFactory, tiny_model: Callable[..., torch.nn.Module]) -> Path:
    torch.manual_seed(11)
    return save_base(tiny_model, tmp_path_factory.mktemp("base"))


def _ternary_base(base: Path) -> torch.nn.Module:
    model = AutoModelForCausalLM.from_pretrained(base, dtype=torch.float32)
    convert_to_bitlinear(model)
    return model


ZERO_AT_FIRST = {
    "dpo": ["rewards/chosen", "rewards/rejected", "rewards/margins"],
    "ipo": ["rewards/chosen", "rewards/rejected", "rewards/margins"],
    "kto": ["kl", "rewards/chosen", "rewards/rejected", "rewards/margins"],
    "grpo": ["kl"],
}


@pytest.mark.slow
@pytest.mark.parametrize("method", ["dpo", "ipo", "orpo", "simpo", "kto", "grpo"])
def test_a_method_starts_where_it_should_moves_and_ships_what_it_trained(
    method: str, base: Path, tmp_path: Path
) -> None:
    run = train(settings_of(method, tmp_path, base, bitnet={"learning_rate_multiplier": 2}))
    start = _ternary_base(base)
    assert run.trainer.args.learning_rate == pytest.approx(6e-3)  # two models were loaded, one multiplication
    assert len(run.losses) == STEPS and len(set(run.losses)) > STEPS // 2
    assert flipped(run.model, start) > 100

    for key in ZERO_AT_FIRST.get(method, []):
        assert run.logged(key)[0] == 0 and any(run.logged(key)), key
    reference = getattr(run.trainer, "ref_model", None)
    assert (reference is not None) == (method in ZERO_AT_FIRST)
    if reference is not None:
        assert reference is not run.trainer.model and not reference.training
        assert flipped(reference, start) == 0  # and it is ternary

    record = json.loads((tmp_path / "out" / "bitnet.json").read_text())
    assert record["artifacts"]["packed"]["verified"] is True


@pytest.mark.slow
@pytest.mark.parametrize(("method", "precompute"), [("kto", None), ("dpo", True)])
def test_loaded_in_bfloat16_a_method_starts_at_zero_all_the_same(
    method: str, precompute: bool | None, base: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Norms and embeddings of the policy are float32 then: the reference must have them too."""
    monkeypatch.setattr("transformers.training_args.is_torch_bf16_gpu_available", lambda: True)
    run = train(
        settings_of(method, tmp_path, base, max_steps=2, bf16=True, precompute_ref_log_probs=precompute)
    )
    assert run.cfg.torch_dtype == torch.bfloat16
    assert {parameter.dtype for parameter in run.model.parameters()} == {torch.float32}
    layers = [module for module in run.trainer.ref_model.modules() if isinstance(module, BitLinear)]
    assert {layer.weight.dtype for layer in layers} == {torch.bfloat16}  # as small as they were
    assert [run.logged(key)[0] for key in ZERO_AT_FIRST[method]] == [0] * len(ZERO_AT_FIRST[method])


@pytest.mark.slow
def test_a_synchronized_reference_is_the_policy_again(base: Path, tmp_path: Path) -> None:
    block = grpo_block(sync_ref_model=True, ref_model_mixup_alpha=1.0, ref_model_sync_steps=STEPS // 2)
    run = train(settings_of("gdpo", tmp_path, base, trl=block))
    kl = run.logged("kl")
    assert len(kl) == STEPS and [i for i, value in enumerate(kl) if value == 0] == [0, STEPS // 2]
    assert flipped(run.trainer.ref_model, run.model) == 0  # the last step synchronized them too
    assert flipped(run.trainer.ref_model, _ternary_base(base)) > 0


@pytest.mark.slow
def test_rollouts_come_from_the_ternary_policy(
    base: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """TRL's own generation, greedy: by the policy, a ternary model of the same base, and the dense base."""
    original = GRPOTrainer._generate_single_turn
    found: list[list[list[int]]] = []

    def greedy(self: Any, *args: Any) -> Any:
        if not found:
            policy, config = (self.model, self.model_wrapped), self.generation_config
            config.do_sample = self.generation_kwargs["do_sample"] = False
            dense = AutoModelForCausalLM.from_pretrained(base, dtype=torch.float32)
            for models in (policy, (_ternary_base(base),) * 2, (dense,) * 2):
                self.model, self.model_wrapped = models
                found.append(original(self, *args)[0])
            self.model, self.model_wrapped = policy
            config.do_sample = self.generation_kwargs["do_sample"] = True
        return original(self, *args)

    monkeypatch.setattr(GRPOTrainer, "_generate_single_turn", greedy)
    train(settings_of("grpo", tmp_path, base, max_steps=1))
    policy, ternary, dense = found
    assert policy == ternary and all(len(ids) == 5 for ids in policy)
    assert policy != dense


@pytest.mark.slow
def test_precomputed_log_probabilities_of_a_dense_run_are_not_taken(
    base: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Three runs on one prepared dataset, beside which TRL keeps its cache: dense, ternary, ternary again."""
    computed = 0
    original = DPOTrainer.compute_ref_log_probs

    def counting(self: Any, *args: Any) -> Any:
        nonlocal computed
        computed += 1
        return original(self, *args)

    monkeypatch.setattr(DPOTrainer, "compute_ref_log_probs", counting)
    keys: dict[str, Any] = {"max_steps": 1, "precompute_ref_log_probs": True}
    prepare(settings_of("dpo", tmp_path, base, **keys))
    found = []
    for ternary in (None, True, True):
        computed = 0
        run = train(settings_of("dpo", tmp_path, base, use_onebitllms=ternary, **keys))
        assert run.logged("rewards/chosen")[0] == run.logged("rewards/rejected")[0] == 0
        found.append(computed)
    assert found == [ROWS // 4, ROWS // 4, 0]


REFUSED: list[tuple[dict[str, Any], str]] = [
    ({"rl": "ebft"}, "rl: ebft.*not been checked"),
    ({"rl": "kto", "fsdp_config": {"reshard_after_forward": True}}, "shards it before"),
    ({"rl": "kto", "deepspeed": {"zero_optimization": {"stage": 2}}}, "kto` with `deepspeed`"),
    ({"rl": "grpo", "trl": {"beta": 0.1}, "fsdp_config": {"x": 1}}, "trl.beta: 0"),
    ({"rl": "gdpo", "rl_beta": 0.1, "fsdp_config": {"x": 1}}, "trl.beta: 0"),
    ({"rl": "grpo", "trl": {"async_prefetch": True}}, "async_prefetch.*before the first step"),
    ({"rl": "grpo", "trl": {"use_data_producer": True}}, "use_data_producer"),
    ({"rl": "grpo", "trl": {"use_vllm": True}, "context_parallel_size": 2}, "context_parallel_size"),
    (
        {"rl": "grpo", "trl": {"use_vllm": True, "vllm_importance_sampling_correction": False}},
        "need the correction",
    ),
]
ALLOWED: list[dict[str, Any]] = [
    *({"rl": method} for method in ("dpo", "ipo", "orpo", "simpo", "kto", "grpo", "gdpo")),
    {"rl": "dpo", "fsdp_config": {"x": 1}},
    {"rl": "grpo", "fsdp_config": {"x": 1}, "rl_beta": 0.1, "trl": {"beta": 0.0}},
    {"rl": "grpo", "trl": {"use_vllm": True, "vllm_importance_sampling_correction": True}},
    {"rl": "grpo", "context_parallel_size": 2, "trl": {"vllm_importance_sampling_correction": False}},
]


@pytest.mark.parametrize(("keys", "words"), REFUSED)
def test_refused_with_a_reason(keys: dict[str, Any], words: str) -> None:
    (reason,) = preference_refusals(keys)
    assert "use_onebitllms" in reason
    with pytest.raises(ValueError, match=words):
        raise ValueError(reason)


@pytest.mark.parametrize("keys", ALLOWED)
def test_allowed(keys: dict[str, Any]) -> None:
    assert preference_refusals(keys) == []
