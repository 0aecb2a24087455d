"""A config by which head and embedding are tied, beside a file that holds a head of its own.

transformers 5 loads such a model untied; llama.cpp, MLX and others follow the config and drop the head. So
the two tensors are compared when a checkpoint is opened. If they are equal, the model is tied, and the copy
is ignored. If they differ, it is not, and ``tie_word_embeddings`` becomes false.
"""

from __future__ import annotations

from collections.abc import Callable, Collection, Iterator, Mapping
from typing import Any

import torch
from torch import Tensor

from ..storage.safetensors_stream import Entry

_HEADS = ("lm_head.weight", "embed_out.weight")
EMBEDDINGS = ("embed_tokens.weight", "word_embeddings.weight", "wte.weight", "embed_in.weight")
KEY = "tie_word_embeddings"


def head_and_embedding(keys: Collection[str]) -> tuple[str, str] | None:
    """Names of a language model's head and embedding, if both are stored."""
    heads, embeddings = ([key for key in keys if key.endswith(ends)] for ends in (_HEADS, EMBEDDINGS))
    return (heads[0], embeddings[0]) if len(heads) == len(embeddings) == 1 else None


def says_tied(config: Mapping[str, Any]) -> bool:
    """Whether head and embedding are one by a config, or by that of the language model in it."""
    inside = config.get("text_config")
    return bool(config.get(KEY) or (isinstance(inside, Mapping) and inside.get(KEY)))


def untied(config: Mapping[str, Any]) -> dict[str, Any]:
    """The config with ``tie_word_embeddings`` false."""
    inside = config.get("text_config")
    text = {"text_config": {**inside, KEY: False}} if isinstance(inside, Mapping) and KEY in inside else {}
    return {**config, **text, KEY: False}


def repeats_embedding(
    config: Mapping[str, Any],
    entries: Mapping[str, Entry],
    blocks: Callable[[str, torch.dtype], Iterator[Tensor]],
) -> tuple[str, bool] | None:
    """The head of a model that is tied by its config, and whether it repeats the embedding; None where it is
    not tied or no head is stored.

    Args:
        config: its config.json.
        entries: its tensors.
        blocks: one of them as a dtype, flat, in pieces.
    """
    found = head_and_embedding(entries)
    if found is None or not says_tied(config):
        return None
    head, embedding = (entries[key] for key in found)
    if head.shape != embedding.shape:
        return head.name, False
    dtype = torch.promote_types(head.dtype, embedding.dtype)
    pairs = zip(blocks(head.name, dtype), blocks(embedding.name, dtype), strict=True)
    return head.name, all(torch.equal(a, b) for a, b in pairs)
