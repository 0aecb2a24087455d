"""A model's matrices from its config.json, compared with the model that transformers builds."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from transformers import AutoConfig, AutoModelForCausalLM

from axolotl_bitnet.model.layer_plan import ConversionError, plan_conversion
from axolotl_bitnet.model.outline import UnknownShape, outline_of

SIZES: dict[str, Any] = {
    "hidden_size": 48,
    "intermediate_size": 84,
    "num_hidden_layers": 2,
    "num_attention_heads": 6,
    "num_key_value_heads": 2,
    "vocab_size": 100,
}
CASES: list[dict[str, Any]] = [
    {"model_type": "llama"},
    {"model_type": "llama", "attention_bias": True, "mlp_bias": True, "head_dim": 16},
    {"model_type": "llama", "tie_word_embeddings": True},
    {"model_type": "mistral", "head_dim": 8},
    {"model_type": "qwen2"},
    {"model_type": "qwen3", "head_dim": 16, "attention_bias": True},
]
SKIPPED = [[], ["down_proj"], ["model.layers.1"], ["*.layers.0.*", "lm_head"]]


@pytest.mark.parametrize("skip", SKIPPED, ids=str)
@pytest.mark.parametrize("keys", CASES, ids=str)
def test_it_is_the_live_models(keys: dict[str, Any], skip: list[str]) -> None:
    config = AutoConfig.for_model(**SIZES, **keys)
    with torch.device("meta"):
        model = AutoModelForCausalLM.from_config(config)
    expected = plan_conversion(model, skip)
    found, problems = outline_of(config.to_dict(), skip)
    assert problems == []
    assert [matrix.name for matrix in found.ternary] == expected.converted
    assert set(found.dense) == set(expected.dense)
    for matrix in found.ternary:
        assert tuple(model.get_parameter(f"{matrix.name}.weight").shape) == (matrix.rows, matrix.columns)
    assert found.parameters == sum(parameter.numel() for parameter in model.parameters())


def test_what_conversion_refuses_is_told() -> None:
    config = AutoConfig.for_model("llama", **(SIZES | {"intermediate_size": 81}))
    with torch.device("meta"):
        model = AutoModelForCausalLM.from_config(config)
    for skip in ([], ["gate_proj", "nothing"]):
        with pytest.raises(ConversionError) as raised:
            plan_conversion(model, skip)
        problems = outline_of(config.to_dict(), skip)[1]
        assert problems and all(problem.split(":")[0] in str(raised.value) for problem in problems[:4])


def test_what_is_not_known_is_said() -> None:
    with pytest.raises(UnknownShape, match="gpt2"):
        outline_of({"model_type": "gpt2"})
    with pytest.raises(UnknownShape, match="hidden_size is None"):
        outline_of({"model_type": "llama"})
