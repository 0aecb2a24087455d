"""A GGUF file's metadata, which is all that llama.cpp knows of config and tokenizer, compared with the files
that it would be written from."""

from __future__ import annotations

from typing import Any

import numpy as np
import torch

from ..checkpoint import TernaryCheckpoint
from . import architecture as llama
from .metadata import metadata_of, rope_factors
from .reader import GGUFCheckpoint
from .tokenizer import Vocabulary, read_vocabulary

_PARTS = {"tokens": "tokens", "types": "token_type", "merges": "merges"}


def computed_otherwise(artifact: GGUFCheckpoint, reference: TernaryCheckpoint) -> list[str]:
    """Where llama.cpp would compute another model than the reference's config describes."""
    expected = metadata_of(llama.architecture_of(reference.config), reference.config)
    found = []
    for key, value in expected.items():
        wanted = float(np.float32(value)) if isinstance(value, float) else value
        if artifact.metadata.get(key) != wanted:
            found.append(f"config: {key} is {artifact.metadata.get(key)}, trained {value}")
    ours, theirs = artifact.rope_factors(), rope_factors(reference.config)
    if (ours is None) != (theirs is None) or (
        ours is not None and theirs is not None and not torch.equal(ours, theirs)
    ):
        found.append(f"config: {llama.ROPE_FREQS} differs from rope_parameters")
    return found


def compare_vocabulary(artifact: GGUFCheckpoint, reference: TernaryCheckpoint) -> tuple[int, list[str]]:
    """Tokens, merges, scores, special tokens and chat templates, exactly.

    Returns:
        How many entries of metadata they are, and one line for each that differs.
    """
    vocabulary = read_vocabulary(reference.companions, artifact.entries[llama.EMBEDDING].shape[0])
    expected = _as_metadata(vocabulary)
    names = ("tokenizer.ggml.", "tokenizer.chat_template")
    ours = {key: value for key, value in artifact.metadata.items() if key.startswith(names)}
    ours.pop("tokenizer.chat_templates", None)  # the names of those that follow
    found = [f"{key} is missing" for key in sorted(expected.keys() - ours.keys())]
    found += [f"{key} was not there in training" for key in sorted(ours.keys() - expected.keys())]
    found += [f"{key} differs" for key in sorted(ours.keys() & expected.keys()) if ours[key] != expected[key]]
    return len(expected), found


def _as_metadata(vocabulary: Vocabulary) -> dict[str, Any]:
    """The keys under which llama.cpp reads a vocabulary."""
    entries: dict[str, Any] = {"model": vocabulary.model, "pre": vocabulary.pre}
    entries |= {name: values for part, name in _PARTS.items() if (values := getattr(vocabulary, part))}
    if vocabulary.scores:
        entries["scores"] = np.asarray(vocabulary.scores, dtype=np.float32).tolist()
    found = {f"tokenizer.ggml.{name}": value for name, value in (entries | vocabulary.numbers).items()}
    for name, text in vocabulary.templates.items():
        found["tokenizer.chat_template" + ("" if name == "default" else f".{name}")] = text
    return found
