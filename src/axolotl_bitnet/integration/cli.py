"""`axolotl bitnet ...`, and the same as `python -m axolotl_bitnet ...` or `axolotl-bitnet ...`."""

from __future__ import annotations

import shutil
from importlib.resources import as_file, files
from pathlib import Path

import click

from ..checkpoint.artifacts import weight_bytes
from ..checkpoint.packed import pack_checkpoint
from ..checkpoint.stream import CheckpointError
from ..checkpoint.verify import verify_checkpoint
from ..report import ReportError, write_report


@click.group("bitnet")
def main() -> None:
    """Ternary (1.58-bit) models: recipes, packing, proof."""


@main.command()
@click.argument("directory", type=click.Path(path_type=Path))
def recipes(directory: Path) -> None:
    """Copy the Falcon-E recipes into DIRECTORY (made if missing; nothing in it is overwritten).

    \b
    Example:
        axolotl bitnet recipes my-recipes
        axolotl train my-recipes/sft.yaml
    """
    if directory.exists() and any(directory.iterdir()):
        raise click.ClickException(f"{directory} is not empty: name a new directory")
    with as_file(_recipes_folder()) as source:
        shutil.copytree(source, directory, dirs_exist_ok=True, ignore=shutil.ignore_patterns("__pycache__"))
    click.echo(
        f"recipes copied to {directory}: " + ", ".join(sorted(path.name for path in directory.glob("*.yaml")))
    )


@main.command()
@click.argument("source", type=click.Path(exists=True, file_okay=False, path_type=Path))
@click.argument("target", type=click.Path(path_type=Path))
@click.option("--overwrite", is_flag=True, help="Replace TARGET if it exists.")
def pack(source: Path, target: Path, overwrite: bool) -> None:
    """Pack the latents in SOURCE (a run's output_dir) into TARGET, 2 bits a weight.

    \b
    Example:
        axolotl bitnet pack outputs/falcon-e-3b-sft outputs/falcon-e-3b-sft/packed --overwrite
    """
    try:
        pack_checkpoint(source, target, overwrite)
    except (CheckpointError, OSError) as error:
        raise click.ClickException(str(error)) from error
    click.echo(f"{target}: {_mib(weight_bytes(target))}, from {_mib(weight_bytes(source))} of latents")


@main.command()
@click.argument("artifact", type=click.Path(exists=True, file_okay=False, path_type=Path))
@click.option(
    "--against",
    type=click.Path(exists=True, path_type=Path),
    help="A run's output_dir, its bitnet.json, or a folder of latents. Default: ARTIFACT's parent.",
)
def verify(artifact: Path, against: Path | None) -> None:
    """Check that ARTIFACT holds every code and every scale of the trained model. Exit status 1 if it does
    not.

    \b
    Example:
        axolotl bitnet verify outputs/falcon-e-3b-sft/packed
    """
    try:
        report = verify_checkpoint(artifact, against or artifact.resolve().parent)
    except CheckpointError as error:
        raise click.ClickException(str(error)) from error
    click.echo(report.summary())
    if not report.ok:
        raise SystemExit(1)


@main.command()
@click.argument("output_dir", type=click.Path(exists=True, file_okay=False, path_type=Path))
def report(output_dir: Path) -> None:
    """Write what is known of the run in OUTPUT_DIR as one page with plots: OUTPUT_DIR/report/index.html.

    \b
    Example:
        axolotl bitnet report outputs/falcon-e-3b-sft
    """
    try:
        click.echo(write_report(output_dir))
    except (ReportError, OSError) as error:
        raise click.ClickException(str(error)) from error


def _mib(count: int) -> str:
    return f"{count / 2**20:.1f} MiB"


def _recipes_folder():  # type: ignore[no-untyped-def]
    installed = files("axolotl_bitnet") / "recipes"
    if installed.is_dir():
        return installed
    return Path(__file__).resolve().parents[3] / "examples" / "falcon-e"  # a source checkout
