"""Which cases of a parametrized test the quick run takes."""

from __future__ import annotations

from collections.abc import Iterable
from typing import Any

import pytest


def slow_but(quick: int, cases: Iterable[Any]) -> list[Any]:
    """The cases, all but the first ``quick`` marked slow: in every full run, and not in the quick one."""
    return [
        case
        if index < quick
        else pytest.param(*(case if isinstance(case, tuple) else (case,)), marks=pytest.mark.slow)
        for index, case in enumerate(cases)
    ]
