"""A tokenizer as GGUF metadata: tokens and merges, special tokens, chat template.

The tokenizer is written as transformers loads it, from whichever of its files exist (tokenizer.json,
tokenizer.model), because the model trained with that one.
"""

from __future__ import annotations

import json
import logging
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from ...storage.atomic import CheckpointError, read_json
from .pretokenizer import find_pretokenizer

LOG = logging.getLogger(__name__)
NORMAL, UNKNOWN, CONTROL, USER_DEFINED, UNUSED, BYTE = range(1, 7)
_SPACE = "\u2581"
_IDS = {"bos": "bos", "eos": "eos", "unk": "unknown", "sep": "seperator", "pad": "padding", "mask": "mask"}
"""Special tokens, and what llama.cpp calls them (the spelling is its own)."""


@dataclass
class Vocabulary:
    """What llama.cpp needs of a tokenizer.

    Attributes:
        model: ``gpt2`` (byte-level BPE) or ``llama`` (SentencePiece).
        pre: name of the pre-tokenizer; SentencePiece has none.
        tokens, types: by id, as many as the model has embeddings.
        merges: pairs joined by a space, the first merged first (byte-level BPE).
        scores: by id, the highest merged first (SentencePiece).
        numbers: further metadata below ``tokenizer.ggml.``: ids (int) and switches (bool).
        templates: chat templates by name; ``default`` is the one.
    """

    model: str
    pre: str
    tokens: list[str]
    types: list[int]
    merges: list[str] = field(default_factory=list)
    scores: list[float] = field(default_factory=list)
    numbers: dict[str, int | bool] = field(default_factory=dict)
    templates: dict[str, str] = field(default_factory=dict)


def read_vocabulary(folder: Path, size: int) -> Vocabulary:
    """The tokenizer in a folder.

    Args:
        folder: where tokenizer.json (or tokenizer.model) and tokenizer_config.json are.
        size: rows of the embedding.

    Raises:
        CheckpointError: there is no tokenizer, it has more tokens than the model, or llama.cpp cannot
            tokenize as it does.
    """
    tokenizer = _load(folder)
    backend = tokenizer.backend_tokenizer
    spec = json.loads(backend.to_str())
    if spec["model"]["type"] != "BPE":
        raise CheckpointError(
            f"{folder}: a {spec['model']['type']} tokenizer; only byte-level BPE and SentencePiece's BPE are "
            "written"
        )
    tokens, types = _tokens(backend.get_vocab(with_added_tokens=True), spec, size, folder)
    steps = [kind for kind, _ in _steps(spec.get("pre_tokenizer"))]
    if "ByteLevel" in steps:
        if not spec["model"]["merges"]:
            raise CheckpointError(
                f"{folder}: its byte-level BPE tokenizer has no merges, without which llama.cpp loads no file"
            )
        pre = _pre_tokenizer(backend, spec, folder)
        vocabulary = Vocabulary("gpt2", pre, tokens, types, merges=_merges(spec))
    else:
        scores = _scores(tokens, types, spec, folder)
        vocabulary = Vocabulary("llama", "default", tokens, types, scores=scores)
        vocabulary.numbers["add_space_prefix"] = _adds_space(spec, folder)
    vocabulary.numbers |= _special(tokenizer, folder)
    template = tokenizer.chat_template
    vocabulary.templates = {"default": template} if isinstance(template, str) else dict(template or {})
    return vocabulary


def _load(folder: Path) -> Any:
    from transformers import AutoTokenizer

    names = ("tokenizer.json", "tokenizer.model", "tokenizer_config.json")
    if not any((folder / name).is_file() for name in names):
        raise CheckpointError(f"{folder} holds no tokenizer, which a GGUF file must contain: copy it there")
    try:
        tokenizer = AutoTokenizer.from_pretrained(folder, local_files_only=True, trust_remote_code=False)
    except Exception as error:  # a library may raise anything about its file
        raise CheckpointError(f"{folder}: its tokenizer cannot be loaded: {error}") from error
    if not hasattr(tokenizer, "backend_tokenizer"):
        kind = type(tokenizer).__name__
        raise CheckpointError(f"{folder}: its tokenizer, a {kind}, has no form as tokenizer.json")
    return tokenizer


def _steps(part: Mapping[str, Any] | None) -> list[tuple[str, Mapping[str, Any]]]:
    """The elements of a normalizer, pre-tokenizer or decoder, sequences laid flat."""
    if not part:
        return []
    if part["type"] == "Sequence":
        inner: list[Any] = next(
            (part[key] for key in ("pretokenizers", "normalizers", "decoders") if key in part), []
        )
        return [step for each in inner for step in _steps(each)]
    return [(part["type"], part)]


