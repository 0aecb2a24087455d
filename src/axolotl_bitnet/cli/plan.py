"""`plan`: what a config will do, before a paid hour."""

from __future__ import annotations

from dataclasses import asdict
from pathlib import Path
from typing import Any

import click

from ..model.memory import GIB
from ..plugin.plan import RunPlan, base_config, plan_run
from .terminal import MISMATCH, BadInput, as_json, command, size

_CARDS = (24, 48, 80, 141)
"""GiB of the GPUs that people rent: an RTX 4090, an L40S, an A100 or H100, an H200."""


@click.command()
@click.argument("config", type=click.Path(exists=True, dir_okay=False, path_type=Path))
@click.option(
    "--base",
    type=click.Path(exists=True, file_okay=False, path_type=Path),
    help="A folder with the base model's config.json. Default: base_model, here or in the hub's cache.",
)
@click.option("--json", "machine", is_flag=True, help="Write the outcome as JSON.")
@command
def plan(config: Path, base: Path | None, machine: bool) -> None:
    """Say what training CONFIG will do, without weights or a GPU: refusals, learning rates, ternary layers,
    memory on 1, 2, 4 and 8 GPUs, sizes of the artifacts. Exit status 1 if the run would be refused.

    \b
    Example:
        axolotl-bitnet plan my-recipes/sft-1b.yaml
        axolotl-bitnet plan my-recipes/sft.yaml --base falcon-e-3b --json
    """
    cfg = _read(config)
    shape, where = base_config(cfg, base)
    if shape is None and not Path(str(cfg.get("base_model"))).is_absolute():
        beside = config.parent / str(cfg.get("base_model"))
        shape, where = base_config(cfg, beside) if (beside / "config.json").is_file() else (shape, where)
    found = plan_run(cfg, shape, Path(where) if shape is not None and Path(where).is_dir() else None)
    if shape is None:
        found.notes.append(f"layers, memory and sizes are not planned: {where} (name one with --base)")
    if machine:
        as_json(_json(found))
    else:
        _show(found)
    if found.refused:
        raise SystemExit(MISMATCH)


def _read(config: Path) -> dict[str, Any]:
    import yaml

    try:
        cfg = yaml.safe_load(config.read_text(encoding="utf-8"))
    except (yaml.YAMLError, UnicodeDecodeError) as error:
        raise BadInput(f"{config} is not YAML: {error}") from error
    if not isinstance(cfg, dict):
        raise BadInput(f"{config} holds no keys: it is not an Axolotl config")
    return cfg


def _json(found: RunPlan) -> dict[str, Any]:
    outline = None
    if found.outline is not None:
        outline = {"parameters": found.outline.parameters, **asdict(found.outline)}
    memory = {str(gpus): each.to_json() for gpus, each in found.memory.items()}
    return {**asdict(found), "outline": outline, "memory": memory}


def _show(found: RunPlan) -> None:
    for line in found.refused:
        click.echo(f"refused: {line}")
    for reach, rate in found.rates.items():
        click.echo(f"effective learning rate: {rate:g} ({reach})")
    if (outline := found.outline) is not None:
        kinds = ", ".join(dict.fromkeys(matrix.name.rsplit(".", 1)[-1] for matrix in outline.ternary))
        click.echo(
            f"{len(outline.ternary)} linear layers become ternary ({kinds}): {outline.ternary_weights:,} of "
            f"{outline.parameters:,} parameters; {len(outline.dense)} stay dense"
        )
    if found.memory:
        layout = {"fsdp2": "sharded by FSDP2", "ddp": "whole on each (DDP)"}[found.sharding]
        click.echo(f"memory of a GPU in GiB, {found.tokens:,} tokens a micro-batch; several GPUs: {layout}")
        click.echo("  GPUs  state  activations  work   peak  with reserve  fits a GPU of")
        for gpus, each in found.memory.items():
            state = each.weights + each.gradients + each.moments + each.frozen + each.codes
            parts = (state, each.activations, each.work, each.peak, each.needed)
            row = "{:7.1f}{:13.1f}{:6.1f}{:7.1f}{:14.1f}".format(*(part / GIB for part in parts))
            fits = [f"{card}" for card in _CARDS if each.needed <= card * GIB]
            click.echo(f"  {gpus:>4}{row}  {', '.join(fits) or 'none of ' + str(_CARDS)}")
    if found.artifacts:
        sizes = ", ".join(f"{name} {size(count)}" for name, count in found.artifacts.items())
        click.echo(f"on disk: {sizes}")
    for line in found.notes:
        click.echo(f"note: {line}")
    if not found.refused:
        click.echo("nothing in this config is refused")
