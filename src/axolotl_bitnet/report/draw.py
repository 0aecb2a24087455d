"""Drawing, with matplotlib: as SVG that takes its colours from the page around it, and as PNG."""

from __future__ import annotations

import re
from pathlib import Path
from typing import TYPE_CHECKING, Any

from .charts import Chart, Grid

if TYPE_CHECKING:
    from matplotlib.figure import Figure

_LIGHT = {
    "ink": "#57606a",
    "grid": "#d8dee4",
    "s0": "#0b63ce",
    "s1": "#c2410c",
    "s2": "#0f766e",
    "s3": "#7c3aed",
    "s4": "#b45309",
    "s5": "#be185d",
    "s6": "#4d7c0f",
    "s7": "#475569",
}
COLOURS = len([name for name in _LIGHT if re.fullmatch(r"s\d", name)])
_STAND_INS = {name: f"#0102{i:02x}" for i, name in enumerate(_LIGHT, start=3)}
"""Colours of the SVG while matplotlib draws it; on the page they become CSS variables."""

_STYLE = {
    "svg.fonttype": "none",  # text stays text
    "svg.hashsalt": "axolotl-bitnet",  # the same run gives the same file
    "text.parse_math": False,  # a $ in a name is a $
    "font.size": 9,
    "axes.spines.top": False,
    "axes.spines.right": False,
    "axes.grid": True,
    "axes.grid.axis": "y",
    "axes.axisbelow": True,
    "figure.dpi": 100,
}
_LESS = (  # of what matplotlib writes
    (r"<metadata>.*?</metadata>|<!--.*?-->|<style.*?</style>", ""),
    (r' xmlns(:xlink)?="[^"]*"', ""),
    (r"xlink:href=", "href="),
    (r' id="(text|patch|line2d)_\d+"', ""),
    (r"font: ([\d.]+px) [^;\"]*", r"font-size: \1"),  # the font itself is the page's; older matplotlib...
    (r" font-family: [^;\"]*;?", ""),  # ...and newer
    (r' transform="rotate\(-?0 [^"]*\)"', ""),
    (r"\s*\n\s*", " "),
)
_SPAN = 0.05  # of a grid's colours, at least
_HEIGHT = 0.05  # of a curve's largest value, that its axis spans at least
_WIDTH = 4.7  # inches: a phone's width, so that text is as large as around it


def svg(drawing: Chart | Grid, alt: str) -> str:
    """An `<svg>` element to put into a page: no prolog, no ids but its own, nothing loaded from elsewhere."""
    from io import StringIO

    import matplotlib

    out = StringIO()
    with matplotlib.rc_context(_STYLE):
        figure = _draw(drawing, _STAND_INS, legend=False)
        nothing = {"Creator": None, "Date": None, "Format": None, "Type": None}
        figure.savefig(out, format="svg", transparent=True, metadata=nothing)
    text = out.getvalue()[out.getvalue().index("<svg") :]
    for pattern, replacement in _LESS:
        text = re.sub(pattern, replacement, text, flags=re.DOTALL)
    text = re.sub(r' (d|x|y)="[^"]*"', lambda match: re.sub(r"(\.\d\d)\d+", r"\1", match[0]), text)
    text = re.sub(r'(\bid="|href="#|url\(#)', rf"\g<1>{drawing.slug}-", text)
    text = re.sub(r' (width|height)="[\d.]+pt"', "", text, count=2)
    for name, colour in _STAND_INS.items():
        text = text.replace(colour, f"var(--{name})")
    label = alt.replace("&", "&amp;").replace('"', "&quot;").replace("<", "&lt;")
    return text.replace("<svg", f'<svg role="img" aria-label="{label}"', 1)


def png(drawing: Chart | Grid, path: Path) -> None:
    """The same as a picture for slides and chats, with a legend and a title in it."""
    import matplotlib

    with matplotlib.rc_context(_STYLE):
        figure = _draw(drawing, _LIGHT, legend=True)
        figure.axes[0].set_title(drawing.title, loc="left", fontsize=11)
        figure.savefig(path, format="png", dpi=130, facecolor="white", metadata={"Software": None})


def _draw(drawing: Chart | Grid, colours: dict[str, str], legend: bool) -> Figure:
    return _curves(drawing, colours, legend) if isinstance(drawing, Chart) else _heat(drawing, colours)


def _figure(height: float, colours: dict[str, str]) -> tuple[Figure, Any]:
    from matplotlib.figure import Figure  # without pyplot: no windows, no state of its own

    figure = Figure(figsize=(_WIDTH, height), layout="constrained")
    axes = figure.add_subplot()
    axes.tick_params(which="both", colors=colours["ink"], length=0)
    axes.grid(color=colours["grid"], linewidth=0.8)
    for spine in axes.spines.values():
        spine.set_color(colours["grid"])
    return figure, axes


