"""What llama.cpp calls the parts of a Llama or Qwen: hyper-parameters, tensors, the order of rows.

llama.cpp rotates neighbouring pairs of a head of the Llama architecture where transformers rotates halves, so
rows of q and k (weights and biases) are stored in another order. Its Qwen architectures rotate halves too.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from ...storage.atomic import CheckpointError
from ..config_json import architecture_name, rope_of, sliding_window

ROPE_FREQS = "rope_freqs.weight"
_OUTER = {
    "token_embd.weight": "model.embed_tokens.weight",
    "output_norm.weight": "model.norm.weight",
    "output.weight": "lm_head.weight",
}
_INNER = {
    "attn_norm": "input_layernorm",
    "attn_q": "self_attn.q_proj",
    "attn_k": "self_attn.k_proj",
    "attn_v": "self_attn.v_proj",
    "attn_output": "self_attn.o_proj",
    "attn_q_norm": "self_attn.q_norm",
    "attn_k_norm": "self_attn.k_norm",
    "ffn_norm": "post_attention_layernorm",
    "ffn_gate": "mlp.gate_proj",
    "ffn_up": "mlp.up_proj",
    "ffn_down": "mlp.down_proj",
}
_QK_NORMS = {"attn_q_norm", "attn_k_norm"}
_BIASED = {name for name in _INNER if not name.endswith("norm")}
EMBEDDING, HEAD = "model.embed_tokens.weight", "lm_head.weight"


@dataclass(frozen=True)
class Architecture:
    """One architecture, as both sides name it."""

    transformers: str
    model_type: str
    ggml: str
    permuted: bool = False
    qk_norms: bool = False
    biases: frozenset[str] = frozenset()
    """Layers that llama.cpp adds a bias to."""


ARCHITECTURES = (
    Architecture("LlamaForCausalLM", "llama", "llama", permuted=True, biases=frozenset(_BIASED)),
    Architecture("MistralForCausalLM", "mistral", "llama", permuted=True),
    Architecture("Qwen2ForCausalLM", "qwen2", "qwen2", biases=frozenset({"attn_q", "attn_k", "attn_v"})),
    Architecture("Qwen3ForCausalLM", "qwen3", "qwen3", qk_norms=True),
)
_REASONS = {"BitNetForCausalLM": "llama.cpp computes SiLU where it has a squared ReLU"}


@dataclass(frozen=True)
class Shape:
    """The sizes of a model, from its config."""

    layers: int
    hidden: int
    intermediate: int
    heads: int
    kv_heads: int
    head_dim: int
    vocabulary: int


def architecture_of(config: Mapping[str, Any]) -> Architecture:
    """The architecture of a config.json.

    Raises:
        CheckpointError: llama.cpp cannot run it, or not as transformers does; with the reason.
    """
    name = architecture_name(config) or "a model whose config names no architecture"
    found = next((known for known in ARCHITECTURES if known.transformers == name), None)
    if found is None:
        supported = ", ".join(known.transformers for known in ARCHITECTURES)
        if name in _REASONS:
            why = _REASONS[name]
        elif any(key in config for key in ("text_config", "vision_config", "audio_config")):
            why = "it has more than one tower, and only language models are written"
        elif "Classification" in name or "RewardModel" in name:
            why = "its head is a classifier, for which llama.cpp has no place"
        else:
            why = "it has not been run in llama.cpp"
        raise CheckpointError(f"{name} is not written as GGUF: {why}. Written are {supported}")
    _check_computation(config, name)
    return found


def _check_computation(config: Mapping[str, Any], name: str) -> None:
    """Raise CheckpointError for what llama.cpp would silently compute otherwise."""
    if (act := config.get("hidden_act", "silu")) not in ("silu", "swish"):
        raise CheckpointError(f"hidden_act '{act}': llama.cpp computes {name} with silu only")
    if window := sliding_window(config):
        raise CheckpointError(f"{window}: llama.cpp computes {name} with full attention only")
    if rope_of(config).get("partial_rotary_factor", 1.0) != 1.0:
        raise CheckpointError("partial_rotary_factor: llama.cpp rotates the whole of a Llama's heads")


def shape_of(config: Mapping[str, Any]) -> Shape:
    """Sizes from a config.json.

    Raises:
        CheckpointError: one is missing or not a positive integer.
    """

    def number(key: str, default: int | None = None) -> int:
        value = config.get(key)
        value = default if value is None else value
        if not isinstance(value, int) or isinstance(value, bool) or value <= 0:
            raise CheckpointError(f"config.json: {key} is {value!r}, not a positive integer")
        return value

    hidden, heads = number("hidden_size"), number("num_attention_heads")
    return Shape(
        layers=number("num_hidden_layers"),
        hidden=hidden,
        intermediate=number("intermediate_size"),
        heads=heads,
        kv_heads=number("num_key_value_heads", heads),
        head_dim=number("head_dim", hidden // heads),
        vocabulary=number("vocab_size"),
    )


def tensors_of(architecture: Architecture, shape: Shape) -> dict[str, tuple[str, tuple[int, ...]]]:
    """All tensors that llama.cpp knows of such a model: by transformers' name, (GGUF's name, shape).

    Biases and the head are among them, and need not exist.
    """
    q, kv = shape.heads * shape.head_dim, shape.kv_heads * shape.head_dim
    sizes: dict[str, tuple[int, ...]] = {
        "attn_q": (q, shape.hidden),
        "attn_k": (kv, shape.hidden),
        "attn_v": (kv, shape.hidden),
        "attn_output": (shape.hidden, q),
        "ffn_gate": (shape.intermediate, shape.hidden),
        "ffn_up": (shape.intermediate, shape.hidden),
        "ffn_down": (shape.hidden, shape.intermediate),
        "attn_norm": (shape.hidden,),
        "ffn_norm": (shape.hidden,),
        "attn_q_norm": (shape.head_dim,),
        "attn_k_norm": (shape.head_dim,),
    }
    vectors: dict[str, tuple[int, ...]] = {"output_norm.weight": (shape.hidden,)}
    found: dict[str, tuple[str, tuple[int, ...]]] = {}
    for ggml, hf in _OUTER.items():
        found[hf] = (ggml, vectors.get(ggml, (shape.vocabulary, shape.hidden)))
    for layer in range(shape.layers):
        for ggml, hf in _INNER.items():
            if ggml in _QK_NORMS and not architecture.qk_norms:
                continue
            stem = f"model.layers.{layer}.{hf}"
            found[f"{stem}.weight"] = (f"blk.{layer}.{ggml}.weight", sizes[ggml])
            if ggml in architecture.biases:
                found[f"{stem}.bias"] = (f"blk.{layer}.{ggml}.bias", sizes[ggml][:1])
    return found


def row_order(architecture: Architecture, shape: Shape, name: str) -> Tensor | None:
    """For each row of a tensor in the file, the row of transformers' tensor ``name``; None if they are the
    same. int64 (rows,)."""
    if not architecture.permuted or ".self_attn." not in name:
        return None
    layer = name.split(".")[-2]
    heads = {"q_proj": shape.heads, "k_proj": shape.kv_heads}.get(layer)
    if heads is None:
        return None
    rows = torch.arange(heads * shape.head_dim).reshape(heads, 2, shape.head_dim // 2)
    return rows.transpose(1, 2).reshape(-1)
