"""`axolotl-bitnet ...`, and the same as `python -m axolotl_bitnet ...` or `axolotl bitnet ...`.

A command's module is imported when the command runs, not before: importing torch takes seconds, and neither
`--help` nor the commands that need no torch should wait for it.
"""

from __future__ import annotations

from importlib import import_module
from typing import cast

import click

_COMMANDS = {
    "chat": ("chat", "Talk to the packed model in FOLDER."),
    "doctor": ("doctor", "Say what is installed, which kernels will run, and what is missing for what."),
    "gguf": ("write", "Write SOURCE as the GGUF file TARGET, for llama.cpp."),
    "inspect": ("check", "Say what the model in PATH is: latents, packed, GGUF, ..."),
    "mlx": ("write", "Write SOURCE as a 2-bit MLX model, for mlx-lm on Apple computers."),
    "pack": ("write", "Pack SOURCE into TARGET, 2 bits a weight."),
    "plan": ("plan", "Say what training CONFIG will do: refusals, rates, memory, sizes."),
    "recipes": ("recipes", "Copy the recipes into DIRECTORY."),
    "report": ("report", "Write the run in OUTPUT_DIR as one page with plots."),
    "restore": ("write", "Make trainable latents of SOURCE, a packed or dense ternary model."),
    "revert": ("write", "Write SOURCE as dense bfloat16, for vLLM, SGLang and converters."),
    "verify": ("check", "Check that ARTIFACT, of any format, is the trained model."),
}
"""By command: the module of this folder that has it, and its line in `--help`."""


class _Commands(click.Group):
    """The group, with each command imported from its module when it is first used."""

    def list_commands(self, context: click.Context) -> list[str]:
        return list(_COMMANDS)

    def get_command(self, context: click.Context, name: str) -> click.Command | None:
        if name not in _COMMANDS:
            return None
        return cast(click.Command, getattr(import_module(f".{_COMMANDS[name][0]}", __package__), name))

    def format_commands(self, context: click.Context, formatter: click.HelpFormatter) -> None:
        with formatter.section("Commands"):
            formatter.write_dl([(name, line) for name, (_, line) in _COMMANDS.items()])


@click.group("bitnet", cls=_Commands, short_help="Ternary (1.58-bit) models.")
def main() -> None:
    """Ternary (1.58-bit) models: recipes, formats, proof.

    Exit status: 0 done (of verify: nothing differs), 1 not the trained model, 2 bad input, 130 interrupted.
    """
