"""Small ternary models as training saves them, of the shapes that GGUF files are tested with."""

from __future__ import annotations

import shutil
from pathlib import Path
from typing import Any

import torch
from torch import nn

from axolotl_bitnet import convert_to_bitlinear
from support import TINY
from support.models import WIDE, tiny_model

YARN = {
    "rope_type": "yarn",
    "rope_theta": 1000.0,
    "factor": 4.0,
    "original_max_position_embeddings": 128,
}
LLAMA3 = {
    "rope_type": "llama3",
    "rope_theta": 1000.0,
    "factor": 8.0,
    "low_freq_factor": 1.0,
    "high_freq_factor": 4.0,
    "original_max_position_embeddings": 128,
}
VARIANTS: dict[str, tuple[str, dict[str, Any]]] = {
    "llama": ("Llama", {}),
    "every head its own keys": ("Llama", {"num_key_value_heads": 4}),
    "wide heads": (
        "Llama",
        {"head_dim": 128, "rope_parameters": {"rope_type": "default", "rope_theta": 500.0}},
    ),
    "tied": ("Llama", {"tie_word_embeddings": True}),
    "biases": ("Llama", {"attention_bias": True, "mlp_bias": True}),
    "linear rope": ("Llama", {"rope_parameters": {"rope_type": "linear", "rope_theta": 1e3, "factor": 4.0}}),
    "llama3 rope": ("Llama", {"rope_parameters": LLAMA3}),
    "yarn rope": ("Llama", {"rope_parameters": YARN}),
    "yarn rope with a factor": ("Llama", {"rope_parameters": YARN | {"attention_factor": 1.3}}),
    "no multiple of 256": ("Llama", {"hidden_size": 192, "intermediate_size": 320, "head_dim": 48}),
    "qwen2": ("Qwen2", {"vocab_size": 520}),
    "qwen3": ("Qwen3", {"head_dim": 128}),
    "qwen3 tied": ("Qwen3", {"tie_word_embeddings": True}),
}


def build(family: str = "Llama", **overrides: Any) -> nn.Module:
    """A random ternary model: hidden 256, two layers. Attention is far from even, so that RoPE matters."""
    settings: dict[str, Any] = WIDE | dict(
        intermediate_size=512,
        vocab_size=512,
        max_position_embeddings=512,
        initializer_range=0.06,
        bos_token_id=None,
    )
    model = tiny_model(family, **(settings | overrides)).eval()
    convert_to_bitlinear(model)
    with torch.no_grad():  # norms of 1 and biases of 0 would hide much
        for parameter in model.parameters():
            if parameter.dim() == 1:
                parameter += torch.randn_like(parameter) * 0.3
    return model


def save(model: Any, folder: Path, tokenizer: Path = TINY / "model") -> Path:
    """Save latents and a tokenizer as a run does."""
    model.save_pretrained(folder)
    for path in tokenizer.glob("tokenizer*"):
        shutil.copyfile(path, folder / path.name)
    return folder
