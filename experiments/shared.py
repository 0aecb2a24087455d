"""What every experiment uses: the benchmarks' helpers, and a folder of results of its own."""

from __future__ import annotations

import sys
from pathlib import Path

ROOT = Path(__file__).resolve().parents[1]
sys.path.append(str(ROOT / "benchmarks"))

from common import append_csv, free, machine, read_csv, write_csv  # noqa: E402

RESULTS = ROOT / "experiments" / "results"

__all__ = ["RESULTS", "ROOT", "append_csv", "free", "machine", "read_csv", "write_csv"]
