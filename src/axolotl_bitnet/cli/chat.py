"""`chat`: talk to a packed model."""

from __future__ import annotations

import sys
from pathlib import Path

import click

from .terminal import command


@click.command()
@click.argument("folder", type=click.Path(exists=True, file_okay=False, path_type=Path))
@click.option("-p", "--prompt", "prompts", multiple=True, help="Say this and leave. Repeatable, in order.")
@click.option(
    "--max-tokens", type=click.IntRange(min=1), default=512, show_default=True, help="Tokens in an answer."
)
@command
def chat(folder: Path, prompts: tuple[str, ...], max_tokens: int) -> None:
    """Talk to the packed model in FOLDER, with its chat template; answers are greedy. An empty line or Ctrl-D
    ends the conversation.

    \b
    Example:
        axolotl-bitnet chat outputs/sft/packed
        axolotl-bitnet chat outputs/sft/packed --prompt "What is 17 + 25?"
    """
    from ..serving.chat import Chat  # imports torch, which `--help` does not need

    conversation = Chat(folder)
    for prompt in prompts or iter(_typed, ""):
        conversation.answer(prompt, max_tokens, lambda text: click.echo(text, nl=False))
        click.echo()


def _typed() -> str:
    if sys.stdin.isatty():
        click.echo("> ", nl=False, err=True)
    return sys.stdin.readline().strip()
