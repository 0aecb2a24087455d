"""The study's plots, and its tables as Markdown on the standard output.

python experiments/study_plot.py
"""

from __future__ import annotations

import argparse
import math
import statistics
from collections.abc import Callable, Iterable
from pathlib import Path
from typing import Any

import matplotlib
from shared import RESULTS, read_csv

matplotlib.use("Agg")
import matplotlib.pyplot as plt

IMAGES = Path(__file__).parents[1] / "docs" / "images"
KINDS = {  # model, latents: name, colour
    ("ternary", "float32"): ("ternary, float32 latents", "#1a73e8"),
    ("ternary", "bfloat16-sr"): ("bfloat16, stochastic rounding", "#188038"),
    ("ternary", "bfloat16"): ("bfloat16 latents", "#e37400"),
    ("dense", "float32"): ("dense, float32 weights", "#5f6368"),
    ("dense", "bfloat16"): ("dense, bfloat16 weights", "#bdc1c6"),
}
PLAIN = {"optimizer": "adamw", "scope": "all", "weight_decay": "0.01", "ramp": "0.0"}
Rows = list[dict[str, str]]


def where(rows: Rows, **wanted: str) -> Rows:
    return [row for row in rows if all(row[name] == value for name, value in wanted.items())]


def by_rate(rows: Rows, column: str) -> dict[float, list[float]]:
    """Finite values of the seeds, by rate."""
    found: dict[float, list[float]] = {}
    for row in rows:
        value = float(row[column] or math.nan)
        if math.isfinite(value):
            found.setdefault(float(row["lr"]), []).append(value)
    return dict(sorted(found.items()))


def lines(axis: Any, rows: Rows, task: str, column: str, kinds: Iterable[tuple[str, str]] = KINDS) -> None:
    """A line a kind over the rates: the mean of the seeds, which are dots."""
    for model, latents in kinds:
        values = by_rate(where(rows, task=task, model=model, latents=latents, **PLAIN), column)
        if not values:
            continue
        name, colour = KINDS[model, latents]
        axis.plot(list(values), [statistics.mean(each) for each in values.values()], color=colour, label=name)
        for rate, each in values.items():
            axis.plot([rate] * len(each), each, ".", color=colour)
    axis.set_xscale("log")
    axis.set_xlabel("learning rate")
    axis.grid(alpha=0.3)


def save(figure: Any, name: str) -> None:
    IMAGES.mkdir(parents=True, exist_ok=True)
    figure.tight_layout()
    figure.savefig(IMAGES / name, dpi=90)
    plt.close(figure)


def plot_rates(rows: Rows, curves: Rows) -> None:
    figure, (left, right) = plt.subplots(1, 2, figsize=(10, 3.8))
    lines(left, rows, "lm", "eval_loss")
    left.set_ylabel("held-out loss after the run")
    left.set_ylim(top=8)
    left.legend(fontsize=8)
    lines(right, rows, "lm", "flips_start", [kind for kind in KINDS if kind[0] == "ternary"])
    right.set_ylabel("codes that differ from the start's")
    right.set_yscale("symlog", linthresh=1e-5)
    right.set_ylim(-2e-6, 0.3)  # none flipped is a value, too
    save(figure, "study-rates.png")


def plot_curves(rows: Rows, curves: Rows) -> None:
    """Loss and flips in the course of training, each kind at its best rate, and the ramps."""
    figure, (left, right) = plt.subplots(1, 2, figsize=(10, 3.8))
    shown = [(KINDS[kind], dict(zip(("model", "latents"), kind, strict=True)) | PLAIN) for kind in KINDS]
    for ramp, colour in (("0.1", "#9334e6"), ("0.5", "#d01884")):
        wanted = {"model": "ternary", "latents": "float32"} | PLAIN | {"ramp": ramp}
        shown.append(((f"ternary, ramp over {float(ramp):.0%}", colour), wanted))
    for (name, colour), wanted in shown:
        best = by_rate(where(rows, task="lm", seed="1", **wanted), "eval_loss")
        if not best:
            continue
        rate = min(best, key=lambda each: best[each])
        run = [row for row in where(curves, task="lm", seed="1", **wanted) if float(row["lr"]) == rate]
        steps = [int(row["step"]) for row in run]
        left.plot(steps, [float(row["loss"]) for row in run], color=colour, label=f"{name}, {rate:g}")
        if wanted["model"] == "ternary":
            right.plot(steps, [float(row["flips_last"]) for row in run], color=colour)
    left.set_ylabel("training loss, means of 20 steps")
    left.set_ylim(top=7)
    left.legend(fontsize=7)
    right.set_ylabel("codes flipped in 20 steps")
    right.set_yscale("log")
    for axis in (left, right):
        axis.set_xlabel("step")
        axis.grid(alpha=0.3)
    save(figure, "study-curves.png")


