"""A model's matrices by name and shape, from its config.json alone: no weights, no torch, no transformers.

For `axolotl-bitnet plan`, which should answer at once. :mod:`axolotl_bitnet.model.layer_plan` decides the
same of a live model, and the tests compare the two. Only Llama-shaped architectures are known here.
"""

from __future__ import annotations

import fnmatch
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from typing import Any

_ROWS_PER_BYTE = 4  # of a packed matrix
_BIASED = {"llama": (), "mistral": (), "qwen2": ("q_proj", "k_proj", "v_proj"), "qwen3": ()}
"""Architectures that are known, and their layers that always have a bias."""


class UnknownShape(ValueError):
    """The config lacks a size, or is of an architecture that is not known here."""


@dataclass(frozen=True)
class Matrix:
    """One linear layer: rows are its outputs, columns its inputs."""

    name: str
    rows: int
    columns: int

    @property
    def weights(self) -> int:
        return self.rows * self.columns


@dataclass(frozen=True)
class Outline:
    """The sizes from which memory and file sizes are computed.

    Attributes:
        ternary, dense: linear layers that become ternary, and the others.
        others: number of parameters outside the ternary layers' weights.
        embedding: parameters of the embedding and the head (once, if tied).
        hidden, intermediate, layers, vocabulary: sizes.
        attention: outputs of q, k and v together.
        queries: outputs of q alone.
        normed: outputs of q and k together, where norms of their own follow them (Qwen3); else 0.
    """

    ternary: list[Matrix]
    dense: list[str]
    others: int
    embedding: int
    hidden: int
    intermediate: int
    layers: int
    vocabulary: int
    attention: int
    queries: int
    normed: int

    @property
    def ternary_weights(self) -> int:
        return sum(matrix.weights for matrix in self.ternary)

    @property
    def parameters(self) -> int:
        return self.ternary_weights + self.others


def outline_of(config: Mapping[str, Any], skip_modules: Iterable[str] = ()) -> tuple[Outline, list[str]]:
    """The outline of a config.json's causal language model, and why it cannot be trained: sentences.

    Raises:
        UnknownShape: with the reason.
    """
    kind = config.get("model_type")
    if kind not in _BIASED:
        raise UnknownShape(f"model_type {kind!r} is not known without building the model")
    hidden, layers = _number(config, "hidden_size"), _number(config, "num_hidden_layers")
    intermediate, vocabulary = _number(config, "intermediate_size"), _number(config, "vocab_size")
    heads = _number(config, "num_attention_heads")
    head = config.get("head_dim") or hidden // heads
    queries, keys = heads * head, (config.get("num_key_value_heads") or heads) * head
    shapes = {
        "self_attn.q_proj": (queries, hidden),
        "self_attn.k_proj": (keys, hidden),
        "self_attn.v_proj": (keys, hidden),
        "self_attn.o_proj": (hidden, queries),
        "mlp.gate_proj": (intermediate, hidden),
        "mlp.up_proj": (intermediate, hidden),
        "mlp.down_proj": (hidden, intermediate),
    }
    patterns = list(skip_modules)
    unused = set(patterns)
    ternary, dense, problems = [], [], []
    biases = skipped = 0
    for layer in range(layers):
        for stem, (rows, columns) in shapes.items():
            matrix = Matrix(f"model.layers.{layer}.{stem}", rows, columns)
            biases += rows if _has_bias(config, kind, stem) else 0
            hits = {pattern for pattern in patterns if matches(matrix.name, pattern)}
            unused -= hits
            if hits:
                dense.append(matrix.name)
                skipped += matrix.weights
            elif rows % _ROWS_PER_BYTE:
                problems.append(
                    f"{matrix.name} has out_features = {rows}, not a multiple of {_ROWS_PER_BYTE}, and could "
                    "not be packed: add it to skip_modules"
                )
            else:
                ternary.append(matrix)
    unused -= {pattern for pattern in patterns if matches("lm_head", pattern)}
    if unused:
        problems.append(f"skip_modules matches no linear layer: {sorted(unused)}")
    embedding = vocabulary * hidden * (1 if config.get("tie_word_embeddings") else 2)
    norms = (2 * layers + 1) * hidden + (2 * head * layers if kind == "qwen3" else 0)
    others = embedding + norms + biases + skipped
    normed = queries + keys if kind == "qwen3" else 0
    sizes = (hidden, intermediate, layers, vocabulary, queries + 2 * keys, queries, normed)
    return Outline(ternary, [*dense, "lm_head"], others, embedding, *sizes), problems


def matches(name: str, pattern: str) -> bool:
    """Whether a pattern of `skip_modules` means this layer: its name, its end, a parent, or a glob."""
    return (
        name == pattern
        or name.endswith(f".{pattern}")
        or name.startswith(f"{pattern}.")
        or fnmatch.fnmatchcase(name, pattern)
    )


def _has_bias(config: Mapping[str, Any], kind: Any, stem: str) -> bool:
    key = "attention_bias" if stem.startswith("self_attn") else "mlp_bias"
    return stem.split(".")[-1] in _BIASED[kind] or (kind in ("llama", "qwen3") and bool(config.get(key)))


def _number(config: Mapping[str, Any], key: str) -> int:
    value = config.get(key)
    if not isinstance(value, int) or value <= 0:
        raise UnknownShape(f"config.json: {key} is {value!r}, not a positive integer")
    return value
