"""What the commands share: errors as sentences, exit statuses, progress in bytes, tables."""

from __future__ import annotations

import json
import os
import sys
import warnings
from collections.abc import Callable, Iterator
from contextlib import contextmanager, nullcontext
from functools import wraps
from pathlib import Path
from typing import TYPE_CHECKING, Any

import click

from ..run_folder import RUN_FILE
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
        _quieten_libraries()
        try:
            with _alone_on_stdout() if kwargs.get("machine") else nullcontext(), _progress():
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


_stdout: int | None = None  # the descriptor that JSON goes to, while everything else goes to stderr


def as_json(data: Any) -> None:
    text = json.dumps(data, indent=2, ensure_ascii=False) + "\n"
    if _stdout is None:
        click.echo(text, nl=False)
    else:
        with os.fdopen(os.dup(_stdout), "w", encoding="utf-8") as out:
            out.write(text)


@contextmanager
def _alone_on_stdout() -> Iterator[None]:
    """Within, only :func:`as_json` writes to stdout; whatever else is printed goes to stderr.

    Raises:
        BadInput: under ``axolotl bitnet``, whose group has printed a banner there before our code ran.
    """
    global _stdout
    context = click.get_current_context(silent=True)
    if context is not None and context.find_root().command.name != "bitnet":
        raise BadInput(
            "`axolotl bitnet` cannot write JSON: Axolotl has already printed its banner on stdout. "
            f"Run `axolotl-bitnet {context.info_name} ... --json`"
        )
    try:
        out, err = sys.stdout.fileno(), sys.stderr.fileno()
    except (AttributeError, OSError, ValueError):  # no files, as in a test
        yield
        return
    _stdout = os.dup(out)
    os.dup2(err, out)
    try:
        yield
    finally:
        sys.stdout.flush()
        os.dup2(_stdout, out)
        os.close(_stdout)
        _stdout = None


def _quieten_libraries() -> None:
    """Other libraries' warnings and bars drown ours; who wants them sets these variables."""
    os.environ.setdefault("TRANSFORMERS_VERBOSITY", "error")
    os.environ.setdefault("HF_HUB_DISABLE_PROGRESS_BARS", "1")
    if not sys.warnoptions:
        warnings.simplefilter("ignore")


def require_model(path: Path) -> None:
    """Raise BadInput for a file that is no model: the reader of GGUF files would speak of GGUF."""
    if not path.is_file():
        return
    with path.open("rb") as file:
        if file.read(4) == b"GGUF":
            return
    instead = (
        "name the run's folder, or an artifact in it" if path.name == RUN_FILE else "name the folder it is in"
    )
    raise BadInput(f"{path} is not a model: {instead}, or a GGUF file")


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
