"""config.json of a model of which there is only llama.cpp's metadata."""

from __future__ import annotations

from typing import Any

from . import gguf_llama as llama
from .files import CheckpointError
from .gguf_header import Header


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
            attention = need("rope.scaling.attn_factor") * llama.yarn_attention(rope["factor"])
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
