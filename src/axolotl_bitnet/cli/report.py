"""`report`: a run as one page."""

from __future__ import annotations

from pathlib import Path

import click

from .terminal import BadInput, command


@click.command()
@click.argument("output_dir", type=click.Path(exists=True, file_okay=False, path_type=Path))
@command
def report(output_dir: Path) -> None:
    """Write what is known of the run in OUTPUT_DIR as one page with plots: OUTPUT_DIR/report/index.html.

    \b
    Example:
        axolotl-bitnet report outputs/sft
    """
    from ..report import ReportError, write_report  # which `--help` does not need

    try:
        click.echo(write_report(output_dir))
    except ReportError as error:
        raise BadInput(str(error)) from error
