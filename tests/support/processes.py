"""Python in a process of its own, which imports this checkout's package and the helpers of the tests."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

from support import ROOT


def environment(**changes: str) -> dict[str, str]:
    """This process's, with the package and the tests first on the path."""
    paths = (str(ROOT / "src"), str(ROOT / "tests"), os.environ.get("PYTHONPATH"))
    return os.environ | {"PYTHONPATH": os.pathsep.join(filter(None, paths))} | changes


def python(
    *arguments: str | Path, check: bool = True, timeout: float = 600, **changes: str
) -> subprocess.CompletedProcess[str]:
    """``python *arguments`` to its end, with ``changes`` in its environment; what it wrote is text.

    Raises:
        AssertionError: it failed. The message holds the end of what it wrote.
    """
    command = [sys.executable, *map(str, arguments)]
    done = subprocess.run(
        command, env=environment(**changes), capture_output=True, text=True, timeout=timeout
    )
    assert not check or done.returncode == 0, f"{done.stdout[-20_000:]}\n{done.stderr[-10_000:]}"
    return done
