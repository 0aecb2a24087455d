"""`axolotl bitnet ...`, and the same as `python -m axolotl_bitnet ...` or `axolotl-bitnet ...`."""

from __future__ import annotations

import shutil
from collections.abc import Callable
from importlib.resources import as_file, files
from pathlib import Path
from typing import Any

import click
from rich.table import Table

from ..formats.registry import FORMATS
from ..report import ReportError, write_report
from ..run_folder import RUN_FILE
from ..storage.atomic import CheckpointError
from ..storage.safetensors_stream import weight_bytes
from ..verify.inspect import Inspection
from ..verify.inspect import inspect as inspect_checkpoint
from ..verify.logits import PROMPTS
from ..verify.verify import VerificationReport, verify_checkpoint
from .terminal import MISMATCH, BadInput, as_json, command, show, size

_SHOWN = 20


@click.group("bitnet")
def main() -> None:
    """Ternary (1.58-bit) models: recipes, formats, proof.

    Exit status: 0 well, 1 not the trained model, 2 bad input, 130 interrupted.
    """


@main.command()
@click.argument("directory", type=click.Path(path_type=Path))
@command
def recipes(directory: Path) -> None:
    """Copy the Falcon-E recipes into DIRECTORY (made if missing; nothing in it is overwritten).

    \b
    Example:
        axolotl bitnet recipes my-recipes
        axolotl train my-recipes/sft.yaml
    """
    if directory.exists() and any(directory.iterdir()):
        raise BadInput(f"{directory} is not empty: name a new directory")
    with as_file(_recipes_folder()) as source:
        shutil.copytree(source, directory, dirs_exist_ok=True, ignore=shutil.ignore_patterns("__pycache__"))
    click.echo(
        f"recipes copied to {directory}: " + ", ".join(sorted(path.name for path in directory.glob("*.yaml")))
    )


# Writing


def _writing(function: Callable[..., None]) -> Callable[..., None]:
    """What all commands that write a model take."""
    for option in (
        click.option("--json", "machine", is_flag=True, help="Say the outcome as JSON."),
        click.option("--overwrite", is_flag=True, help="Replace TARGET if it exists."),
        click.argument("target", type=click.Path(path_type=Path)),
        click.argument("source", type=click.Path(exists=True, path_type=Path)),
    ):
        function = option(function)
    return function


def _wrote(name: str, source: Path, target: Path, machine: bool) -> None:
    count, before = weight_bytes(target), weight_bytes(source)
    if machine:
        as_json({"format": name, "path": str(target), "bytes": count, "source_bytes": before})
    else:
        click.echo(f"{target}: {size(count)}, from {size(before)} in {source}")


@main.command()
@_writing
@command
def pack(source: Path, target: Path, overwrite: bool, machine: bool) -> None:
    """Pack SOURCE (a run's output_dir, or another stored ternary model) into TARGET, 2 bits a weight.

    \b
    Example:
        axolotl bitnet pack outputs/falcon-e-3b-sft outputs/falcon-e-3b-sft/packed --overwrite
    """
    FORMATS["packed"].write(source, target, overwrite)
    _wrote("packed", source, target, machine)


@main.command()
@_writing
@click.option(
    "--type",
    "kind",
    type=click.Choice([name.removeprefix("gguf-") for name in FORMATS if name.startswith("gguf-")]),
    default="tq2_0",
    show_default=True,
    help="tq2_0: 2.06 bits a weight, quicker. tq1_0: 1.69 bits, smaller.",
)
@click.option(
    "--embeddings",
    type=click.Choice(["bf16", "f16", "q8_0"]),
    default="bf16",
    show_default=True,
    help="Embedding and head. q8_0: 8.5 bits a weight, some 0.5 % off.",
)
@command
def gguf(source: Path, target: Path, overwrite: bool, machine: bool, kind: str, embeddings: str) -> None:
    """Write SOURCE as the GGUF file TARGET, for llama.cpp.

    \b
    Example:
        axolotl bitnet gguf outputs/falcon-e-3b-sft falcon-e-3b-sft-TQ2_0.gguf --overwrite
        axolotl bitnet gguf outputs/falcon-e-3b-sft small.gguf --type tq1_0 --embeddings q8_0
    """
    from ..formats.export import export_gguf

    export_gguf(source, target, kind, overwrite, embeddings=embeddings)
    _wrote(f"gguf-{kind}", source, target, machine)


@main.command()
@_writing
@command
def revert(source: Path, target: Path, overwrite: bool, machine: bool) -> None:
    """Write SOURCE as dense bfloat16 (codes / scale), for vLLM, SGLang and converters.

    \b
    Example:
        axolotl bitnet revert outputs/falcon-e-3b-sft outputs/falcon-e-3b-sft/dense --overwrite
    """
    FORMATS["dense"].write(source, target, overwrite)
    _wrote("dense", source, target, machine)


