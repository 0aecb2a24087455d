"""The config block and what is refused, alone and inside Axolotl's own validation."""

from __future__ import annotations

import json
import logging
from importlib.metadata import version
from pathlib import Path
from typing import Any

import pytest
from packaging.version import Version
from pydantic import ValidationError

from axolotl_bitnet.plugin.args import BitNetArgs, BitNetConfig
from axolotl_bitnet.plugin.refusals import fsdp_refusals, refusals
from axolotl_bitnet.plugin.refusals.ramp import ramp_refusals

LOW: dict[str, Any] = {
    "bitnet": {"latent_dtype": "bfloat16"},
    "optimizer": "adamw_torch_8bit",
    "optim_args": "bf16_stochastic_round=True",
    "adam_beta2": 0.95,
    "fsdp_version": 2,
}
REFUSED: list[tuple[dict[str, Any], str]] = [
    ({"adapter": "lora"}, "adapter: lora"),
    ({"adapter": "qlora"}, "adapter: qlora"),
    ({"adapter": "some-plugins-adapter"}, "adapter: some-plugins-adapter"),
    ({"load_in_4bit": True}, "load_in_4bit"),
    ({"load_in_8bit": True}, "load_in_8bit"),
    ({"qat": {"activation_dtype": "int8"}}, "qat"),
    ({"fp8": True}, "fp8"),
    ({"tensor_parallel_size": 2}, "tensor_parallel_size"),
    ({"flash_attn_fuse_mlp": True}, "flash_attn_fuse_mlp"),
    ({"deepspeed": {"zero_optimization": {"stage": 3}}}, "stage3_gather_16bit_weights_on_model_save"),
    ({"deepspeed": {"zero_optimization": {"zero_quantized_weights": True}}}, "zero_quantized_weights"),
    ({"rl": "ebft"}, "rl: ebft"),
    ({"bitnet": {"learning_rate_scope": "ternary"}, "optimizer": "muon"}, "optimizer: muon"),
    ({"bitnet": {"learning_rate_scope": "ternary"}, "optimizer": "q_galore_adamw8bit"}, "galore"),
    ({"bitnet": {"learning_rate_scope": "ternary"}, "loraplus_lr_ratio": 2.0}, "loraplus_lr_ratio"),
    ({"bitnet": {"learning_rate_scope": "ternary"}, "lr_scheduler": "one_cycle"}, "one_cycle"),
    (
        {"bitnet": {"learning_rate_scope": "ternary"}, "deepspeed": {"optimizer": {"type": "Adam"}}},
        "no groups",
    ),
    ({"bitnet": {"latent_dtype": "bfloat16"}, "deepspeed": {"zero_optimization": {"stage": 2}}}, "masters"),
    (LOW | {"bitnet": None}, "no effect on float32 latents"),
    (LOW | {"adam_beta2": 0.999}, "adam_beta2: 0.999"),
    (LOW | {"adam_beta2": None}, "adam_beta2: 0.999"),
    (LOW | {"fsdp_config": {"state_dict_type": "FULL_STATE_DICT"}}, "SHARDED_STATE_DICT"),
]
ALLOWED: list[dict[str, Any]] = [
    {},
    {"tensor_parallel_size": 1},
    {"load_in_4bit": False, "load_in_8bit": None, "adapter": None},
    {"rl": "dpo"},
    {"rl": "ipo"},
    {"rl": "orpo"},
    {"rl": "simpo"},
    {"deepspeed": {"zero_optimization": {"stage": 2}}},
    {"deepspeed": {"zero_optimization": {"stage": 3, "stage3_gather_16bit_weights_on_model_save": True}}},
    {"bitnet": {"learning_rate_scope": "ternary"}, "deepspeed": {"zero_optimization": {"stage": 2}}},
    {"bitnet": {"learning_rate_scope": "ternary"}, "optimizer": "adamw_torch", "lr_scheduler": "cosine"},
    {"optimizer": "muon", "lr_scheduler": "one_cycle"},
    LOW,
    LOW | {"optim_args": {"bf16_stochastic_round": True}},
    LOW | {"fsdp_config": {"state_dict_type": "SHARDED_STATE_DICT"}},
    LOW | {"fsdp_config": {"state_dict_type": "FULL_STATE_DICT"}, "save_strategy": "no"},
    {"optimizer": "adamw_torch_8bit", "optim_args": "bf16_stochastic_round=False"},
]


@pytest.mark.parametrize(("keys", "words"), REFUSED)
def test_refused_with_a_reason_only_in_a_ternary_run(keys: dict[str, Any], words: str) -> None:
    with pytest.raises(ValidationError, match=words) as caught:
        BitNetArgs(**({"use_onebitllms": True} | keys))
    assert "use_onebitllms" in str(caught.value) or "`bitnet." in str(caught.value)
    without_block = {key: value for key, value in keys.items() if key != "bitnet"}
    BitNetArgs(**without_block)


@pytest.mark.parametrize("keys", ALLOWED)
def test_allowed(keys: dict[str, Any]) -> None:
    assert refusals(keys) == []
    assert BitNetArgs(**({"use_onebitllms": True} | keys)).use_onebitllms is True


