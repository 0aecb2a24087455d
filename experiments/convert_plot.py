"""The study of conversion: the curve against tokens as a plot, its tables as Markdown on standard output.

python experiments/convert_plot.py
"""

from __future__ import annotations

import statistics
from typing import Any

import matplotlib
import numpy as np
from shared import RESULTS, read_csv
from study_plot import save

matplotlib.use("Agg")
import matplotlib.pyplot as plt

Rows = list[dict[str, str]]
NAMES = {
    "docs-dense": ("dense, fine-tuned", "#5f6368"),
    "docs-ramp": ("ternary, ramp alone", "#e37400"),
    "docs-half-4k": ("ternary, base as teacher, 4k tokens a step", "#1a73e8"),
    "docs-half-2k": ("the same, 2k tokens a step", "#8ab4f8"),
    "docs-tuned-8k": ("ternary, fine-tuned teacher", "#188038"),
}


def grouped(rows: Rows) -> dict[str, Rows]:
    """Rows of one recipe with different seeds, by its name."""
    found: dict[str, Rows] = {}
    for row in rows:
        found.setdefault(row["run"].partition("@")[0], []).append(row)
    return found


def values(rows: Rows, column: str) -> list[float]:
    return [float(row[column]) for row in rows if row[column]]


def recipes_table(rows: Rows) -> str:
    lines = ["| run | held out | seeds | accuracy | agreement |", "|---|---|---|---|---|"]
    groups = sorted(grouped(rows).items(), key=lambda item: statistics.mean(values(item[1], "held_out")))
    for name, members in groups:
        losses = values(members, "held_out")
        spread = f" ({min(losses):.3f} to {max(losses):.3f})" if losses[1:] else ""
        shares = (f"{statistics.mean(values(members, key)):.1%}" for key in ("accuracy", "agreement"))
        lines.append(
            f"| {name} | {statistics.mean(losses):.3f}{spread} | {len(losses)} | {' | '.join(shares)} |"
        )
    return "\n".join(lines)


def curve_of(points: Rows, run: str, column: str) -> tuple[list[float], list[float]]:
    rows = [row for row in points if row["run"] == run and row[column]]
    return [float(row["tokens"]) / 1e6 for row in rows], [float(row[column]) for row in rows]


def plot_tokens(points: Rows) -> None:
    figure, axes = plt.subplots(1, 4, figsize=(16, 3.8))
    columns = {
        "held_out": "held-out loss",
        "written": "loss on what the dense model wrote",
        "accuracy": "next-token accuracy, held out",
        "agreement": "agreement with the dense model",
    }
    for axis, (column, label) in zip(axes, columns.items(), strict=True):
        for run, (name, colour) in NAMES.items():
            tokens, found = curve_of(points, run, column)
            shown = [
                i for i, each in enumerate(tokens) if each > 3 or run == "docs-dense"
            ]  # off the scale before
            if shown:
                axis.plot(
                    [tokens[i] for i in shown], [found[i] for i in shown], ".-", color=colour, label=name
                )
        axis.set_xlabel("million tokens")
        axis.set_ylabel(label)
        axis.grid(alpha=0.3)
    axes[3].legend(fontsize=8, loc="upper right")
    save(figure, "convert-tokens.png")


def tokens_table(points: Rows) -> str:
    columns = ("held_out", "written", "accuracy", "agreement")
    head = ["tokens, M", *(f"{run}: {column}" for column in columns for run in NAMES)]
    cells: dict[float, dict[str, str]] = {}
    for run in NAMES:
        for column in columns:
            for tokens, value in zip(*curve_of(points, run, column), strict=True):
                shown = f"{value:.1%}" if column in columns[2:] else f"{value:.3f}"
                cells.setdefault(round(tokens, 1), {})[f"{run}: {column}"] = shown
    lines = ["| " + " | ".join(head) + " |", "|---" * len(head) + "|"]
    lines += [
        "| " + " | ".join([f"{at:g}", *(row.get(each, "") for each in head[1:])]) + " |"
        for at, row in sorted(cells.items())
    ]
    return "\n".join(lines)


PAIRS = (("4m-dense", "4m-tuned"), ("docs-dense-12m", "docs-tuned-12m"), ("docs-dense", "docs-tuned-25m"))
GAPS = (0.3, 0.2, 0.1)


def fit(tokens: list[float], gaps: list[float]) -> tuple[float, float]:
    """a and b of ``gap = a tokens^-b``, least squares in logarithms."""
    x, y = np.log(tokens), np.log(gaps)
    slope, level = np.polyfit(x, y, 1)
    return float(np.exp(level)), float(-slope)


def gap_table(rows: Rows) -> str:
    """Gaps of whole runs, each with a schedule of its own and the dense model after as many tokens as its
    teacher; the law through them, drawn; and the tokens it gives for smaller gaps."""
    losses = {row["run"]: row for row in rows}
    pairs = [(losses[dense], losses[ternary]) for dense, ternary in PAIRS]
    tokens = [float(ternary["tokens"]) / 1e6 for _, ternary in pairs]
    gaps = [float(ternary["held_out"]) - float(dense["held_out"]) for dense, ternary in pairs]
    a, b = fit(tokens, gaps)
    wanted = [(a / gap) ** (1 / b) for gap in GAPS]
    figure, axis = plt.subplots(figsize=(5.5, 3.8))
    axis.loglog(tokens, gaps, "o", color="#188038", label="measured: runs of their own")
    reach = np.geomspace(tokens[0], max(*wanted, tokens[-1]), 50)
    inside = reach <= tokens[-1]
    axis.loglog(
        reach[inside], a * reach[inside] ** -b, "-", color="#188038", label=f"{a:.2f} x tokens^-{b:.2f}"
    )
    axis.loglog(reach[~inside], a * reach[~inside] ** -b, ":", color="#188038", label="extrapolated")
    axis.set_xticks([4, 10, 25, 50, 100, 170], labels=["4", "10", "25", "50", "100", "170"])
    axis.set_yticks([0.1, 0.2, 0.3, 0.4, 0.6], labels=["0.1", "0.2", "0.3", "0.4", "0.6"])
    axis.set_xlabel("million tokens, read by each of the two models")
    axis.set_ylabel("gap to the dense model, nats")
    axis.grid(alpha=0.3, which="both")
    axis.legend(fontsize=8)
    save(figure, "convert-gap.png")
    lines = ["| million tokens | dense | ternary | gap | the law |", "|---|---|---|---|---|"]
    for at, gap, (dense, ternary) in zip(tokens, gaps, pairs, strict=True):
        one, other = (float(row["held_out"]) for row in (dense, ternary))
        lines.append(f"| {at:.1f} | {one:.3f} | {other:.3f} | {gap:.3f} | {a * at**-b:.3f} |")
    lines += [f"gap {gap}: {at:.0f} million tokens by the law" for gap, at in zip(GAPS, wanted, strict=True)]
    return "\n".join(lines)


def read(name: str) -> list[dict[str, Any]]:
    rows = read_csv(RESULTS / name)
    return [row for row in rows if not row.get("error")]


def main() -> None:
    recipes = read("convert.csv")
    print(recipes_table(recipes))
    points = read("convert_tokens_curve.csv")
    plot_tokens(points)
    print(tokens_table(points))
    print(gap_table([*read("convert_candidates.csv"), *read("convert_pairs.csv")]))


if __name__ == "__main__":
    main()
