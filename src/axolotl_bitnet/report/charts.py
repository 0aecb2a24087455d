"""Which curves and grids a run gives: plain numbers, with no drawing in them."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass, field
from typing import Any

from ..model.names import natural_order
from .run_files import Run, TrainedLayer, number, row_and_column

_POINTS = 300  # more are not seen, and weigh; neighbours are averaged


@dataclass(frozen=True)
class Series:
    """One curve. Only finite values; ``lost`` counts the others."""

    label: str
    steps: list[float]
    values: list[float]
    lost: int = 0
    dashed: bool = False


@dataclass(frozen=True)
class Chart:
    """Curves that share an axis. ``unit``: "%" (values are shares, 0 to 1) or none; ``log``: its scale."""

    slug: str
    title: str
    series: list[Series]
    note: str = ""
    unit: str = ""
    log: bool = False


@dataclass(frozen=True)
class Grid:
    """A value for each layer and projection; None where a model has none. ``signed``: zero is the middle."""

    slug: str
    title: str
    rows: list[str]
    columns: list[str]
    values: list[list[float | None]]
    note: str = ""
    signed: bool = False


@dataclass(frozen=True)
class _Spec:
    slug: str
    title: str
    keys: Mapping[str, str] = field(default_factory=dict)  # in the log -> on the page
    prefix: str = ""  # every key that begins so, too
    unit: str = ""
    note: str = ""


_SPECS = (
    _Spec(
        "loss",
        "Loss",
        {
            "loss": "training",
            "eval_loss": "evaluation",
            "eval_ternary_loss": "evaluation, fully ternary",
        },
    ),
    _Spec(
        "rewards",
        "Rewards",
        {
            "rewards/margins": "margin",
            "rewards/chosen": "chosen",
            "rewards/rejected": "rejected",
            "eval_rewards/margins": "margin, evaluation",
            "reward": "mean reward",
            "eval_reward": "mean reward, evaluation",
        },
    ),
    _Spec(
        "preferred",
        "Pairs ranked as they should be",
        {"rewards/accuracies": "training", "eval_rewards/accuracies": "evaluation"},
        unit="%",
    ),
    _Spec("kl", "Distance from the reference (KL)", {"kl": "training", "eval_kl": "evaluation"}),
    _Spec(
        "flips-total",
        "Codes flipped since the start",
        {"bitnet/flips_total": "all ternary layers"},
        unit="%",
        note="Share of the ternary codes that differ from those at the start.",
    ),
    _Spec(
        "flips",
        "Codes flipped from log to log",
        {"bitnet/flips": "all ternary layers"},
        unit="%",
    ),
    _Spec("zeros", "Codes that are zero", {"bitnet/zeros": "all ternary layers"}, unit="%"),
    _Spec(
        "scale-drift",
        "Scale drift",
        {"bitnet/scale_drift": "overall"},
        prefix="bitnet/scale_drift/",
        unit="%",
        note="Change of the layers' scales since the start.",
    ),
    _Spec(
        "frozen",
        "Latents that cannot move, flips that go back",
        {"bitnet/frozen": "of the latents, cannot move", "bitnet/oscillation": "of the flips, undo the last"},
        unit="%",
    ),
    _Spec("ramp", "Quantization ramp", {"bitnet/ramp": "λ"}, note="1 is fully ternary."),
    _Spec("learning-rate", "Learning rate", {"learning_rate": "all parameters"}),
    _Spec("gradient-norm", "Gradient norm", {"grad_norm": "before clipping"}),
    _Spec(
        "throughput",
        "Trained tokens a second",
        {"tokens/train_per_sec_per_gpu": "each process"},
    ),
    _Spec(
        "memory",
        "GPU memory, GiB",
        {
            "memory/max_active (GiB)": "active",
            "memory/max_allocated (GiB)": "allocated",
            "memory/device_reserved (GiB)": "reserved",
        },
    ),
)
_ABSENT_AS_ZERO = {"throughput", "memory"}  # Axolotl logs 0 GiB where there is no GPU
_COUNTERS = {"epoch", "step", "num_tokens", "num_input_tokens_seen", "total_flos"}


def charts(run: Run) -> list[Chart]:
    """The curves that the log has data for, in the order of the page."""
    drawn = [chart for spec in _SPECS if (chart := _chart(spec, run.log)) is not None]
    return [_with_rates(chart, run.config) if chart.slug == "learning-rate" else chart for chart in drawn]


def grids(layers: Iterable[TrainedLayer]) -> list[Grid]:
    """Heat maps of layer x projection, for what is known of the layers."""
    known = list(layers)
    found = (
        _grid(known, "zeros-by-layer", "Zeros by layer", lambda layer: layer.zeros,
              "Percent of the codes that are zero in the end; of normally distributed weights, 31."),
        _grid(known, "flips-by-layer", "Flips by layer", lambda layer: layer.flips,
              "Percent of the codes that differ from those at the start."),
        _grid(known, "drift-by-layer", "Scale drift by layer", lambda layer: layer.drift,
              "Change of the scale since the start, in percent.", signed=True),
    )  # fmt: skip
    return [grid for grid in found if grid is not None]


def others(log: Iterable[Mapping[str, Any]]) -> dict[str, list[float]]:
    """Logged values that no chart shows, by key; those of a run's last line are single ones."""
    shown = {key for spec in _SPECS for key in spec.keys} | _COUNTERS
    prefixes = tuple(spec.prefix for spec in _SPECS if spec.prefix)
    found: dict[str, list[float]] = {}
    for entry in log:
        for key, value in entry.items():
            if key not in shown and not key.startswith(prefixes) and (n := number(value)) is not None:
                found.setdefault(key, []).append(n)
    return {key: values for key, values in found.items() if any(values)}


