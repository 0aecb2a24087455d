"""What the commands share: errors as sentences, exit statuses, progress in bytes, tables."""

from __future__ import annotations

import json
import sys
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from functools import wraps
from typing import TYPE_CHECKING, Any

import click

from ..storage.atomic import CheckpointError
from ..storage.progress import Advance, listening

if TYPE_CHECKING:
    from rich.table import Table

MISMATCH, BAD_INPUT, INTERRUPTED = 1, 2, 130
"""Exit statuses, beside 0."""

Command = Callable[..., None]


class BadInput(click.ClickException):
    """Something that was asked for cannot be done: a sentence on stderr."""

    exit_code = BAD_INPUT


def command(function: Command) -> Command:
    """A command's body with progress shown, errors told as sentences, and a Ctrl-C that is quiet."""

    @wraps(function)
    def run(*args: Any, **kwargs: Any) -> None:
        try:
            with _progress():
                function(*args, **kwargs)
        except (CheckpointError, ImportError, OSError) as error:
            raise BadInput(str(error)) from error
        except ValueError as error:
            from ..model.layer_plan import ConversionError  # imports torch

            if not isinstance(error, ConversionError):
                raise
            raise BadInput(str(error)) from error
        except KeyboardInterrupt:
            click.echo("interrupted: nothing was left behind", err=True)
            raise SystemExit(INTERRUPTED) from None

    return run


def as_json(data: Any) -> None:
    click.echo(json.dumps(data, indent=2, ensure_ascii=False))


def show(table: Table) -> None:
    """A table, in the terminal's width; in a pipe, where nobody wraps lines, as wide as it is."""
    from rich.console import Console

    console = Console()
    if not console.is_terminal:
        console = Console(width=200)
    console.print(table)


def size(count: int) -> str:
    return f"{count / 2**30:.2f} GiB" if count >= 2**30 else f"{count / 2**20:.1f} MiB"


@contextmanager
def _progress() -> Iterator[None]:
    """A bar on stderr for each work that is announced, if that is a terminal."""
    if not sys.stderr.isatty():
        yield
        return
    from rich.console import Console
    from rich.progress import (
        BarColumn,
        DownloadColumn,
        Progress,
        TextColumn,
        TimeRemainingColumn,
        TransferSpeedColumn,
    )

    console = Console(stderr=True)
    columns = (
        TextColumn("{task.description}"),
        BarColumn(),
        DownloadColumn(binary_units=True),
        TransferSpeedColumn(),
        TimeRemainingColumn(),
    )
    with Progress(*columns, console=console, transient=True) as progress:

        def begin(what: str, total: int) -> Advance:
            task = progress.add_task(what, total=total)
            return lambda count: progress.advance(task, count)

        with listening(begin):
            yield
