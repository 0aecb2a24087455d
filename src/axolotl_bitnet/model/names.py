"""Names of layers, in sentences and in order."""

from __future__ import annotations

from collections.abc import Sequence


def first_few(names: Sequence[str]) -> str:
    """At most four names, and how many more there are."""
    more = f" and {len(names) - 4} more" if len(names) > 4 else ""
    return ", ".join(names[:4]) + more


def natural_order(name: str) -> list[tuple[int, int, str]]:
    """A key to sort names of layers by: layer 10 after layer 9."""
    return [(0, int(part), "") if part.isdecimal() else (1, 0, part) for part in name.split(".")]