@main.command()
@_writing
@command
def mlx(source: Path, target: Path, overwrite: bool, machine: bool) -> None:
    """Write SOURCE as a 2-bit MLX model, for mlx-lm on Apple computers.

    \b
    Example:
        axolotl bitnet mlx outputs/falcon-e-3b-sft outputs/falcon-e-3b-sft/mlx --overwrite
    """
    FORMATS["mlx"].write(source, target, overwrite)
    _wrote("mlx", source, target, machine)


@main.command()
@_writing
@command
def restore(source: Path, target: Path, overwrite: bool, machine: bool) -> None:
    """Make trainable latents of SOURCE, a packed or dense ternary model or a GGUF file: the same codes and
    scales.

    \b
    Example:
        axolotl bitnet restore outputs/falcon-e-3b-sft/packed restored --overwrite
        axolotl bitnet verify restored --against outputs/falcon-e-3b-sft/packed
    """
    from ..formats.restore import restore_latents

    restore_latents(source, target, overwrite=overwrite)
    _wrote("latents", source, target, machine)


# Looking


@main.command()
@click.argument("artifact", type=click.Path(exists=True, path_type=Path))
@click.option(
    "--against",
    type=click.Path(exists=True, path_type=Path),
    help="A run's output_dir, its bitnet.json, or a stored ternary model. Default: ARTIFACT's run.",
)
@click.option("-p", "--prompt", "given", multiple=True, help="A prompt to run both models on; repeatable.")
@click.option(
    "--prompts", type=click.Path(exists=True, dir_okay=False, path_type=Path), help="A file, a prompt a line."
)
@click.option("--no-run", is_flag=True, help="Compare what is stored only; run neither model.")
@click.option("--json", "machine", is_flag=True, help="Say the outcome as JSON.")
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
        axolotl bitnet verify outputs/falcon-e-3b-sft/packed
        axolotl bitnet verify outputs/falcon-e-3b-sft/packed --no-run --json
    """
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
        if (folder / RUN_FILE).exists():
            return folder
    for folder in nearby[1:]:
        if (folder / "config.json").exists():
            return folder
    raise CheckpointError(
        f"no run's {RUN_FILE} or latents around {artifact}: name what to hold it against (--against)"
    )


def _show_report(report: VerificationReport) -> None:
    click.echo(report.summary())
    table = Table()
    for column in ("", "verdict", "what"):
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


@main.command()
@click.argument("path", type=click.Path(exists=True, path_type=Path))
@click.option("--json", "machine", is_flag=True, help="Say the outcome as JSON.")
@command
def inspect(path: Path, machine: bool) -> None:
    """Say what the model in PATH is: latents, dense ternary, packed, GGUF, MLX or never ternary; its layers,
    its size, and what it cannot be used for.

    \b
    Example:
        axolotl bitnet inspect outputs/falcon-e-3b-sft
        axolotl bitnet inspect outputs/falcon-e-3b-sft/packed --json
    """
    found = inspect_checkpoint(path)
    if machine:
        as_json(found.to_json())
    else:
        _show_inspection(found)


def _show_inspection(found: Inspection) -> None:
    click.echo(f"{found.path}: {found.kind} ({found.detail})")
    table = Table()
    for column in ("layer", "shape", "zeros", "scale", "bits", "changed by quantization"):
        table.add_column(column, justify="left" if column == "layer" else "right", no_wrap=column == "layer")
    for layer in found.layers:
        row: list[Any] = [layer.name, f"{layer.shape[0]} x {layer.shape[1]}", f"{layer.zeros:.1%}"]
        table.add_row(*row, f"{layer.scale:g}", f"{layer.bits:.2f}", f"{layer.change:.1%}")
    show(table)
    click.echo(
        f"{len(found.layers)} ternary or ternary-to-be layers, {found.weights:,} weights; "
        f"{size(found.bytes)} now, {size(found.packed_bytes)} packed"
    )
    for line in found.refused:
        click.echo(f"refused: {line}")


@main.command()
@click.argument("output_dir", type=click.Path(exists=True, file_okay=False, path_type=Path))
@command
def report(output_dir: Path) -> None:
    """Write what is known of the run in OUTPUT_DIR as one page with plots: OUTPUT_DIR/report/index.html.

    \b
    Example:
        axolotl bitnet report outputs/falcon-e-3b-sft
    """
    try:
        click.echo(write_report(output_dir))
    except ReportError as error:
        raise BadInput(str(error)) from error


def _recipes_folder():  # type: ignore[no-untyped-def]
    installed = files("axolotl_bitnet") / "recipes"
    if installed.is_dir():
        return installed
    return Path(__file__).resolve().parents[3] / "examples" / "falcon-e"  # a source checkout
