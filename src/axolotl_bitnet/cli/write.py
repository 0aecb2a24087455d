"""`export`, its short forms `pack`, `gguf`, `revert`, `mlx`, and `restore`: a stored model in other formats.

What writes is imported by the commands' bodies: it imports torch, and `--help` needs none.
"""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import click

from ..formats.registry import FORMATS, output_dir_of
from .source import SOURCE, in_hub_cache
from .terminal import BadInput, as_json, command, size


def _formats(context: click.Context, option: click.Parameter, text: str) -> list[str]:
    """Names of formats with commas between them."""
    names = [name.strip() for name in text.split(",")]
    for name in names:
        if name not in FORMATS:
            raise click.BadParameter(f"unknown format '{name}': the formats are {', '.join(FORMATS)}")
    return list(dict.fromkeys(names))


def _writing(function: Callable[..., None]) -> Callable[..., None]:
    """What all commands that write a model take, beside their target."""
    for option in (
        click.option("--json", "machine", is_flag=True, help="Write the outcome as JSON."),
        click.option("--overwrite", is_flag=True, help="Replace a target that exists."),
        click.argument("source", type=SOURCE),
    ):
        function = option(function)
    return function


def _to_target(function: Callable[..., None]) -> Callable[..., None]:
    """What a command takes that writes one format where it is told."""
    return _writing(click.argument("target", type=click.Path(path_type=Path))(function))


def _outcome(name: str, source: Path, target: Path) -> dict[str, Any]:
    from ..storage.weight_bytes import weight_bytes

    bytes, before = weight_bytes(target), weight_bytes(source)
    return {"format": name, "path": str(target), "bytes": bytes, "source_bytes": before}


def _say(source: Path, *outcomes: dict[str, Any]) -> None:
    for each in outcomes:
        click.echo(f"{each['path']}: {size(each['bytes'])}, from {size(each['source_bytes'])} in {source}")


@click.command()
@click.option(
    "--to",
    "names",
    metavar="FORMATS",
    callback=_formats,
    required=True,
    help=f"With commas: {', '.join(FORMATS)}.",
)
@click.option(
    "--output-dir",
    type=click.Path(file_okay=False, path_type=Path),
    help="The folder to write them in. Default: the run's folder that SOURCE is, or is in.",
)
@_writing
@command
def export(source: Path, names: list[str], output_dir: Path | None, overwrite: bool, machine: bool) -> None:
    """Write SOURCE (a run's output_dir, or another stored ternary model) in each format of --to, where a run
    would put it: packed, gguf/model-Q2_0.gguf, dense and so on. All are written, or none.

    \b
    Example:
        axolotl-bitnet export outputs/sft --to packed,gguf-q2_0 --overwrite
        axolotl-bitnet export outputs/sft/packed --to mlx,dense
    """
    from ..formats.export import export_all

    folder = output_dir or output_dir_of(source)
    if output_dir is None and in_hub_cache(folder):
        raise BadInput(f"{source} is in the hub's cache: name a folder for what is written (--output-dir)")
    targets = {name: folder / FORMATS[name].path for name in names}
    export_all(source, targets, overwrite)
    outcomes = [_outcome(name, source, target) for name, target in targets.items()]
    if machine:
        as_json(outcomes)
    else:
        _say(source, *outcomes)


def _short_form(name: str, format: str, text: str) -> click.Command:
    """The command that writes one format."""

    @click.command(name, help=text)
    @_to_target
    @command
    def write(source: Path, target: Path, overwrite: bool, machine: bool) -> None:
        from ..formats.export import export as write_as

        write_as(format, source, target, overwrite)
        _done(format, source, target, machine)

    return write


def _done(name: str, source: Path, target: Path, machine: bool) -> None:
    outcome = _outcome(name, source, target)
    as_json(outcome) if machine else _say(source, outcome)


pack = _short_form(
    "pack",
    "packed",
    """Pack SOURCE (a run's output_dir, or another stored ternary model) into TARGET, 2 bits per weight.

    \b
    Example:
        axolotl-bitnet pack outputs/sft outputs/sft/packed --overwrite
    """,
)

revert = _short_form(
    "revert",
    "dense",
    """Write SOURCE as dense bfloat16 (codes / scale), for vLLM, SGLang and converters.

    \b
    Example:
        axolotl-bitnet revert outputs/sft outputs/sft/dense --overwrite
    """,
)

mlx = _short_form(
    "mlx",
    "mlx",
    """Write SOURCE as a 2-bit MLX model, for mlx-lm on Apple computers.

    \b
    Example:
        axolotl-bitnet mlx outputs/sft outputs/sft/mlx --overwrite
    """,
)


@click.command()
@click.option(
    "--type",
    "kind",
    type=click.Choice([name.removeprefix("gguf-") for name in FORMATS if name.startswith("gguf-")]),
    default="tq2_0",
    show_default=True,
    help="For CPUs tq2_0 (2.06 bits per weight) or tq1_0 (1.69, slower); for GPUs q2_0 (2.25).",
)
@click.option(
    "--embeddings",
    type=click.Choice(["bf16", "f16", "q8_0"]),
    default="bf16",
    show_default=True,
    help="Embedding and head. q8_0: 8.5 bits per weight, not exact.",
)
@_to_target
@command
def gguf(source: Path, target: Path, overwrite: bool, machine: bool, kind: str, embeddings: str) -> None:
    """Write SOURCE as the GGUF file TARGET, for llama.cpp.

    \b
    Example:
        axolotl-bitnet gguf outputs/sft sft-TQ2_0.gguf --overwrite
        axolotl-bitnet gguf outputs/sft small.gguf --type tq1_0 --embeddings q8_0
    """
    from ..formats.export import export_gguf

    export_gguf(source, target, kind, overwrite, embeddings=embeddings)
    _done(f"gguf-{kind}", source, target, machine)


@click.command()
@_to_target
@command
def restore(source: Path, target: Path, overwrite: bool, machine: bool) -> None:
    """Make trainable latents of SOURCE, a packed or dense ternary model or a GGUF file: the same codes and
    scales.

    \b
    Example:
        axolotl-bitnet restore outputs/sft/packed restored --overwrite
        axolotl-bitnet verify restored --against outputs/sft/packed
    """
    from ..formats.restore import restore_latents

    restore_latents(source, target, overwrite=overwrite)
    _done("latents", source, target, machine)
