"""A stored model as the command line names it: a path, or a model of the hub, with a revision if need be
(`tiiuae/Falcon-E-1B-Base@prequantized`)."""

from __future__ import annotations

import re
from pathlib import Path
from typing import Any

import click

_NAME = re.compile(r"(?P<name>[\w.-]+/[\w.-]+)(@(?P<revision>[\w./-]+))?")
_FILES = ["*.safetensors", "*.json", "*.jinja", "*.model", "*.txt", "*.tiktoken", "*.py", "*.gguf"]


class Source(click.ParamType):  # type: ignore[type-arg]
    """A path that exists, or else the hub's copy of a model in its cache; pickle files are not fetched."""

    name = "source"

    def convert(self, value: Any, param: click.Parameter | None, context: click.Context | None) -> Path:
        path = Path(value)
        if path.exists():
            return path
        match = _NAME.fullmatch(str(value))
        if match is None or path.parent.exists():  # a path that was mistyped is not asked for
            self.fail(f"Path '{value}' does not exist.", param, context)
        from huggingface_hub import snapshot_download

        try:
            return Path(snapshot_download(match["name"], revision=match["revision"], allow_patterns=_FILES))
        except Exception as error:  # offline, unknown, gated, a network that fails
            first = (str(error).strip().splitlines() or [type(error).__name__])[0]
            self.fail(f"'{value}' is no path here, and the hub gave no such model: {first}", param, context)


SOURCE = Source()


def in_hub_cache(path: Path) -> bool:
    """Whether a path is in the hub's cache, where nothing of ours belongs."""
    from huggingface_hub.constants import HF_HUB_CACHE

    return path.resolve().is_relative_to(Path(HF_HUB_CACHE).resolve())