def _curves(chart: Chart, colours: dict[str, str], legend: bool) -> Figure:
    from matplotlib.ticker import FuncFormatter, MaxNLocator, NullFormatter, PercentFormatter, ScalarFormatter

    figure, axes = _figure(2.5, colours)
    for i, line in enumerate(chart.series):
        style: dict[str, Any] = {
            "color": colours[f"s{i % COLOURS}"],
            "linestyle": "--" if line.dashed else "-",
        }
        if len(line.values) <= 40:
            style |= {"marker": "o", "markersize": 3}
        axes.plot(line.steps, line.values, linewidth=1.8, label=line.label, **style)
    axes.set_xlabel("step", color=colours["ink"])
    axes.xaxis.set_major_locator(MaxNLocator(6, integer=True))
    if chart.log:
        axes.set_yscale("log")
        axes.yaxis.set_major_formatter(FuncFormatter(lambda value, _: show(value)))
        axes.yaxis.set_minor_formatter(NullFormatter())
    else:
        axes.margins(y=0.08)
        values = [value for line in chart.series for value in line.values]
        low, high = min(values, default=0.0), max(values, default=0.0)
        missing = _HEIGHT * max(abs(low), abs(high)) - (high - low)
        if missing > 0:  # digits of rounding are no course
            axes.set_ylim(low - missing / 2, high + missing / 2)
        axes.yaxis.set_major_formatter(
            PercentFormatter(1, symbol=" %") if chart.unit == "%" else ScalarFormatter(useOffset=False)
        )
        axes.yaxis.get_offset_text().set_color(colours["ink"])
    if legend and len(chart.series) > 1:
        axes.legend(frameon=False, fontsize=8, labelcolor=colours["ink"])
    return figure


def _heat(grid: Grid, colours: dict[str, str]) -> Figure:
    from matplotlib import colormaps
    from matplotlib.colors import Normalize

    rows, columns = len(grid.rows), len(grid.columns)
    figure, axes = _figure(0.6 + 0.2 * rows, colours)
    known = [value for line in grid.values for value in line if value is not None]
    low, high = min(known), max(known)
    if grid.signed:
        high = max(abs(low), abs(high))
        low = -high
    elif high - low < _SPAN:  # noise must not appear as a pattern
        low, high = (low + high - _SPAN) / 2, (low + high + _SPAN) / 2
    span = Normalize(low, high if high > low else low + 1)
    cmap = colormaps["PuOr" if grid.signed else "YlGnBu"]
    axes.grid(False)
    for y, line in enumerate(grid.values):
        for x, value in enumerate(line):
            if value is None:
                continue
            colour = cmap(span(value))
            axes.add_patch(_cell(x, y, colour))
            ink = "#111111" if _luminance(colour) > 0.179 else "#ffffff"
            if columns <= 12:
                text = show(value, "%").removesuffix(" %")
                axes.text(x, y, text, color=ink, fontsize=8, ha="center", va="center_baseline")
    axes.set_xlim(-0.5, columns - 0.5)
    axes.set_ylim(rows - 0.5, -0.5)
    short = [_cut(column.removesuffix("_proj"), 16) for column in grid.columns]
    slanted = {"rotation": 60, "ha": "left"} if sum(map(len, short)) > 60 else {}
    axes.set_xticks(range(columns), short, **slanted)
    axes.xaxis.tick_top()
    axes.set_yticks(range(rows), [_cut(row, 20) for row in grid.rows])
    for spine in axes.spines.values():
        spine.set_visible(False)
    return figure


def _cut(name: str, length: int) -> str:
    return name if len(name) <= length else f"…{name[1 - length :]}"


def _cell(x: float, y: float, colour: Any) -> Any:
    from matplotlib.patches import Rectangle

    return Rectangle((x - 0.48, y - 0.46), 0.96, 0.92, facecolor=colour, edgecolor="none")


def _luminance(colour: tuple[float, ...]) -> float:
    """Relative luminance (WCAG 2) of an sRGB colour."""
    linear = [c / 12.92 if c <= 0.04045 else ((c + 0.055) / 1.055) ** 2.4 for c in colour[:3]]
    return 0.2126 * linear[0] + 0.7152 * linear[1] + 0.0722 * linear[2]


def show(value: float, unit: str = "") -> str:
    """A value for people: "31.4 %", "5e-04", "13.4 GiB"."""
    if unit == "%":
        return f"{100 * value:.3g} %"
    size = abs(value)
    if value == 0:
        text = "0"
    elif size >= 1000:
        text = f"{value:,.0f}"
    elif size >= 0.001:
        text = f"{value:.4g}"
    else:
        text = f"{value:.2e}"
    return f"{text} {unit}" if unit else text
