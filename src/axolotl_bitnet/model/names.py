"""Names of layers in sentences."""

from __future__ import annotations

from collections.abc import Sequence


def first_few(names: Sequence[str]) -> str:
    """At most four names, and how many more there are."""
    more = f" and {len(names) - 4} more" if len(names) > 4 else ""
    return ", ".join(names[:4]) + more
