"""The demo in a few readable lines: train, pack, verify, ask. The full logs are in outputs/."""

from __future__ import annotations

import re
import subprocess
import sys
import time
from pathlib import Path

TINY = Path("examples/falcon-e/tiny")
OUTPUTS = Path("outputs")


def train(recipe: str, title: str, keys: list[str]) -> None:
    """Run one recipe, its output into a file, and print how the logged values began and ended."""
    log = OUTPUTS / f"tiny-{recipe}.log"
    command = ["axolotl", "train", str(TINY / f"{recipe}.yaml"), "--launcher", "python"]
    print(f"\n{title}\n  {' '.join(command)}    (log: {log})", flush=True)
    start = time.monotonic()
    with log.open("w") as file:
        code = subprocess.run(command, stdout=file, stderr=subprocess.STDOUT).returncode
    text = log.read_text(errors="replace")
    if code:
        sys.exit(f"{text[-3000:]}\naxolotl ended with status {code}; the whole log is {log}")
    for key in keys:
        values = re.findall(rf"'{key}': '?(-?[\d.e+-]+)", text)
        print(f"  {key}: {values[0]} -> {values[-1]}")
    for line in re.findall(r"\[axolotl\.bitnet\] (packed: [\d.]+ .iB of .*|verified: .*|NOT .*)", text):
        print(f"  {line}")
    print(f"  {time.monotonic() - start:.0f} s", flush=True)


def ask(model: Path, *flags: str) -> None:
    print(f"\nPlain transformers loads {model} and answers questions it has never seen", flush=True)
    command = [sys.executable, str(TINY / "ask.py"), str(model), *flags]
    result = subprocess.run(command, capture_output=True, text=True)
    print("".join(f"  {line}\n" for line in result.stdout.splitlines()), end="", flush=True)
    if result.returncode:
        sys.exit(f"{result.stderr[-2000:]}\n{' '.join(command)} ended with status {result.returncode}")


def main() -> None:
    OUTPUTS.mkdir(exist_ok=True)
    train("sft", "1. Supervised fine-tuning: a ternary model learns to add, from random weights", ["loss"])
    ask(OUTPUTS / "tiny-sft" / "packed", "--min", "0.9")
    train("dpo", "2. Preference optimization of the result, against a ternary reference", ["rewards/margins"])
    ask(OUTPUTS / "tiny-dpo" / "packed", "--min", "0.9")
    print("\nDone. See outputs/tiny-dpo (latents), outputs/tiny-dpo/packed (2 bits per weight).")


if __name__ == "__main__":
    main()
