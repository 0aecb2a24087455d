"""Show a run's report in docs/: ``make example RUN=outputs/my-run``."""

from __future__ import annotations

import shutil
import subprocess
import sys
from pathlib import Path

from axolotl_bitnet.report import write_report

ROOT = Path(__file__).resolve().parents[1]
TARGET = ROOT / "docs" / "example-report"

sys.path.insert(0, str(ROOT / "tests"))
from support import browser  # noqa: E402


def main(run: str) -> None:
    TARGET.mkdir(exist_ok=True)
    shutil.copyfile(write_report(run), TARGET / "index.html")
    program = subprocess.run([ROOT / "scripts/browser.sh"], check=True, text=True, stdout=subprocess.PIPE)
    with browser.chromium(program.stdout.strip()) as chromium:
        browser.visit(chromium, TARGET / "index.html", 1120, 1180, {}, shot=TARGET / "page.png")
    for path in sorted(TARGET.iterdir()):
        print(f"{path.relative_to(ROOT)}: {path.stat().st_size / 1000:.0f} kB")


if __name__ == "__main__":
    main(sys.argv[1])
