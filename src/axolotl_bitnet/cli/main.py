"""`axolotl-bitnet ...`, and the same as `python -m axolotl_bitnet ...` or `axolotl bitnet ...`.

A command's module is imported when the command runs, not before: importing torch takes seconds, and neither
`--help` nor the commands that need no torch should wait for it.
"""

from __future__ import annotations

from importlib import import_module
from typing import cast

import click

_GROUPS = {
    "Run": {
        "recipes": ("recipes", "Copy the recipes into DIRECTORY."),
        "plan": ("plan", "Say what training CONFIG will do: memory, sizes, refusals."),
        "report": ("report", "Write the run in OUTPUT_DIR as one page with plots."),
        "chat": ("chat", "Talk to the packed model in FOLDER."),
    },
    "Convert": {
        "export": ("write", "Write SOURCE in several formats, beside it."),
        "pack": ("write", "Pack SOURCE into TARGET, 2 bits per weight."),
        "gguf": ("write", "Write SOURCE as the GGUF file TARGET, for llama.cpp."),
        "mlx": ("write", "Write SOURCE as a 2-bit MLX model, for Apple computers."),
        "revert": ("write", "Write SOURCE as dense bfloat16, for vLLM and converters."),
        "restore": ("write", "Make trainable latents of SOURCE, to train on from."),
    },
    "Check": {
        "verify": ("check", "Check that ARTIFACT, of any format, is the trained model."),
        "inspect": ("check", "Say what the model in PATH is, layer by layer."),
        "doctor": ("doctor", "Say what is installed, and what is missing for what."),
    },
}
"""By group and command: the module of this folder that has it, and its line in `--help`."""

_COMMANDS = {name: module for group in _GROUPS.values() for name, (module, _) in group.items()}


class _Commands(click.Group):
    """The group, with each command imported from its module when it is first used."""

    def list_commands(self, context: click.Context) -> list[str]:
        return list(_COMMANDS)

    def get_command(self, context: click.Context, name: str) -> click.Command | None:
        if name not in _COMMANDS:
            return None
        return cast(click.Command, getattr(import_module(f".{_COMMANDS[name]}", __package__), name))

    def format_commands(self, context: click.Context, formatter: click.HelpFormatter) -> None:
        for title, commands in _GROUPS.items():
            with formatter.section(title):
                formatter.write_dl([(f"{name:<7}", line) for name, (_, line) in commands.items()])


@click.group("bitnet", cls=_Commands, short_help="Ternary (1.58-bit) models.")
def main() -> None:
    """Ternary (1.58-bit) models: recipes, formats, proof.

    Exit status: 0 done; 1 verify: not the trained model, plan: the run would be refused; 2 bad input; 130
    interrupted.
    """
