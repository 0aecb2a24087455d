"""The tiny model of the tests: its config, written once."""

from __future__ import annotations

from typing import Any

import transformers
from torch import nn

SIZES: dict[str, Any] = dict(
    hidden_size=64,
    intermediate_size=128,
    num_hidden_layers=2,
    num_attention_heads=4,
    num_key_value_heads=2,
    head_dim=16,
    vocab_size=128,
    max_position_embeddings=64,
    tie_word_embeddings=False,
    bos_token_id=1,
    eos_token_id=2,
    pad_token_id=0,
)
WIDE: dict[str, Any] = dict(hidden_size=256, intermediate_size=256, head_dim=64)
"""Rows of 256, which is what a block of GGUF's ternary types holds."""


def tiny_config(family: str, **overrides: Any) -> Any:
    """transformers' config of the family, with ``SIZES``."""
    return getattr(transformers, f"{family}Config")(**(SIZES | overrides))


def tiny_model(family: str, head: str = "CausalLM", **overrides: Any) -> nn.Module:
    """``tiny_model("Llama", **config)``: a random model of transformers, float32."""
    return getattr(transformers, f"{family}For{head}")(tiny_config(family, **overrides))
