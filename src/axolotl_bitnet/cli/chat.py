"""`chat`: talk to a packed model."""

from __future__ import annotations

import sys
from pathlib import Path

import click

from ..serving.chat import Chat
from .terminal import command


@click.command()
@click.argument("folder", type=click.Path(exists=True, file_okay=False, path_type=Path))
@click.option("-p", "--prompt", "prompts", multiple=True, help="Say this and leave; repeatable, in order.")
@click.option(
    "--max-tokens", type=click.IntRange(min=1), default=512, show_default=True, help="Of an answer."
)
@command
def chat(folder: Path, prompts: tuple[str, ...], max_tokens: int) -> None:
    """Talk to the packed model in FOLDER, with its chat template; answers are greedy. An empty line or Ctrl-D
    ends the conversation.

    \b
    Example:
        axolotl-bitnet chat outputs/falcon-e-3b-sft/packed
        axolotl-bitnet chat outputs/falcon-e-3b-sft/packed --prompt "What is a ternary weight?"
    """
    conversation = Chat(folder)
    for prompt in prompts or iter(_typed, ""):
        conversation.answer(prompt, max_tokens, lambda text: click.echo(text, nl=False))
        click.echo()


def _typed() -> str:
    if sys.stdin.isatty():
        click.echo("> ", nl=False, err=True)
    return sys.stdin.readline().strip()
