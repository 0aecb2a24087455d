"""The tables "Run it" of README and docs/run-it.md say what the formats say, word for word."""

from __future__ import annotations

import pytest

from axolotl_bitnet.formats.registry import FORMATS
from axolotl_bitnet.formats.ways_to_run import WayToRun
from support import ROOT

TABLES = {
    "README.md": ("runs in", "artifact", "device", "what was run", "result"),
    "docs/run-it.md": ("runs in", "artifact", "device", "command", "what was run", "result"),
}


def command(way: WayToRun) -> str:
    """What to type; of a script, the call that names the path."""
    if way.language == "bash":
        return f"`{way.text}`"
    (line,) = (line for line in way.text.splitlines() if "AutoModel" in line and "import" not in line)
    return f"`{line.partition(' = ')[2]}`"


def table(columns: tuple[str, ...]) -> str:
    """In Markdown. Formats that say the same share a row."""
    rows: dict[WayToRun, list[str]] = {}
    for name, row in FORMATS.items():
        for way in row.ways_to_run("FILE" if "." in row.path else "FOLDER"):
            rows.setdefault(way, []).append(f"`{name}`")
    lines = [f"| {' | '.join(columns)} |", "|---" * len(columns) + "|"]
    for way, names in rows.items():
        cells = {
            "runs in": way.engine,
            "artifact": ", ".join(names),
            "device": way.device,
            "command": command(way),
            "what was run": way.ran,
            "result": way.result,
        }
        lines.append(f"| {' | '.join(cells[column] for column in columns)} |")
    return "\n".join(lines) + "\n"


@pytest.mark.parametrize("page", TABLES)
def test_table_is_what_the_formats_say(page: str) -> None:
    expected = table(TABLES[page])
    assert expected in (ROOT / page).read_text(encoding="utf-8"), f"{page} lacks this table:\n{expected}"
