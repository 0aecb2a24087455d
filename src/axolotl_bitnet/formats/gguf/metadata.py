"""Hyper-parameters as llama.cpp's metadata: written from a config.json, and read back into one."""

from __future__ import annotations

import math
from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor

from ...storage.atomic import CheckpointError
from ..config_json import rope_of, rope_type
from . import architecture as llama
from .architecture import Architecture, shape_of
from .header import Header


def rebuild_config(header: Header) -> dict[str, Any]:
    """A config.json from a file's metadata, as far as llama.cpp keeps it.

    Raises:
        CheckpointError: the architecture is unknown, a size is missing, or RoPE is scaled as in Llama 3,
            whose parameters llama.cpp does not keep.
    """
    metadata, tensors = header.metadata, header.tensors
    name = metadata.get("general.architecture")
    found = next((known for known in llama.ARCHITECTURES if known.ggml == name), None)
    if found is None:
        read = ", ".join(known.ggml for known in llama.ARCHITECTURES)
        raise CheckpointError(f"{header.path}: architecture '{name}' is not read; {read} are")

    def need(key: str, default: float | None = None) -> int | float:
        value = metadata.get(f"{name}.{key}", default)
        if not isinstance(value, int | float):  # some architectures keep one a layer
            raise CheckpointError(f"{header.path}: its metadata has no single {name}.{key}")
        return value

    if llama.ROPE_FREQS in tensors:
        raise CheckpointError(
            f"{header.path}: its RoPE is scaled by a table of factors, from which no config can be rebuilt"
        )
    if "token_embd.weight" not in tensors:
        raise CheckpointError(f"{header.path} has no token_embd.weight")
    heads, hidden = int(need("attention.head_count")), int(need("embedding_length"))
    rope: dict[str, Any] = {
        "rope_type": "default",
        "rope_theta": float(need("rope.freq_base", 10000.0)),
    }
    scaling = metadata.get(f"{name}.rope.scaling.type", "none")
    if scaling not in ("none", "linear", "yarn"):
        raise CheckpointError(f"{header.path}: RoPE scaling '{scaling}' is not read")
    if scaling != "none":
        rope |= {"rope_type": scaling, "factor": float(need("rope.scaling.factor"))}
    if scaling == "yarn":
        rope["original_max_position_embeddings"] = int(need("rope.scaling.original_context_length"))
        if f"{name}.rope.scaling.attn_factor" in metadata:
            attention = need("rope.scaling.attn_factor") * yarn_attention(rope["factor"])
            rope["attention_factor"] = float(attention)
    biases = {stem for stem in found.biases if f"blk.0.{stem}.bias" in tensors}
    config: dict[str, Any] = {
        "architectures": [found.transformers],
        "model_type": found.model_type,
        "vocab_size": tensors["token_embd.weight"].shape[0],
        "hidden_size": hidden,
        "intermediate_size": int(need("feed_forward_length")),
        "num_hidden_layers": int(need("block_count")),
        "num_attention_heads": heads,
        "num_key_value_heads": int(need("attention.head_count_kv", heads)),
        "head_dim": int(need("attention.key_length", hidden // max(heads, 1))),
        "hidden_act": "silu",
        "rms_norm_eps": float(need("attention.layer_norm_rms_epsilon")),
        "rope_parameters": rope,
        "max_position_embeddings": int(need("context_length")),
        "tie_word_embeddings": "output.weight" not in tensors,
        "dtype": "bfloat16",
    }
    if found.transformers == "LlamaForCausalLM":
        config["attention_bias"] = any(stem.startswith("attn") for stem in biases)
        config["mlp_bias"] = any(stem.startswith("ffn") for stem in biases)
    for token in ("bos", "eos"):
        if isinstance(i := metadata.get(f"tokenizer.ggml.{token}_token_id"), int):
            config[f"{token}_token_id"] = i
    return config


def metadata_of(architecture: Architecture, config: Mapping[str, Any]) -> dict[str, int | float | str]:
    """Hyper-parameters as metadata; integers are GGUF's uint32, floats its float32.

    Raises:
        CheckpointError: RoPE is scaled in a way that llama.cpp does not know.
    """
    shape, name = shape_of(config), architecture.ggml
    rope = rope_of(config)
    values: dict[str, int | float | str] = {
        f"{name}.vocab_size": shape.vocabulary,
        f"{name}.block_count": shape.layers,
        f"{name}.embedding_length": shape.hidden,
        f"{name}.feed_forward_length": shape.intermediate,
        f"{name}.attention.head_count": shape.heads,
        f"{name}.attention.head_count_kv": shape.kv_heads,
        f"{name}.attention.key_length": shape.head_dim,
        f"{name}.attention.value_length": shape.head_dim,
        f"{name}.attention.layer_norm_rms_epsilon": float(config.get("rms_norm_eps", 1e-6)),
        f"{name}.rope.dimension_count": shape.head_dim,
        f"{name}.rope.freq_base": float(rope.get("rope_theta", 10000.0)),
    }
    if isinstance(context := config.get("max_position_embeddings"), int):
        values[f"{name}.context_length"] = context
    kind = rope_type(rope)
    if kind in ("linear", "yarn"):
        values[f"{name}.rope.scaling.type"] = kind
        values[f"{name}.rope.scaling.factor"] = float(rope["factor"])
    if kind == "yarn":
        values |= _yarn(name, rope, config)
    if kind == "llama3" and name != "llama":
        raise CheckpointError(f"rope_type 'llama3': llama.cpp loads its factors for Llama, not for {name}")
    if kind not in ("default", "linear", "yarn", "llama3"):
        raise CheckpointError(f"rope_type '{kind}': llama.cpp scales RoPE as linear, yarn or llama3 do")
    return values


def _yarn(name: str, rope: Mapping[str, Any], config: Mapping[str, Any]) -> dict[str, int | float | str]:
    for key in ("mscale", "mscale_all_dim"):
        if rope.get(key):
            raise CheckpointError(f"rope_type yarn with {key}: not written as GGUF")
    if rope.get("truncate") is False:
        raise CheckpointError("rope_type yarn with truncate false: llama.cpp always truncates")
    if (rope.get("beta_fast") or 32, rope.get("beta_slow") or 1) != (32, 1):
        raise CheckpointError(
            "rope_type yarn with another beta_fast or beta_slow than 32 and 1: llama.cpp takes them from its "
            "command line, not from the file"
        )
    before = rope.get("original_max_position_embeddings") or config["max_position_embeddings"]
    values: dict[str, int | float | str] = {f"{name}.rope.scaling.original_context_length": int(before)}
    if rope.get("attention_factor") is not None:
        # transformers multiplies by it alone, llama.cpp by it times its own default; and llama.cpp reads this
        # key, not yarn_attn_factor, which its converter writes
        attention = float(rope["attention_factor"]) / yarn_attention(float(rope["factor"]))
        values[f"{name}.rope.scaling.attn_factor"] = attention
    return values


def yarn_attention(factor: float) -> float:
    """What llama.cpp multiplies yarn's attention by, in addition to the factor in a file."""
    return 1 + 0.1 * math.log(factor)


def rope_factors(config: Mapping[str, Any]) -> Tensor | None:
    """For Llama 3's scaling, what llama.cpp divides each frequency by: float32 (head_dim / 2,)."""
    rope = rope_of(config)
    if rope_type(rope) != "llama3":
        return None
    dim, base, factor = shape_of(config).head_dim, float(rope.get("rope_theta", 10000.0)), rope["factor"]
    low, high, before = (
        float(rope[key])
        for key in ("low_freq_factor", "high_freq_factor", "original_max_position_embeddings")
    )
    wavelength = 2 * math.pi * base ** (torch.arange(0, dim, 2, dtype=torch.float64) / dim)
    smooth = ((before / wavelength - low) / (high - low)).clamp(0, 1)
    return (1 / ((1 - smooth) / factor + smooth)).to(torch.float32)
