"""Which settings the study runs: stages, each decided from the results of those before it.

A full factorial of the factors would be some thousand runs. So rates and latents first, against each other;
then every other factor at the best rate and the better of its neighbours; then more seeds where one seed
cannot tell; then SFT and DPO of what came out best.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable
from dataclasses import asdict, fields, replace
from typing import Any

from study_train import Setting

RATES = (1e-5, 5e-5, 2e-4, 5e-4, 1e-3, 2e-3, 5e-3)
LATENTS = ("float32", "bfloat16", "bfloat16-sr")
SEEDS = (2, 3)
Rows = list[dict[str, Any]]


def key(row: dict[str, Any] | Setting) -> tuple[str, ...]:
    """A setting as it is in the results' columns."""
    values = asdict(row) if isinstance(row, Setting) else row
    return tuple(str(values[field.name]) for field in fields(Setting))


def score(rows: Rows, setting: Setting) -> float:
    """Eval loss of the first seed; infinite if it did not run, or diverged."""
    wanted = key(replace(setting, seed=1))
    losses = [float(row["eval_loss"] or math.inf) for row in rows if key(row) == wanted and not row["error"]]
    return losses[-1] if losses and math.isfinite(losses[-1]) else math.inf


def by_rate(rows: Rows, setting: Setting, rates: Iterable[float] = RATES) -> list[Setting]:
    """The setting at every rate, best first; without results, the middle first."""
    settings = [replace(setting, lr=rate) for rate in rates]
    return sorted(settings, key=lambda each: (score(rows, each), _from_middle(each.lr)))


def best_and_neighbour(rows: Rows, setting: Setting) -> list[Setting]:
    """The setting at its best rate, and at the better one of those beside it."""
    best = by_rate(rows, setting)[0]
    place = RATES.index(best.lr)
    return [best, by_rate(rows, setting, RATES[max(0, place - 1) : place] + RATES[place + 1 : place + 2])[0]]


def _from_middle(rate: float) -> float:
    return abs(math.log(rate / 7e-4))


def rates(rows: Rows, base: Setting) -> list[Setting]:
    return [
        replace(base, latents=latents, lr=rate)
        for rate in sorted(RATES, key=_from_middle)
        for latents in LATENTS
    ]


def dense(rows: Rows, base: Setting) -> list[Setting]:
    twin = replace(base, model="dense")
    order = (2e-4, 5e-4, 1e-3, 5e-5, 2e-3, 1e-5)
    found = [replace(twin, lr=rate) for rate in order]
    return found + [replace(twin, lr=rate, latents="bfloat16") for rate in (2e-4, 1e-5, 5e-5, 1e-3)]


def variants(setting: Setting) -> list[Setting]:
    """The other factors, one at a time."""
    return [
        replace(setting, ramp=0.1),
        replace(setting, ramp=0.5),
        replace(setting, scope="ternary"),
        replace(setting, weight_decay=0.0),
        replace(setting, weight_decay=0.1),
        replace(setting, optimizer="adamw-8bit"),
    ]


def factors(rows: Rows, base: Setting) -> list[Setting]:
    return [variant for setting in best_and_neighbour(rows, base) for variant in variants(setting)]


def seeds(rows: Rows, base: Setting) -> list[Setting]:
    """Two more seeds of the best of each kind, and of the float32 neighbour."""
    kinds = best_and_neighbour(rows, base)
    kinds += [by_rate(rows, variant)[0] for variant in variants(base)]
    kinds += [by_rate(rows, replace(base, latents=latents))[0] for latents in LATENTS[1:]]
    kinds += [by_rate(rows, replace(base, model="dense"))[0]]
    return [replace(kind, seed=seed) for seed in SEEDS for kind in kinds if score(rows, kind) < math.inf]


def _continued(task: str, rates: tuple[float, ...], steps: int) -> Callable[[Rows, Setting], list[Setting]]:
    def stage(rows: Rows, base: Setting) -> list[Setting]:
        start = replace(base, task=task, start="trained", steps=min(steps, base.steps))
        found = [
            replace(start, lr=rate, latents=latents) for rate in rates for latents in ("float32", "bfloat16")
        ]
        return found + [replace(start, model="dense", lr=rate) for rate in rates]

    return stage


def trained(rows: Rows, base: Setting) -> list[Setting]:
    """What SFT and DPO start from: the best ternary and the best dense run again, their weights kept."""
    return [by_rate(rows, replace(base, model=model))[0] for model in ("ternary", "dense")]


sft = _continued("sft", (5e-4, 5e-5, 2e-4, 1e-5, 1e-3), 200)
dpo = _continued("dpo", (1e-5, 5e-5, 2e-6, 2e-4), 100)


def low_memory(rows: Rows, base: Setting) -> list[Setting]:
    """Float32 latents against bfloat16 ones with stochastic rounding and 8-bit moments: three seeds of a
    dense base with a ramp, and of SFT of a ternary one."""
    tasks = [
        replace(base, ramp=0.1, lr=1e-3),
        replace(base, task="sft", start="trained", steps=min(200, base.steps)),
    ]
    low = dict(latents="bfloat16-sr", optimizer="adamw-8bit")
    return [
        replace(task, seed=seed, **state) for seed in (1, *SEEDS) for task in tasks for state in ({}, low)
    ]


STAGES: dict[str, Callable[[Rows, Setting], list[Setting]]] = {
    "rates": rates,
    "dense": dense,
    "factors": factors,
    "seeds": seeds,
    "low_memory": low_memory,
    "sft": sft,
    "dpo": dpo,
}