FACTORS: dict[str, dict[str, str]] = {
    "as it is": {},
    "ramp 10 %": {"ramp": "0.1"},
    "ramp 50 %": {"ramp": "0.5"},
    "scope ternary": {"scope": "ternary"},
    "decay 0": {"weight_decay": "0.0"},
    "decay 0.1": {"weight_decay": "0.1"},
    "8-bit AdamW": {"optimizer": "adamw-8bit"},
}


def factor_values(rows: Rows) -> dict[tuple[str, float], list[float]]:
    """Eval losses of the seeds, by factor and rate."""
    found = {}
    for name, change in FACTORS.items():
        run = where(rows, task="lm", model="ternary", latents="float32", **(PLAIN | change))
        for rate, values in by_rate(run, "eval_loss").items():
            found[name, rate] = values
    tested = {rate for name, rate in found if name != "as it is"}
    return {key: values for key, values in found.items() if key[1] in tested}


def plot_factors(rows: Rows, curves: Rows) -> None:
    figure, axis = plt.subplots(figsize=(7, 3.6))
    values = factor_values(rows)
    colours = ("#1a73e8", "#e37400", "#188038")
    rates = sorted({rate for _, rate in values})
    names = list(FACTORS)
    for colour, rate in zip(colours, rates, strict=False):
        for name in names:
            seeds = values.get((name, rate), [])
            place = names.index(name) + 0.15 * (rates.index(rate) - (len(rates) - 1) / 2)
            axis.plot(seeds, [place] * len(seeds), "o", color=colour, markersize=5)
        axis.plot([], [], "o", color=colour, label=f"rate {rate:g}")
    axis.set_yticks(range(len(names)), names)
    axis.invert_yaxis()
    axis.set_xlabel("held-out loss, a dot a seed")
    axis.grid(alpha=0.3)
    axis.legend(fontsize=8)
    save(figure, "study-factors.png")


def plot_continued(rows: Rows, curves: Rows) -> None:
    figure, axes = plt.subplots(1, 3, figsize=(12, 3.6))
    for axis, task, column, label in (
        (axes[0], "sft", "eval_loss", "SFT: held-out loss"),
        (axes[1], "dpo", "accuracy", "DPO: held-out pairs right"),
        (axes[2], "dpo", "margin", "DPO: held-out reward margin"),
    ):
        lines(axis, rows, task, column)
        axis.set_ylabel(label)
    axes[0].legend(fontsize=7)
    save(figure, "study-continued.png")


def table(rows: Rows, task: str, columns: dict[str, Callable[[float], str]]) -> str:
    """Means over the seeds, a line per setting."""
    names = ("model", "latents", "optimizer", "scope", "weight_decay", "ramp")
    groups: dict[tuple[str, ...], Rows] = {}
    for row in where(rows, task=task):
        groups.setdefault((*(row[name] for name in names), row["lr"]), []).append(row)
    head = [*names, "lr", "seeds", *columns]
    out = ["| " + " | ".join(head) + " |", "|---" * len(head) + "|"]
    for group, members in sorted(groups.items(), key=lambda item: (*item[0][:-1], float(item[0][-1]))):
        cells = []
        for column, show in columns.items():
            values = [float(row[column] or math.nan) for row in members]
            spread = (
                f" ({min(values):.3f} to {max(values):.3f})" if column == "eval_loss" and values[1:] else ""
            )
            cells.append(show(statistics.mean(values)) + spread)
        out.append(
            "| " + " | ".join((*group[:-1], f"{float(group[-1]):g}", str(len(members)), *cells)) + " |"
        )
    return "\n".join(out)


def main() -> None:
    parser = argparse.ArgumentParser(description="The study's plots and tables.")
    parser.add_argument("--results", type=Path, default=RESULTS / "study.csv")
    path = parser.parse_args().results
    rows = [row for row in read_csv(path) if not row["error"]]
    curves = read_csv(path.with_name(f"{path.stem}_curves.csv"))
    for plot in (plot_rates, plot_curves, plot_factors, plot_continued):
        plot(rows, curves)
    loss, share = "{:.3f}".format, "{:.3%}".format
    common = {"eval_loss": loss, "flips_start": share, "flips_quarter": share, "peak_gib": "{:.1f}".format}
    print(table(rows, "lm", common | {"state_gib": "{:.2f}".format, "ms_step": "{:.0f}".format}))
    print(table(rows, "sft", {"eval_before": loss} | common))
    print(table(rows, "dpo", common | {"accuracy": share, "margin": loss}))


if __name__ == "__main__":
    main()
