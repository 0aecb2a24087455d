"""`verify` and `inspect`: what a stored model is.

What reads models is imported by the commands' bodies: it imports torch, and `--help` needs none.
"""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING

import click

from ..run_folder import CHECKPOINT, RUN_FILE
from ..storage.atomic import CheckpointError
from .source import SOURCE
from .terminal import MISMATCH, as_json, command, require_model, show, size

if TYPE_CHECKING:
    from ..verify.inspect import Inspection
    from ..verify.measure import Layer
    from ..verify.report import VerificationReport

_SHOWN = 20


@click.command()
@click.argument("artifact", type=SOURCE)
@click.option(
    "--against",
    type=click.Path(exists=True, path_type=Path),
    help="A run's output_dir, its bitnet.json, or a stored ternary model. Default: ARTIFACT's run.",
)
@click.option("-p", "--prompt", "given", multiple=True, help="A prompt to run both models on. Repeatable.")
@click.option(
    "--prompts",
    type=click.Path(exists=True, dir_okay=False, path_type=Path),
    help="A file, one prompt per line.",
)
@click.option("--no-run", is_flag=True, help="Compare what is stored; run neither model.")
@click.option("--json", "machine", is_flag=True, help="Write the outcome as JSON.")
@command
def verify(
    artifact: Path,
    against: Path | None,
    given: tuple[str, ...],
    prompts: Path | None,
    no_run: bool,
    machine: bool,
) -> None:
    """Check that ARTIFACT, of any format, is the trained model: codes and scales exactly, then everything
    else, then logits and greedy tokens. Exit status 1 if it is not.

    \b
    Example:
        axolotl-bitnet verify outputs/sft/packed
        axolotl-bitnet verify outputs/sft/packed --no-run --json
    """
    from ..verify.logits import PROMPTS
    from ..verify.verify import verify_checkpoint

    require_model(artifact)
    texts = [*given, *(prompts.read_text(encoding="utf-8").splitlines() if prompts else [])]
    texts = [] if no_run else [text for text in texts if text.strip()] or list(PROMPTS)
    report = verify_checkpoint(artifact, against or _run_of(artifact), texts)
    if machine:
        as_json(report.to_json())
    else:
        _show_report(report)
    if not report.ok:
        raise SystemExit(MISMATCH)


def _run_of(artifact: Path) -> Path:
    """The folder of the run that an artifact is in."""
    nearby = [artifact.resolve(), *artifact.resolve().parents[:2]]
    for folder in nearby:
        in_checkpoint = folder.name.startswith(CHECKPOINT) and (folder / "config.json").exists()
        if (folder / RUN_FILE).exists() or (in_checkpoint and folder != nearby[0]):
            return folder
    for folder in nearby[1:]:
        if (folder / "config.json").exists():
            return folder
    raise CheckpointError(
        f"no run's {RUN_FILE} or latents around {artifact}: name what to compare it with (--against)"
    )


def _show_report(report: VerificationReport) -> None:
    from rich.table import Table

    click.echo(report.summary())
    table = Table()
    for column in ("check", "verdict", "what"):
        table.add_column(column)
    colours = {"same": "green", "differs": "bold red", "not checked": "yellow"}
    for check in report.checks:
        verdict = f"[{colours[check.verdict]}]{check.verdict}[/]"
        table.add_row(check.name, verdict, check.detail)
    show(table)
    for line in report.mismatches[:_SHOWN]:
        click.echo(f"  {line}")
    if len(report.mismatches) > _SHOWN:
        click.echo(f"  and {len(report.mismatches) - _SHOWN} more (--json has all)")


@click.command()
@click.argument("path", type=SOURCE)
@click.option("--layers", "each", is_flag=True, help="One row per layer instead of one per projection.")
@click.option("--json", "machine", is_flag=True, help="Write the outcome as JSON.")
@command
def inspect(path: Path, each: bool, machine: bool) -> None:
    """Say what the model in PATH is: latents, dense ternary, packed, GGUF, MLX or never ternary; its layers,
    its size, and what it cannot be used for.

    \b
    Example:
        axolotl-bitnet inspect outputs/sft
        axolotl-bitnet inspect outputs/sft/packed --json
    """
    from ..verify.inspect import inspect as inspect_checkpoint

    require_model(path)
    found = inspect_checkpoint(path)
    if machine:
        as_json(found.to_json())
    else:
        _show_inspection(found, each)


def _show_inspection(found: Inspection, each: bool) -> None:
    from rich.table import Table

    click.echo(f"{found.path}: {found.kind} ({found.detail})")
    click.echo(
        f"{len(found.layers)} ternary or ternary-to-be layers, {found.weights:,} weights; "
        f"{size(found.bytes)} now, {size(found.packed_bytes)} packed"
    )
    groups: dict[str, list[Layer]] = {}
    for layer in found.layers:
        groups.setdefault(layer.name if each else layer.name.rsplit(".", 1)[-1], []).append(layer)
    table = Table()
    columns = (
        "layer" if each else "projection",
        "layers",
        "shape",
        "zeros",
        "scale",
        "bits",
        "changed by quantization",
    )
    for column in columns:
        table.add_column(column, justify="left" if column == columns[0] else "right", no_wrap=True)
    for name, layers in groups.items():
        table.add_row(name, str(len(layers)), *_figures(layers))
    show(table)
    if not each and len(groups) < len(found.layers):
        click.echo("--layers shows each layer")
    if found.unplaced:
        click.echo(f"not loaded: {len(found.unplaced)} tensors that its architecture has no place for:")
    for name in found.unplaced:
        click.echo(f"  {name}")
    for line in found.refused:
        click.echo(f"refused: {line}")


def _figures(layers: list[Layer]) -> tuple[str, ...]:
    """Shape, zeros, scale, bits and change of some layers: one value, or the least and the largest."""

    def span(values: list[float], form: str) -> str:
        ends = [format(min(values), form), format(max(values), form)]
        return ends[0] if ends[0] == ends[1] else " to ".join(ends)

    shapes = list(dict.fromkeys(f"{layer.shape[0]} x {layer.shape[1]}" for layer in layers))
    return (
        shapes[0] if len(shapes) == 1 else f"{len(shapes)} shapes",
        span([layer.zeros for layer in layers], ".1%"),
        span([layer.scale for layer in layers], "g"),
        span([layer.bits for layer in layers], ".2f"),
        span([layer.change for layer in layers], ".1%"),
    )