def _chart(spec: _Spec, log: list[dict[str, Any]]) -> Chart | None:
    keys = dict(spec.keys)
    if spec.prefix:
        more = {key for entry in log for key in entry if key.startswith(spec.prefix)}
        keys |= {key: key.removeprefix(spec.prefix) for key in sorted(more)}
    series = [_series(log, key, label) for key, label in keys.items()]
    series = [line for line in series if line.values or line.lost]
    if not series or (spec.slug in _ABSENT_AS_ZERO and not any(any(line.values) for line in series)):
        return None
    values = [value for line in series for value in line.values]
    log_scale = spec.slug == "loss" and bool(values) and min(values) > 0 and max(values) > 50 * min(values)
    return Chart(spec.slug, spec.title, series, spec.note, spec.unit, log_scale)


def _series(log: list[dict[str, Any]], key: str, label: str) -> Series:
    points = [
        (step, value)
        for entry in log
        if "train_runtime"
        not in entry  # what the Trainer logs after training, its memory freed, is of no step
        and (step := number(entry.get("step"))) is not None
        and (value := number(entry.get(key))) is not None
    ]
    finite = [(step, value) for step, value in points if math.isfinite(step) and math.isfinite(value)]
    thin = _thinned(finite)
    return Series(
        label,
        [step for step, _ in thin],
        [value for _, value in thin],
        len(points) - len(finite),
        dashed=key.startswith("eval_"),
    )


def _thinned(points: list[tuple[float, float]]) -> list[tuple[float, float]]:
    """At most about 300 points: the means of neighbours; the first and the last stay."""
    if len(points) <= _POINTS:
        return points
    size = math.ceil(len(points) / _POINTS)
    inner = [points[i : i + size] for i in range(1, len(points) - 1, size)]
    means = [(sum(s for s, _ in part) / len(part), sum(v for _, v in part) / len(part)) for part in inner]
    return [points[0], *means, points[-1]]


def _with_rates(chart: Chart, config: Mapping[str, Any]) -> Chart:
    """The Trainer logs its first group's rate: with `learning_rate_scope: ternary`, the dense parameters'."""
    options = config.get("bitnet")
    options = options if isinstance(options, Mapping) else {}
    multiplier = number(options.get("learning_rate_multiplier"))
    if multiplier is None or multiplier == 1:
        return chart
    if options.get("learning_rate_scope") != "ternary":
        return Chart(
            chart.slug, chart.title, chart.series, f"The config's, times the multiplier of {multiplier:g}."
        )
    if config.get("embedding_lr") or config.get("embedding_lr_scale"):
        return Chart(chart.slug, chart.title, chart.series, "Of the optimizer's first group of parameters.")
    (base,) = chart.series
    dense = Series("norms, embeddings, head", base.steps, base.values, base.lost)
    ternary = Series("ternary layers", base.steps, [v * multiplier for v in base.values], base.lost)
    return Chart(
        chart.slug, chart.title, [ternary, dense], f"Ternary layers learn {multiplier:g} times as fast."
    )


def _grid(
    layers: list[TrainedLayer],
    slug: str,
    title: str,
    value_of: Callable[[TrainedLayer], float | None],
    note: str,
    signed: bool = False,
) -> Grid | None:
    cells: dict[tuple[str, str], list[tuple[float, int]]] = {}
    rows: dict[str, None] = {}
    columns: dict[str, None] = {}
    for layer in sorted(layers, key=lambda layer: natural_order(layer.name)):
        value = value_of(layer)
        if value is None or not math.isfinite(value):
            continue
        row, column = row_and_column(layer.name)
        rows[row], columns[column] = None, None
        cells.setdefault((row, column), []).append((value, layer.weights or 1))
    if not cells:
        return None
    values = [[_mean(cells.get((row, column))) for column in columns] for row in rows]
    order = sorted(columns, key=_usual)
    at = list(columns)
    values = [[line[at.index(column)] for column in order] for line in values]
    return Grid(slug, title, list(rows), order, values, note, signed)


_USUAL = (
    "q_proj",
    "k_proj",
    "v_proj",
    "qkv_proj",
    "o_proj",
    "gate_proj",
    "up_proj",
    "gate_up_proj",
    "down_proj",
)


def _usual(column: str) -> tuple[int, str]:
    """The order in which a layer computes them."""
    return (_USUAL.index(column) if column in _USUAL else len(_USUAL), column)


def _mean(values: list[tuple[float, int]] | None) -> float | None:
    """Weighted by the layers' sizes."""
    if not values:
        return None
    return sum(value * size for value, size in values) / sum(size for _, size in values)
