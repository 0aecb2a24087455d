"""The files beside the weights that make a folder a usable model: tokenizer, chat template and the like."""

from __future__ import annotations

import logging
import shutil
from fnmatch import fnmatchcase
from pathlib import Path

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
    return any(fnmatchcase(path.name, pattern) for pattern in (SINGLE, "config.json", *COMPANIONS))


def copy_companions(source: Path, target: Path) -> list[str]:
    """Copy tokenizer, chat template, generation config and the like; returns the names copied.

    A folder without a tokenizer is a model all the same, so that is a warning.
    """
    if not any((source / name).is_file() for name in TOKENIZERS):
        LOG.warning("%s holds no tokenizer: what is written has none either; copy its files there", source)
    names = sorted({path.name for pattern in COMPANIONS for path in source.glob(pattern) if path.is_file()})
    for name in names:
        shutil.copyfile(source / name, target / name)
    if (source / MORE_TEMPLATES).is_dir():
        shutil.copytree(source / MORE_TEMPLATES, target / MORE_TEMPLATES)
    return names
