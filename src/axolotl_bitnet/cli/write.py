"""`pack`, `gguf`, `revert`, `mlx`, `restore`: a stored model in another format."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import click

from ..formats.export import export, export_gguf, gguf_types
from ..storage.safetensors_stream import weight_bytes
from .source import SOURCE
from .terminal import as_json, command, size


def _writing(function: Callable[..., None]) -> Callable[..., None]:
    """What all commands that write a model take."""
    for option in (
        click.option("--json", "machine", is_flag=True, help="Say the outcome as JSON."),
        click.option("--overwrite", is_flag=True, help="Replace TARGET if it exists."),
        click.argument("target", type=click.Path(path_type=Path)),
        click.argument("source", type=SOURCE),
    ):
        function = option(function)
    return function


def _wrote(name: str, source: Path, target: Path, machine: bool) -> None:
    count, before = weight_bytes(target), weight_bytes(source)
    if machine:
        as_json({"format": name, "path": str(target), "bytes": count, "source_bytes": before})
    else:
        click.echo(f"{target}: {size(count)}, from {size(before)} in {source}")


@click.command()
@_writing
@command
def pack(source: Path, target: Path, overwrite: bool, machine: bool) -> None:
    """Pack SOURCE (a run's output_dir, or another stored ternary model) into TARGET, 2 bits a weight.

    \b
    Example:
        axolotl-bitnet pack outputs/falcon-e-3b-sft outputs/falcon-e-3b-sft/packed --overwrite
    """
    export("packed", source, target, overwrite)
    _wrote("packed", source, target, machine)


@click.command()
@_writing
@click.option(
    "--type",
    "kind",
    type=click.Choice(gguf_types()),
    default="tq2_0",
    show_default=True,
    help="For CPUs tq2_0 (2.06 bits a weight) or tq1_0 (1.69, slower); for GPUs q2_0 (2.25).",
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
        axolotl-bitnet gguf outputs/falcon-e-3b-sft falcon-e-3b-sft-TQ2_0.gguf --overwrite
        axolotl-bitnet gguf outputs/falcon-e-3b-sft small.gguf --type tq1_0 --embeddings q8_0
    """
    export_gguf(source, target, kind, overwrite, embeddings=embeddings)
    _wrote(f"gguf-{kind}", source, target, machine)


@click.command()
@_writing
@command
def revert(source: Path, target: Path, overwrite: bool, machine: bool) -> None:
    """Write SOURCE as dense bfloat16 (codes / scale), for vLLM, SGLang and converters.

    \b
    Example:
        axolotl-bitnet revert outputs/falcon-e-3b-sft outputs/falcon-e-3b-sft/dense --overwrite
    """
    export("dense", source, target, overwrite)
    _wrote("dense", source, target, machine)


@click.command()
@_writing
@command
def mlx(source: Path, target: Path, overwrite: bool, machine: bool) -> None:
    """Write SOURCE as a 2-bit MLX model, for mlx-lm on Apple computers.

    \b
    Example:
        axolotl-bitnet mlx outputs/falcon-e-3b-sft outputs/falcon-e-3b-sft/mlx --overwrite
    """
    export("mlx", source, target, overwrite)
    _wrote("mlx", source, target, machine)


@click.command()
@_writing
@command
def restore(source: Path, target: Path, overwrite: bool, machine: bool) -> None:
    """Make trainable latents of SOURCE, a packed or dense ternary model or a GGUF file: the same codes and
    scales.

    \b
    Example:
        axolotl-bitnet restore outputs/falcon-e-3b-sft/packed restored --overwrite
        axolotl-bitnet verify restored --against outputs/falcon-e-3b-sft/packed
    """
    from ..formats.restore import restore_latents

    restore_latents(source, target, overwrite=overwrite)
    _wrote("latents", source, target, machine)
