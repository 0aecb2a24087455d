"""The page: one HTML file with its plots in it, nothing to load, no script; PNGs of the plots beside it."""

from __future__ import annotations

import math
from collections.abc import Iterable
from importlib.util import find_spec
from pathlib import Path
from typing import Any

from ..model.names import natural_order
from ..run_folder import PAGE, REPORT
from ..storage.atomic import whole_folder
from .charts import Chart, Grid, Series, charts, grids, others
from .draw import COLOURS, png, show, svg
from .facts import artifacts, commands, facts, summary, tiles, unloaded, verdict
from .run_files import ReportError, Run, TrainedLayer, read_run

_NEEDED = {"jinja2": "jinja2", "matplotlib": "matplotlib", "yaml": "PyYAML"}


def write_report(output_dir: str | Path) -> Path:
    """Write what is known of a run, finished or not, into ``output_dir/report``, replacing an earlier report.

    Read are ``run.json``, ``bitnet.json``, ``monitor.json`` and the log of the last checkpoint, whichever are
    there; what is missing is left out, and the page lists it.

    Returns:
        The page, ``index.html``: self-contained. The plots are beside it as PNG files, too.

    Raises:
        ReportError: the folder holds no run, or matplotlib is not installed.
        CheckpointError: the report cannot be written, or its folder holds something else; what was there is
            still there.
    """
    missing = [package for module, package in _NEEDED.items() if find_spec(module) is None]
    if missing:
        raise ReportError(
            f"a report needs {' and '.join(missing)}, which {'is' if len(missing) == 1 else 'are'} not "
            f"installed: pip install 'axolotl-bitnet[report]', then: axolotl-bitnet report {output_dir}"
        )
    run = read_run(output_dir)
    target = run.folder / REPORT
    with whole_folder(target, _of_a_report) as work:
        (work / PAGE).write_text(render(run, work), encoding="utf-8")
    return target / PAGE


def _of_a_report(path: Path) -> bool:
    return path.name == PAGE or path.suffix == ".png"


def render(run: Run, pictures: Path) -> str:
    """The page's HTML; the plots' PNG files go into the folder ``pictures``."""
    from jinja2 import Environment, PackageLoader, StrictUndefined

    curves, heat = charts(run), grids(run.layers.values())
    drawings: list[Chart | Grid] = [*curves, *heat]
    for drawing in drawings:
        png(drawing, pictures / f"{drawing.slug}.png")
    environment = Environment(
        loader=PackageLoader("axolotl_bitnet", "report"),
        autoescape=True,  # names, paths and config values are data
        undefined=StrictUndefined,
        trim_blocks=True,
        lstrip_blocks=True,
    )
    layers = sorted(run.layers.values(), key=lambda layer: natural_order(layer.name))
    return environment.get_template("page.html").render(
        run=run,
        name=run.folder.resolve().name,
        summary=summary(run),
        verdict=verdict(run),
        tiles=tiles(run),
        figures=[_figure(chart, _legend(chart)) for chart in curves],
        grids=[_figure(grid, []) for grid in heat],
        layers=[_row(layer) for layer in layers],
        artifacts=artifacts(run),
        commands=commands(run),
        config=_yaml(run.config),
        facts=facts(run),
        others={key: _course(values) for key, values in sorted(others(run.log).items())},
        notes=[*unloaded(run), *run.notes, *_not_finite(curves)],
    )


def _figure(drawing: Chart | Grid, legend: list[dict[str, str]]) -> dict[str, Any]:
    from markupsafe import Markup

    words = "; ".join(f"{line['label']} {line['text']}" for line in legend) or _extremes(drawing)
    picture = Markup(svg(drawing, f"{drawing.title}: {words}"))  # matplotlib escapes the text in it
    return {"drawing": drawing, "svg": picture, "legend": legend}


def _legend(chart: Chart) -> list[dict[str, str]]:
    return [
        {"colour": f"s{i % COLOURS}", "label": line.label, "text": _told(line, chart.unit)}
        for i, line in enumerate(chart.series)
    ]


def _told(line: Series, unit: str) -> str:
    """A curve in words."""
    if not line.values:
        return "never finite"
    first, last = line.values[0], line.values[-1]
    return show(last, unit) if len(line.values) == 1 else f"{show(first, unit)} → {show(last, unit)}"


def _extremes(drawing: Chart | Grid) -> str:
    assert isinstance(drawing, Grid)
    cells = [
        (value, f"{row} {column}")
        for row, values in zip(drawing.rows, drawing.values, strict=True)
        for column, value in zip(drawing.columns, values, strict=True)
        if value is not None
    ]
    (low, where_low), (high, where_high) = min(cells), max(cells)
    return f"from {show(low, '%')} ({where_low}) to {show(high, '%')} ({where_high})"


def _row(layer: TrainedLayer) -> dict[str, str]:
    def share(value: float | None) -> str:
        return "" if value is None else show(value, "%")

    return {
        "name": layer.name,
        "shape": " × ".join(map(str, layer.shape)) if layer.shape else "",
        "zeros": share(layer.zeros),
        "flips": share(layer.flips),
        "drift": share(layer.drift),
    }


def _course(values: list[float]) -> str:
    return show(values[0]) if len(values) == 1 else f"{show(values[0])} → {show(values[-1])}"


def _not_finite(curves: Iterable[Chart]) -> list[str]:
    return [
        f"{line.lost} logged values of “{chart.title}, {line.label}” are not finite and left out."
        for chart in curves
        for line in chart.series
        if line.lost
    ]


def _yaml(config: dict[str, Any]) -> str:
    import yaml

    if not config:
        return ""
    text: str = yaml.safe_dump(config, sort_keys=False, allow_unicode=True, width=math.inf)
    return text
