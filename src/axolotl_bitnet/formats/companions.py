"""The files beside the weights that make a folder a usable model: tokenizer, chat template and the like."""

from __future__ import annotations

import logging
import re
import shutil
from collections.abc import Mapping
from fnmatch import fnmatchcase
from pathlib import Path
from typing import Any

from ..storage.atomic import CheckpointError, read_json
from ..storage.safetensors_stream import SINGLE

LOG = logging.getLogger(__name__)


COMPANIONS = (
    "tokenizer*",
    "special_tokens_map.json",
    "added_tokens.json",
    "vocab.*",
    "merges.txt",
    "*.tiktoken",
    "*.model",
    "tekken.json",
    "chat_template*",
    "generation_config.json",
    "*processor_config.json",
)
"""Files beside the weights that make a folder a usable model (glob patterns, files only)."""


TOKENIZERS = ("tokenizer.json", "tokenizer.model", "tokenizer_config.json", "vocab.json", "tekken.json")
"""One of them is in every folder with a tokenizer."""


MORE_TEMPLATES = "additional_chat_templates"
"""Folder beside them, where a tokenizer has several chat templates."""


def written_here(path: Path) -> bool:
    """Whether an entry of a folder has a name that this package's writers of folders give."""
    if path.is_dir() and not path.is_symlink():
        return path.name == MORE_TEMPLATES
    known = any(fnmatchcase(path.name, pattern) for pattern in (SINGLE, "config.json", *COMPANIONS))
    return known or path.name in code_files(path.parent, _read(path.parent / "config.json"))


def copy_companions(source: Path, target: Path, config: Mapping[str, Any]) -> list[str]:
    """Copy tokenizer, chat template, generation config and the like; returns the names copied.

    A folder without a tokenizer is still a model, so that is a warning.
    """
    if not any((source / name).is_file() for name in TOKENIZERS):
        LOG.warning("%s holds no tokenizer, so the output has none: copy the tokenizer's files there", source)
    beside = {path.name for pattern in COMPANIONS for path in source.glob(pattern) if path.is_file()}
    names = sorted(beside | set(code_files(source, config)))
    for name in names:
        shutil.copyfile(source / name, target / name)
    if (source / MORE_TEMPLATES).is_dir():
        shutil.copytree(source / MORE_TEMPLATES, target / MORE_TEMPLATES)
    return names


def token_count(folder: Path) -> int | None:
    """One more than the largest id in a folder's tokenizer.json; None if it has none that can be read."""
    found = _read(folder / "tokenizer.json")
    model, added = found.get("model"), found.get("added_tokens")
    vocabulary = model.get("vocab") if isinstance(model, dict) else None
    ids = list(vocabulary.values()) if isinstance(vocabulary, dict) else []
    ids += [token.get("id") for token in added if isinstance(token, dict)] if isinstance(added, list) else []
    return 1 + max((i for i in ids if isinstance(i, int)), default=-1) or None


_MODULE = re.compile(r"(\w+)\.\w+")  # of this folder: no path, no other repository ("name--module.Class")
_RELATIVE = re.compile(r"^\s*(?:from\s+\.(\w+)\s+import|from\s+\.\s+import\s+(\w+))", re.MULTILINE)


def code_files(folder: Path, config: Mapping[str, Any]) -> list[str]:
    """The ``*.py`` files in a folder that ``auto_map`` names in its config.json, ``config``, or in its
    tokenizer's, and those that they import:
    code of the model's own, without which it cannot be loaded. Plain names in the folder only."""
    waiting = [*_named(config), *_named(_read(folder / "tokenizer_config.json"))]
    found: set[str] = set()
    while waiting:
        name = waiting.pop()
        path = folder / f"{name}.py"
        if path.name in found or not path.is_file():
            continue
        found.add(path.name)
        text = path.read_text(encoding="utf-8", errors="replace")
        waiting += [one or other for one, other in _RELATIVE.findall(text)]
    return sorted(found)


def needs_code(config: Mapping[str, Any]) -> bool:
    """Whether a model can only be loaded with code that comes with it."""
    from transformers import CONFIG_MAPPING

    return bool(config.get("auto_map")) and config.get("model_type") not in CONFIG_MAPPING


def _read(path: Path) -> Mapping[str, Any]:
    try:
        return read_json(path) if path.is_file() else {}
    except CheckpointError:
        return {}


def _named(config: Mapping[str, Any]) -> list[str]:
    entries = config.get("auto_map")
    values = entries.values() if isinstance(entries, dict) else [entries]
    flat = [each for value in values for each in (value if isinstance(value, list) else [value])]
    return [m[1] for each in flat if isinstance(each, str) and (m := _MODULE.fullmatch(each))]
