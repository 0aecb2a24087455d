"""How to run what a run made: commands to copy, for each artifact."""

from __future__ import annotations

import shlex
from typing import Any

from ..checkpoint.usage import usages
from .sources import Run


def commands(run: Run) -> list[dict[str, str]]:
    """``title`` and ``text`` of what to type, for the artifacts there are, then for checking and going on."""
    found = []
    entries: Any = run.bitnet.get("artifacts")
    for name, entry in (entries if isinstance(entries, dict) else {}).items():
        path = entry.get("path") if isinstance(entry, dict) else None
        if not isinstance(path, str) or entry.get("verified") is False:
            continue
        where = str(run.folder / path)
        if ways := usages(str(name), where):
            found += [{"title": way.title, "text": way.text} for way in ways]
            check = f"axolotl bitnet verify {shlex.quote(where)}"
            found.append({"title": f"Is {name} still the model that trained?", "text": check})
    if run.bitnet:
        text = f"base_model: {run.folder}\nplugins:\n  - axolotl_bitnet.BitNetPlugin\nuse_onebitllms: true"
        found.append({"title": "Train on from the latents: in the next config", "text": text})
    return found
