"""Parallelism over several GPUs: tensor parallelism, FSDP, DeepSpeed."""

from __future__ import annotations

import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from .teacher import teacher_fsdp_refusals


def sharding_refusals(cfg: Mapping[str, Any]) -> list[str]:
    """Why the parallelism of this ternary config cannot work: sentences, empty when it can."""
    found = []
    tensor_parallel = cfg.get("tensor_parallel_size")
    if isinstance(tensor_parallel, int) and tensor_parallel > 1:
        found.append(
            "`tensor_parallel_size` above 1 with `use_onebitllms`: a rank would take the scales of its part "
            "of a matrix, or of a token, for those of the whole. Use FSDP2 (`dp_shard_size`) instead"
        )
    return found + _deepspeed_refusals(cfg)


def fsdp_refusals(cfg: Mapping[str, Any]) -> list[str]:
    """The same for FSDP, of a config that has its ``fsdp_version`` (missing, it is 1 in Axolotl 0.19, 2 in
    0.21)."""
    options = _mapping(cfg.get("bitnet"))
    sharded = bool(cfg.get("fsdp_config") or cfg.get("fsdp"))
    if sharded and str(cfg.get("fsdp_version")) == "2":
        return []
    found = []
    if options.get("gather") == "ternary":
        found.append(
            "`bitnet.gather: ternary` is FSDP2's all-gather in 2 bits, and this run is not under FSDP2: "
            "remove it, or set `fsdp_version: 2` and `fsdp_config`"
        )
    if not sharded:
        return found
    found += teacher_fsdp_refusals(options)
    if options.get("latent_dtype") == "bfloat16":
        found.append(
            "`bitnet.latent_dtype: bfloat16` under FSDP1, where accelerate makes every trainable weight "
            "float32. Remove it, or set `fsdp_version: 2`"
        )
    if options.get("learning_rate_scope") == "ternary":
        found.append(
            "`bitnet.learning_rate_scope: ternary` under FSDP1, which renames the weights or flattens them "
            "into one: their group would be empty. Use scope `all`, or set `fsdp_version: 2`"
        )
    return found


def launch_refusal(cfg: Mapping[str, Any], environment: Mapping[str, str]) -> str | None:
    """Why a training that is about to begin cannot shard: FSDP in a process that no launcher started."""
    if not (cfg.get("fsdp_config") or cfg.get("fsdp")) or "LOCAL_RANK" in environment:
        return None
    return (
        "`fsdp_config` shards over processes, and this is one process without a launcher. On one GPU or a "
        "CPU remove `fsdp_version`, `fsdp_config` and `accelerator_config`, and set "
        "`gradient_checkpointing: true`; or keep them and add `--launcher torchrun`"
    )


def _deepspeed_refusals(cfg: Mapping[str, Any]) -> list[str]:
    deepspeed = _read(cfg.get("deepspeed"))
    if deepspeed is None:
        return []
    options = _mapping(cfg.get("bitnet"))
    zero = _mapping(deepspeed.get("zero_optimization"))
    found = []
    if str(zero.get("stage")) == "3" and not zero.get("stage3_gather_16bit_weights_on_model_save"):
        found.append(
            "DeepSpeed ZeRO-3 with `use_onebitllms`, but not `stage3_gather_16bit_weights_on_model_save: "
            "true` in the DeepSpeed config's `zero_optimization`: the run would end without weights to pack. "
            "Add it"
        )
    if zero.get("zero_quantized_weights"):
        found.append(
            "`zero_quantized_weights: true` in the DeepSpeed config with `use_onebitllms`: weights would be "
            "gathered rounded to int8, and other codes would train than those saved. Remove it"
        )
    if options.get("latent_dtype") == "bfloat16":
        found.append(
            "`bitnet.latent_dtype: bfloat16` under DeepSpeed, which keeps float32 masters of its own. Remove "
            "it"
        )
    if options.get("learning_rate_scope") == "ternary" and deepspeed.get("optimizer"):
        found.append(
            "`bitnet.learning_rate_scope: ternary` with an `optimizer` in the DeepSpeed config, which gets "
            "no groups. Remove it there and set Axolotl's `optimizer`"
        )
    return found


def _read(deepspeed: Any) -> Mapping[str, Any] | None:
    """A DeepSpeed config given as a dict or a path; None where there is none to read."""
    if isinstance(deepspeed, str):
        path = Path(deepspeed)
        if not path.is_file():
            return None
        try:
            deepspeed = json.loads(path.read_text(encoding="utf-8"))
        except ValueError:
            return None  # Axolotl reports it better
    return deepspeed if isinstance(deepspeed, Mapping) else None


def _mapping(value: Any) -> Mapping[str, Any]:
    """A block of the config, before validation (a dict) or after it (a model)."""
    if isinstance(value, Mapping):
        return value
    return {} if value is None else vars(value)