def _tokens(
    ids: Mapping[str, int], spec: Mapping[str, Any], size: int, folder: Path
) -> tuple[list[str], list[int]]:
    most = max(ids.values()) + 1
    if most > size:
        raise CheckpointError(
            f"{folder}: its tokenizer has {most} tokens, the model only {size} embeddings. "
            "Put the model's own tokenizer there"
        )
    tokens = [f"[PAD{i}]" for i in range(size)]
    types = [UNUSED] * size
    for token, i in ids.items():
        tokens[i], types[i] = token, NORMAL
        if len(token) == 6 and token.startswith("<0x") and token.endswith(">"):
            types[i] = BYTE
    for added in spec["added_tokens"]:
        types[added["id"]] = CONTROL if added["special"] else USER_DEFINED
    unknown = ids.get(spec["model"].get("unk_token") or "")
    if unknown is not None and not any(kind == "ByteLevel" for kind, _ in _steps(spec.get("pre_tokenizer"))):
        types[unknown] = UNKNOWN
    return tokens, types


def _merges(spec: Mapping[str, Any]) -> list[str]:
    merges = [each if isinstance(each, str) else " ".join(each) for each in spec["model"]["merges"]]
    return merges


def _pre_tokenizer(backend: Any, spec: Mapping[str, Any], folder: Path) -> str:
    normalizers = {kind for kind, _ in _steps(spec.get("normalizer"))} - {"NFC"}
    if normalizers:
        raise CheckpointError(
            f"{folder}: its tokenizer normalizes text ({', '.join(sorted(normalizers))}); llama.cpp does not"
        )
    match = find_pretokenizer(backend)
    if match is None:
        raise CheckpointError(
            f"{folder}: none of the pre-tokenizers of llama.cpp that are known here splits text as its "
            f"tokenizer does ({json.dumps(spec.get('pre_tokenizer'))})"
        )
    if match.wrong:
        LOG.warning(
            "%s: llama.cpp's pre-tokenizer '%s' comes closest to this tokenizer, but %d of %d texts get "
            "other tokens, %r for one",
            *(folder, match.name, len(match.wrong), match.tried, match.wrong[0]),
        )
    return match.name


def _scores(tokens: list[str], types: list[int], spec: Mapping[str, Any], folder: Path) -> list[float]:
    """By id, minus the rank of the first merge that makes the token: SentencePiece merges by score."""
    allowed = {"Prepend", "Replace", "Metaspace"}
    steps = [*_steps(spec.get("normalizer")), *_steps(spec.get("pre_tokenizer"))]
    other = {kind for kind, _ in steps} - allowed
    replaced = any(
        kind == "Metaspace" or (kind == "Replace" and part.get("content") == _SPACE) for kind, part in steps
    )
    if other or not replaced or not spec["model"].get("byte_fallback"):
        raise CheckpointError(
            f"{folder}: its tokenizer is neither byte-level BPE nor SentencePiece's BPE with bytes to fall "
            "back on, the two that are written"
        )
    ranks: dict[str, int] = {}
    for rank, merge in enumerate(_merges(spec)):
        left, _, right = merge.partition(" ")
        ranks.setdefault(left + right, rank)
    last = len(ranks) + 1
    return [
        0.0 if kind not in (NORMAL, UNUSED) else -float(ranks.get(token, last))
        for token, kind in zip(tokens, types, strict=True)
    ]


def _adds_space(spec: Mapping[str, Any], folder: Path) -> bool:
    """Whether a text gets a space in front."""
    steps = [*_steps(spec.get("normalizer")), *_steps(spec.get("pre_tokenizer"))]
    if any(kind == "Prepend" for kind, _ in steps):
        return True
    if not any(kind == "Metaspace" and part.get("prepend_scheme") != "never" for kind, part in steps):
        return False
    LOG.warning(
        "%s: llama.cpp puts a space in front of every text, this tokenizer only where there is none: texts "
        "that begin with a space get one token more",
        folder,
    )
    return True


def _special(tokenizer: Any, folder: Path) -> dict[str, int | bool]:
    """Ids of special tokens, and which of them are added to a text."""
    found: dict[str, int | bool] = {}
    for ours, theirs in _IDS.items():
        if (i := getattr(tokenizer, f"{ours}_token_id", None)) is not None:
            found[f"{theirs}_token_id"] = i
    plain = tokenizer("a", add_special_tokens=False).input_ids
    whole = tokenizer("a").input_ids
    bos, eos = tokenizer.bos_token_id, tokenizer.eos_token_id
    found["add_bos_token"] = len(whole) > len(plain) and whole[0] == bos
    found["add_eos_token"] = len(whole) > len(plain) and whole[-1] == eos
    expected = [bos] * found["add_bos_token"] + plain + [eos] * found["add_eos_token"]
    if whole != expected:
        raise CheckpointError(
            f"{folder}: its tokenizer adds more to a text than bos and eos, which llama.cpp cannot"
        )
    ends = _generation_ends(folder)
    if ends and eos is None:
        found["eos_token_id"] = ends[0]
    if more := [i for i in ends if i != found.get("eos_token_id")]:
        found["eot_token_id"] = more[0]
    return found


def _generation_ends(folder: Path) -> list[int]:
    """The ids at which generation ends, as generation_config.json has them."""
    path = folder / "generation_config.json"
    ends = read_json(path).get("eos_token_id") if path.is_file() else None
    return [i for i in (ends if isinstance(ends, list) else [ends]) if isinstance(i, int)]
