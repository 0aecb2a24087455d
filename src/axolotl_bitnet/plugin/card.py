"""The model card: how to run each artifact, below what Axolotl wrote.

Our part of README.md is between two marks; another run replaces it.
"""

from __future__ import annotations

import re
from collections.abc import Sequence
from pathlib import Path

from huggingface_hub import ModelCard

from ..formats.registry import FORMATS
from ..formats.unplaced import KEY, note_of
from ..formats.ways_to_run import WayToRun
from ..run_folder import CARD, RUN_FILE, RUN_LOG
from ..storage.atomic import CheckpointError, read_json

_BEGIN, _END = "<!-- axolotl-bitnet: begin -->", "<!-- axolotl-bitnet: end -->"
_OURS = re.compile(rf"\n*{re.escape(_BEGIN)}.*?{re.escape(_END)}\n*", re.DOTALL)
_TAGS = ("bitnet", "ternary", "1.58-bit")
_EMPTY = "---\nlibrary_name: transformers\n---\n"


def write_card(output_dir: str | Path, artifacts: Sequence[str], repository: str | None) -> None:
    """Write how to run the artifacts into the folder's README.md, and tags into its metadata.

    Args:
        output_dir: a run's folder. Where Axolotl left no README.md, one is made.
        artifacts: names of :data:`~axolotl_bitnet.formats.registry.FORMATS`; with none, an earlier run's
            part is removed.
        repository: where they will be on the hub; None for a run that does not push.
    """
    path = Path(output_dir) / CARD
    if not artifacts and not path.exists():
        return
    written = path.read_text(encoding="utf-8") if path.exists() else _EMPTY
    card = ModelCard(_OURS.sub("\n", written), ignore_metadata_errors=True)
    if artifacts:
        card.data["tags"] = list(dict.fromkeys([*(card.data.get("tags") or []), *_TAGS]))
        section = _section(Path(output_dir), artifacts, repository)
        card.text = f"{card.text.rstrip()}\n\n{_BEGIN}\n{section}\n{_END}\n"
    card.save(path)


def _section(output_dir: Path, artifacts: Sequence[str], repository: str | None) -> str:
    """Markdown. Commands name paths below a download of the repository, or below the run's folder."""
    root = "model" if repository else output_dir.as_posix()
    lines = [
        "## Ternary (1.58-bit) weights",
        "",
        "The weights beside this file are *latents*, to be trained further: loaded as they are they make "
        "another, dense model. To run the ternary model, take one of these:",
        "",
        "| folder or file | format |",
        "|---|---|",
        *(f"| `{FORMATS[name].path}` | {FORMATS[name].title} |" for name in artifacts),
    ]
    if note := _unplaced(output_dir):
        lines += ["", f"{note}."]
    if repository:
        folders = dict.fromkeys(FORMATS[name].folder for name in artifacts)
        includes = " ".join(f"--include '{folder}/*'" for folder in folders)
        lines += ["", "```bash", f"hf download {repository} {includes} --local-dir {root}", "```"]
    for name in artifacts:
        for way in FORMATS[name].ways_to_run(f"{root}/{FORMATS[name].path}"):
            lines += ["", f"### {name}, in {way.engine} ({way.device})", "", *_way(way)]
    lines += [
        "",
        f"`{RUN_FILE}` holds the fingerprint of what trained: every code and every scale of these files can "
        "be checked against it with [axolotl-bitnet](https://pypi.org/project/axolotl-bitnet/):",
        "",
        "```bash",
        *([f"hf download {repository} --local-dir {root}"] if repository else []),
        *(f"axolotl-bitnet verify {root}/{FORMATS[name].path}" for name in artifacts),
        "```",
    ]
    return "\n".join(lines)


def _unplaced(output_dir: Path) -> str | None:
    """The run's record of tensors that it did not load."""
    try:
        return note_of(read_json(output_dir / RUN_LOG).get(KEY))
    except CheckpointError:
        return None


def _way(way: WayToRun) -> list[str]:
    note = f"{way.note} " if way.note else ""
    return [f"```{way.language}", way.text, "```", "", f"{note}Run with {way.ran}: {way.result}."]
