"""The plot of scaling.csv, and its table as Markdown: tokens per second by GPUs.

python benchmarks/scaling_plot.py
"""

from __future__ import annotations

import argparse
from pathlib import Path

import matplotlib
from common import RESULTS, read_csv

matplotlib.use("Agg")
import matplotlib.pyplot as plt

KINDS = {  # kind: name, colour
    "dense": ("bf16 nn.Linear", "#5f6368"),
    "native": ("ternary, weights gathered", "#e37400"),
    "ternary": ("ternary, codes gathered", "#1a73e8"),
}


def main() -> None:
    parser = argparse.ArgumentParser(description="Plot tokens per second by GPUs.")
    parser.add_argument("--csv", type=Path, default=RESULTS / "scaling.csv")
    parser.add_argument("--shape", default="3B")
    args = parser.parse_args()
    rows = [row for row in read_csv(args.csv) if row["shape"] == args.shape and not row["error"]]
    figure, axis = plt.subplots(figsize=(5, 3.6))
    print(
        "| GPUs | weights | s per step | tokens per second | of one GPU's times GPUs | GiB per GPU "
        "| GB gathered per step |"
    )
    print("|---|---|---|---|---|---|---|")
    for kind, (name, colour) in KINDS.items():
        found = {int(row["gpus"]): row for row in rows if row["kind"] == kind and row["replicate"] == "1"}
        speeds = {gpus: float(row["tokens_per_second"]) for gpus, row in sorted(found.items())}
        if not speeds:
            continue
        axis.plot(list(speeds), list(speeds.values()), "o-", color=colour, label=name)
        ideal = [gpus * speeds[1] for gpus in speeds] if 1 in speeds else []
        axis.plot(list(speeds)[: len(ideal)], ideal, ":", color=colour)
        for gpus, speed in speeds.items():
            row, share = found[gpus], f"{speed / gpus / speeds[1]:.0%}" if 1 in speeds else ""
            cells = (gpus, name, f"{float(row['ms_step']) / 1000:.2f}", f"{speed:,.0f}", share)
            cells += (row["peak_gib"], f"{float(row['gathered_mb_step']) / 1000:.1f}")
            print("|", " | ".join(map(str, cells)), "|")
    axis.set_xscale("log", base=2)
    axis.set_yscale("log", base=2)
    axis.xaxis.set_major_formatter("{x:.0f}")
    axis.yaxis.set_major_formatter("{x:,.0f}")
    axis.set_xlabel("GPUs")
    axis.set_ylabel("tokens per second")
    axis.grid(alpha=0.3)
    axis.legend(frameon=False, fontsize=8)
    figure.tight_layout()
    figure.savefig(args.csv.with_suffix(".png"), dpi=130)


if __name__ == "__main__":
    main()