def test_every_reason_is_given_at_once() -> None:
    with pytest.raises(ValidationError, match=r"adapter.*load_in_4bit"):
        BitNetArgs(use_onebitllms=True, adapter="qlora", load_in_4bit=True)  # type: ignore[call-arg]


@pytest.mark.parametrize("flag", [{}, {"use_onebitllms": False}, {"use_onebitllms": None}])
def test_a_block_without_the_flag_would_train_dense(flag: dict[str, Any]) -> None:
    with pytest.raises(ValidationError, match="would train a dense model"):
        BitNetArgs(**flag, bitnet={})
    BitNetArgs(**flag)


@pytest.mark.parametrize(
    "block",
    [
        {"learning_rate_multipler": 2},  # a misspelt key must not be dropped silently
        {"learning_rate_multiplier": 0},
        {"learning_rate_multiplier": float("inf")},
        {"learning_rate_scope": "everything"},
        {"latent_dtype": "float16"},
        {"export": ["onnx"]},
        {"skip_modules": "lm_head"},
        {"ramp_steps": -1},
        {"ramp_steps": 0.5},
        {"backward": "int4"},
    ],
)
def test_wrong_values_are_refused(block: dict[str, Any]) -> None:
    with pytest.raises(ValidationError):
        BitNetArgs(use_onebitllms=True, bitnet=block)
    with pytest.raises(ValidationError):
        BitNetConfig(**block)


def test_defaults() -> None:
    block = BitNetConfig()
    assert block.model_dump() == {
        "learning_rate_multiplier": 1.0,
        "learning_rate_scope": "all",
        "latent_dtype": "float32",
        "skip_modules": [],
        "fuse": True,
        "backward": "bf16",
        "gather": "auto",
        "ramp_steps": 0,
        "teacher": None,
        "teacher_temperature": 1.0,
        "teacher_weight": 1.0,
        "start": "base",
        "monitor": True,
        "export": ["packed"],
        "verify": True,
    }


@pytest.mark.parametrize("old, new", [(True, "int8_dx"), (False, "bf16")])
def test_int8_grad_is_the_former_name_of_backward(
    old: bool, new: str, caplog: pytest.LogCaptureFixture
) -> None:
    with caplog.at_level(logging.WARNING, "axolotl.bitnet"):
        block = BitNetArgs(use_onebitllms=True, bitnet={"int8_grad": old, "fuse": False}).bitnet
    assert block is not None and block.backward == new and not block.fuse
    assert "int8_grad" not in block.model_dump()
    assert f"bitnet.backward: {new}" in caplog.text
    with pytest.raises(ValidationError, match="remove `int8_grad`"):
        BitNetConfig(**{"int8_grad": old, "backward": new})
    with pytest.raises(ValidationError, match="int8_grad` is true or false, not 'yes'"):
        BitNetConfig(**{"int8_grad": "yes"})


@pytest.mark.parametrize("block", [{"latent_dtype": "bfloat16"}, {"learning_rate_scope": "ternary"}])
@pytest.mark.parametrize("key", ["fsdp", "fsdp_config"])
def test_fsdp1_cannot_honour(block: dict[str, Any], key: str) -> None:
    config = {key: {"reshard_after_forward": True}, "bitnet": block}
    for version_key in ({}, {"fsdp_version": 1}, {"fsdp_version": "1"}):
        (reason,) = fsdp_refusals(config | version_key)
        assert next(iter(block)) in reason
        (reason,) = fsdp_refusals(config | version_key | {"bitnet": BitNetConfig(**block)})
        assert next(iter(block)) in reason
    assert fsdp_refusals(config | {"fsdp_version": 2}) == []
    assert fsdp_refusals({key: config[key]}) == []
    assert fsdp_refusals({"bitnet": block}) == []


def test_codes_are_gathered_by_fsdp2_alone() -> None:
    ternary, sharded = {"bitnet": {"gather": "ternary"}}, {"fsdp_config": {"reshard_after_forward": True}}
    for config in (ternary, ternary | sharded | {"fsdp_version": 1}):
        (reason,) = fsdp_refusals(config)
        assert "gather: ternary" in reason and "fsdp_version: 2" in reason
    assert fsdp_refusals(ternary | sharded | {"fsdp_version": 2}) == []
    assert (
        fsdp_refusals({"bitnet": {"gather": "auto"}}) == fsdp_refusals({"bitnet": {"gather": "native"}}) == []
    )


def test_deepspeed_stage_is_read_from_a_file(tmp_path: Path) -> None:
    path = tmp_path / "zero3.json"
    path.write_text(json.dumps({"zero_optimization": {"stage": 3}}))
    assert "ZeRO-3" in refusals({"deepspeed": str(path)})[0]
    path.write_text(
        json.dumps({"zero_optimization": {"stage": 3, "stage3_gather_16bit_weights_on_model_save": True}})
    )
    assert refusals({"deepspeed": str(path)}) == []
    path.write_text(json.dumps({"zero_optimization": {"stage": 1}}))
    assert refusals({"deepspeed": str(path)}) == []
    path.write_text("{")
    assert refusals({"deepspeed": str(path)}) == []


