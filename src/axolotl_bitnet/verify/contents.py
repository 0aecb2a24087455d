"""Two stored models compared in all that is not ternary: the other tensors, the config, the tokenizer."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from ..formats.checkpoint import TernaryCheckpoint
from ..formats.companions import COMPANIONS, MORE_TEMPLATES, code_files
from ..formats.gguf.compare import compare_vocabulary, computed_otherwise
from ..formats.gguf.reader import GGUFCheckpoint
from ..model.entry import CONFIG_KEY
from ..storage.parallel import one_thread
from ..storage.progress import begin
from .report import Check

_OF_STORAGE = {"dtype", "torch_dtype", "transformers_version", "_name_or_path"}
"""Keys of a config about how a model is stored, or by whom, not what it is."""


@one_thread()
def compare_tensors(artifact: TernaryCheckpoint, reference: TernaryCheckpoint) -> Check:
    """Tensor by tensor, bit for bit after the rounding that the artifact's format states."""
    ternary = set(artifact.keys.values()) | set(reference.keys.values())
    ours = {key: entry for key, entry in artifact.entries.items() if key not in ternary}
    theirs = {key: entry for key, entry in reference.entries.items() if key not in ternary}
    found = [f"'{key}' is missing" for key in sorted(theirs.keys() - ours.keys())]
    found += [f"'{key}' was not in training" for key in sorted(ours.keys() - theirs.keys())]
    common = sorted(ours.keys() & theirs.keys())
    advance = begin("comparing tensors", sum(ours[key].nbytes for key in common))
    for key in common:
        if ours[key].shape != theirs[key].shape:
            found.append(f"'{key}' has shape {list(ours[key].shape)}, trained {list(theirs[key].shape)}")
        elif not _same(artifact, key, reference.tensor(key)):
            found.append(f"'{key}' differs")
        advance(ours[key].nbytes)
    of = f"{len(found)} of {len(theirs)}" if found else f"{len(common)}"
    return Check("other tensors", f"{of}, exact, {artifact.rounding}", found)


def _same(artifact: TernaryCheckpoint, key: str, trained: Tensor) -> bool:
    stored = artifact.tensor(key)
    if _equal(stored, artifact.as_stored(key, trained)):
        return True
    # It may have been written from another artifact, which had rounded it to bfloat16.
    return trained.dtype == torch.float32 and _equal(
        stored, artifact.as_stored(key, trained.to(torch.bfloat16))
    )


def _equal(one: Tensor, other: Tensor) -> bool:
    """Bit for bit: a NaN is equal to itself."""
    return one.dtype == other.dtype and torch.equal(_bytes(one), _bytes(other))


def _bytes(tensor: Tensor) -> Tensor:
    return tensor.contiguous().reshape(-1).view(torch.uint8)


def compare_config(artifact: TernaryCheckpoint, reference: TernaryCheckpoint) -> Check:
    """Value by value, but for the keys about how the model is stored."""
    ours, theirs = dict(artifact.config), dict(reference.config)
    for config in (ours, theirs):  # there twice, for readers of the top level only
        rope = config.get("rope_parameters")
        if isinstance(rope, dict) and config.get("rope_theta") == rope.get("rope_theta"):
            config.pop("rope_theta", None)
        if isinstance(entry := config.get(CONFIG_KEY), dict):
            config[CONFIG_KEY] = {key: value for key, value in entry.items() if key != "format"}
    if not artifact.whole_config:
        theirs = {key: value for key, value in theirs.items() if key in ours}
    found = list(_differences(ours, theirs))
    if artifact.head_unsaid:
        found.append(
            "config: tie_word_embeddings is true, and the head differs from the embedding: programs that "
            "follow it lose the head"
        )
    if isinstance(artifact, GGUFCheckpoint):
        found += computed_otherwise(artifact, reference)
    of = f"{len(found)} values, of {len(theirs)} keys" if found else f"{len(ours)} keys"
    return Check("config", f"{of}, but for those of storage (dtype, version)", found)


def _differences(ours: Any, theirs: Any, where: str = "") -> Iterator[str]:
    if isinstance(ours, Mapping) and isinstance(theirs, Mapping):
        for key in sorted((ours.keys() | theirs.keys()) - _OF_STORAGE):
            place = f"{where}.{key}" if where else str(key)
            if key not in theirs:
                yield f"config: {place} is {_short(ours[key])}, and was not there in training"
            elif key not in ours:
                yield f"config: {place} is missing, trained {_short(theirs[key])}"
            else:
                yield from _differences(ours[key], theirs[key], place)
    elif ours != theirs:
        yield f"config: {where} is {_short(ours)}, trained {_short(theirs)}"


def _short(value: Any) -> str:
    text = repr(value)
    return text if len(text) <= 60 else f"{text[:57]}..."


def compare_companions(artifact: TernaryCheckpoint, reference: TernaryCheckpoint) -> Check:
    """Tokenizer, chat template, generation config and the like, byte for byte."""
    theirs = _companions(reference)
    if not theirs:
        return Check("tokenizer", f"there is none in {reference.companions}", done=False)
    if isinstance(artifact, GGUFCheckpoint):
        count, found = compare_vocabulary(artifact, reference)
        return Check("tokenizer", f"{count} entries of metadata, exact", found)
    ours = _companions(artifact)
    found = [f"{name} is missing" for name in sorted(theirs.keys() - ours.keys())]
    found += [f"{name} was not there in training" for name in sorted(ours.keys() - theirs.keys())]
    for name in sorted(ours.keys() & theirs.keys()):
        if ours[name].read_bytes() != theirs[name].read_bytes():
            found.append(f"{name} differs")
    of = f"{len(found)} of {len(theirs)}" if found else f"{len(theirs)}"
    return Check("tokenizer", f"{of} files, byte for byte", found)


def _companions(checkpoint: TernaryCheckpoint) -> dict[str, Path]:
    folder = checkpoint.companions
    patterns = [*COMPANIONS, f"{MORE_TEMPLATES}/*"]
    paths = [path for pattern in patterns for path in folder.glob(pattern) if path.is_file()]
    paths += [folder / name for name in code_files(folder, checkpoint.config)]
    return {path.relative_to(folder).as_posix(): path for path in paths}
