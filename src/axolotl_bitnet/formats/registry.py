"""The one table of formats: what each is called, where a run puts it, how it is run, and the
:class:`~.format.Format` that writes and reads it.

A format's module, which imports torch, is imported when it is used: validating a config and drawing a report
import none.
"""

from __future__ import annotations

import importlib
from collections.abc import Callable
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, cast

from . import ways_to_run as run
from .ways_to_run import WayToRun

if TYPE_CHECKING:
    from .format import Format


@dataclass(frozen=True)
class Row:
    """A format as config, command line and ``bitnet.json`` name it.

    Attributes:
        name: what `bitnet.export` and `bitnet.json` call it.
        path: where a run puts it, below its output folder: a folder, or a file in one.
        title: what it is, in a few words.
        command: what writes it, after ``axolotl-bitnet``.
        home: ``module:name`` of its :class:`~.format.Format`, below this package.
        ways_to_run: for a path, which is written into the commands as it is: ways to run what is there, the
            usual way first.
    """

    name: str
    path: str
    title: str
    command: str
    home: str
    ways_to_run: Callable[[str], list[WayToRun]]

    @property
    def folder(self) -> str:
        """The folder below the output folder that it, or its file, is in."""
        return Path(self.path).parts[0]

    @property
    def format(self) -> Format:
        """What writes and reads it."""
        module, name = self.home.split(":")
        return cast("Format", getattr(importlib.import_module(f".{module}", __package__), name))


def output_dir_of(source: Path) -> Path:
    """The folder that a stored model's artifacts go to: ``run`` for ``run`` itself, for the places in it
    where a run puts artifacts (``run/packed``, ``run/gguf/model-Q2_0.gguf``), and for ``run/other.gguf``."""
    for place in {Path(text) for row in _ROWS for text in (row.path, row.folder)}:
        depth = len(place.parts)
        if source.parts[-depth:] == place.parts:
            return source.parents[depth - 1]
    return source.parent if source.is_file() else source


_ROWS = (
    Row("packed", "packed", "2 bits per weight", "pack", "packed:PACKED", run.packed),
    Row("gguf-tq2_0", "gguf/model-TQ2_0.gguf", "GGUF, TQ2_0", "gguf --type tq2_0", "gguf.tq:TQ2_0", run.gguf),
    Row("gguf-tq1_0", "gguf/model-TQ1_0.gguf", "GGUF, TQ1_0", "gguf --type tq1_0", "gguf.tq:TQ1_0", run.gguf),
    Row(
        "gguf-q2_0",
        "gguf/model-Q2_0.gguf",
        "GGUF, Q2_0",
        "gguf --type q2_0",
        "gguf.q2_0:Q2_0",
        partial(run.gguf, device="GPU"),
    ),
    Row("dense", "dense", "dense bfloat16", "revert", "dense:DENSE", run.dense),
    Row("mlx", "mlx", "2 bits, for MLX", "mlx", "mlx:MLX", run.mlx),
)

FORMATS: dict[str, Row] = {row.name: row for row in _ROWS}
"""By name, in the order in which a run makes them."""

FOLDERS = tuple(dict.fromkeys(row.folder for row in FORMATS.values()))
"""The folders below an output folder that artifacts are in."""
