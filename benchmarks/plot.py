"""The plot of the whole step: time relative to the best bfloat16 nn.Linear of its row.

python benchmarks/plot.py
"""

from __future__ import annotations

import csv

import matplotlib
from common import RESULTS

matplotlib.use("Agg")
import matplotlib.pyplot as plt

COLOURS = {
    "nn.Linear": "#9aa0a6",
    "axolotl-bitnet": "#1a73e8",
    "onebitllms": "#e37400",
    "AutoBitLinear": "#9334e6",
    "torchao": "#188038",
}
TOP = 2.0  # higher bars are cut, and show their value
HELPS = {"none": "no help", "liger": "Liger", "compile": "torch.compile"}


def main() -> None:
    with (RESULTS / "train_step.csv").open() as file:
        steps = [step for step in csv.DictReader(file) if step["latents"] == "bfloat16"]
    rows = list(dict.fromkeys(step["row"] for step in steps))
    figure, axes = plt.subplots(1, len(rows), figsize=(4 * len(rows), 3.6), sharey=True, squeeze=False)
    for axis, row in zip(axes[0], rows, strict=True):
        times = {(step["help"], step["peer"]): float(step["ms"]) for step in steps if step["row"] == row}
        best = min(ms for (_, peer), ms in times.items() if peer == "nn.Linear")
        for place, help in enumerate(HELPS):
            peers = [peer for peer in COLOURS if (help, peer) in times]
            for index, peer in enumerate(peers):
                height = times[help, peer] / best
                left = place + index * 0.16 - 0.32
                axis.bar(left, height, 0.15, color=COLOURS[peer])
                if height > TOP:
                    axis.text(left, TOP, f"{height:.1f}", ha="center", va="bottom", fontsize=7)
        axis.axhline(1, color="black", linewidth=0.8)
        axis.set_title(row, pad=12)
        axis.set_xticks(range(len(HELPS)), HELPS.values())
        axis.set_ylim(0, TOP)
    axes[0][0].set_ylabel("time of a step / best bf16 nn.Linear")
    patches = [plt.Rectangle((0, 0), 1, 1, color=colour) for colour in COLOURS.values()]
    figure.legend(patches, COLOURS, ncols=len(COLOURS), loc="lower center")
    figure.tight_layout(rect=(0, 0.08, 1, 1))
    figure.savefig(RESULTS / "train_step.png", dpi=110)


if __name__ == "__main__":
    main()