# Inside Axolotl

FSDP1: dict[str, Any] = {"fsdp_version": 1, "fsdp_config": {"reshard_after_forward": True}}


def _validate(keys: dict[str, Any]) -> Any:
    from axolotl.cli.config import prepare_plugins
    from axolotl.utils.config import validate_config
    from axolotl.utils.dict import DictDefault

    settings = {
        "base_model": "tiiuae/Falcon-E-1B-Base-prequantized",
        "plugins": ["axolotl_bitnet.BitNetPlugin"],
        "use_onebitllms": True,
        "datasets": [{"path": "data.jsonl", "type": "alpaca"}],
        "micro_batch_size": 1,
        "gradient_accumulation_steps": 1,
        "learning_rate": 1e-5,
    }
    cfg = DictDefault({key: value for key, value in (settings | keys).items() if value is not None})
    prepare_plugins(cfg)
    gpu = {"bf16": True, "fp8": True, "tf32": True, "n_gpu": 2, "compute_capability": "sm_90"}
    return validate_config(cfg, capabilities=gpu, env_capabilities={"torch_version": "2.11.0"})


def test_axolotl_takes_the_block() -> None:
    cfg = _validate({"bitnet": {"learning_rate_multiplier": 10, "skip_modules": ["down_proj"]}})
    assert cfg.use_onebitllms is True
    assert cfg.bitnet.learning_rate_multiplier == 10 and cfg.bitnet.skip_modules == ["down_proj"]


@pytest.mark.parametrize(
    ("keys", "words"),
    [
        ({"adapter": "lora"}, "LoRA|adapter"),
        ({"load_in_8bit": True}, "load_in_8bit"),
        ({"bitnet": {"unknown": 1}}, "unknown"),
        ({"use_onebitllms": None, "bitnet": {}}, "would train a dense model"),
        ({"tensor_parallel_size": 2}, "tensor_parallel_size"),
        (FSDP1 | {"bitnet": {"latent_dtype": "bfloat16"}}, "latent_dtype: bfloat16.*FSDP1|has been removed"),
        (FSDP1 | {"bitnet": {"learning_rate_scope": "ternary"}}, "scope: ternary.*FSDP1|has been removed"),
        ({"rl": "ebft", "datasets": [{"path": "d.jsonl", "type": "chatml.argilla"}]}, "rl: ebft"),
    ],
)
def test_axolotl_refuses_before_loading(keys: dict[str, Any], words: str) -> None:
    with pytest.raises(ValueError, match=words):
        _validate(keys)


@pytest.mark.parametrize("ternary", [True, None])
def test_falcon_e_shards_and_dense_falcons_are_left_to_axolotl(ternary: bool | None) -> None:
    keys = {"use_onebitllms": ternary, "fsdp_version": 2, "fsdp_config": {"reshard_after_forward": True}}
    if ternary or Version(version("axolotl")) < Version("0.21"):
        assert _validate(keys).fsdp_config
    else:
        with pytest.raises(ValueError, match="FSDP is not supported for falcon"):
            _validate(keys)


@pytest.mark.parametrize("block", [{}, {"latent_dtype": "bfloat16"}, {"learning_rate_scope": "ternary"}])
def test_fsdp2_is_taken(block: dict[str, Any]) -> None:
    cfg = _validate(FSDP1 | {"fsdp_version": 2, "bitnet": block})
    assert str(cfg.fsdp_version) == "2"


@pytest.mark.skipif(Version(version("axolotl")) >= Version("0.20"), reason="Axolotl has no FSDP1 any more")
def test_fsdp1_is_taken() -> None:
    cfg = _validate(FSDP1 | {"bitnet": {"learning_rate_multiplier": 10}})
    assert str(cfg.fsdp_version) != "2" and cfg.fsdp_config


@pytest.mark.parametrize(
    "keys, word",
    [
        ({"max_steps": 100}, "a run of 100 steps"),
        ({"max_steps": 101}, None),
        ({"num_epochs": 1}, None),
        ({"rl": "dpo"}, "reference"),
        ({"rl": "ipo"}, "reference"),
        ({"rl": "kto"}, "reference"),
        ({"rl": "grpo", "trl": {"beta": 0.1}}, "reference"),
        ({"rl": "grpo", "rl_beta": 0.1}, "reference"),
        ({"rl": "grpo", "trl": {"beta": 0.0}, "rl_beta": 0.1}, None),
        ({"rl": "grpo", "trl": {"use_vllm": True}}, "vLLM"),
        ({"rl": "orpo"}, None),
        ({"rl": "simpo"}, None),
    ],
)
def test_ramps_that_cannot_work(keys: dict[str, Any], word: str | None) -> None:
    found = ramp_refusals({"use_onebitllms": True, "bitnet": {"ramp_steps": 100}, **keys})
    assert word in found[0] if word else not found
    for block in ({}, {"ramp_steps": 0}, {"ramp_steps": "many"}, None):
        assert not ramp_refusals({"bitnet": block, **keys})
