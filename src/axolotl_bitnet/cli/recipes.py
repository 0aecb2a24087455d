"""`recipes`: the recipes that ship with the package, copied."""

from __future__ import annotations

import shutil
from importlib.resources import as_file, files
from pathlib import Path

import click

from .terminal import BadInput, command


@click.command()
@click.argument("directory", type=click.Path(path_type=Path))
@command
def recipes(directory: Path) -> None:
    """Copy the recipes into DIRECTORY (made if missing; nothing in it is overwritten).

    \b
    Example:
        axolotl-bitnet recipes my-recipes
        axolotl train my-recipes/sft.yaml
    """
    if directory.exists() and any(directory.iterdir()):
        raise BadInput(f"{directory} is not empty: name a new directory")
    for folder in _recipe_folders():
        with as_file(folder) as source:
            shutil.copytree(
                source, directory, dirs_exist_ok=True, ignore=shutil.ignore_patterns("__pycache__")
            )
    click.echo(
        f"recipes copied to {directory}: " + ", ".join(sorted(path.name for path in directory.glob("*.yaml")))
    )


def _recipe_folders():  # type: ignore[no-untyped-def]
    installed = files("axolotl_bitnet") / "recipes"
    if installed.is_dir():
        return [installed]
    examples = Path(__file__).resolve().parents[3] / "examples"  # a source checkout
    return [examples / "falcon-e", examples / "convert"]
