"""Talking to a packed model: its template, its own greedy tokens, what went before."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from click.testing import CliRunner
from transformers import AutoTokenizer

from axolotl_bitnet import load_packed, pack_checkpoint
from axolotl_bitnet.cli.main import main
from axolotl_bitnet.serving.chat import Chat
from support.llamas import TINY, build, save

QUESTIONS = ["What is 1 + 2?", "And 3 more?"]


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    root = tmp_path_factory.mktemp("chat")
    torch.manual_seed(3)
    pack_checkpoint(save(build(), root / "latents", TINY / "model"), root / "packed")
    return root / "packed"


def answers(folder: Path, questions: list[str], limit: int) -> list[str]:
    """What transformers' generate says, turn by turn."""
    model, tokenizer = load_packed(folder, dtype=torch.float32), AutoTokenizer.from_pretrained(folder)
    said: list[dict[str, str]] = []
    for question in questions:
        said.append({"role": "user", "content": question})
        ids = tokenizer.apply_chat_template(
            said, add_generation_prompt=True, return_dict=True, return_tensors="pt"
        )["input_ids"]
        tokens = model.generate(ids, max_new_tokens=limit, do_sample=False)[0, ids.shape[1] :]
        said.append({"role": "assistant", "content": tokenizer.decode(tokens, skip_special_tokens=True)})
    return [turn["content"] for turn in said if turn["role"] == "assistant"]


@pytest.mark.slow
def test_a_conversation(folder: Path) -> None:
    chat, pieces = Chat(folder, "cpu"), []
    found = [chat.answer(question, 12, pieces.append) for question in QUESTIONS]
    assert found == answers(folder, QUESTIONS, 12) and all(found)
    assert "".join(pieces) == "".join(found) and len(pieces) > 4  # in pieces, as they came


def test_the_command_says_prompts_and_leaves(folder: Path) -> None:
    words = ["chat", str(folder), "--max-tokens", "12"]
    for question in QUESTIONS:
        words += ["--prompt", question]
    result = CliRunner().invoke(main, words)
    assert result.exit_code == 0, result.output
    assert result.stdout == "".join(f"{text}\n" for text in answers(folder, QUESTIONS, 12))


def test_lines_are_read_until_an_empty_one(folder: Path) -> None:
    result = CliRunner().invoke(main, ["chat", str(folder), "--max-tokens", "6"], input="one\n\ntwo\n")
    assert result.exit_code == 0 and result.stdout == f"{answers(folder, ['one'], 6)[0]}\n"


def test_a_folder_that_is_not_packed(folder: Path) -> None:
    result = CliRunner().invoke(main, ["chat", str(folder.parent / "latents"), "--prompt", "x"])
    assert result.exit_code == 2 and "it is not a packed model's" in result.output


def test_without_a_template_text_goes_on(folder: Path) -> None:
    chat = Chat(folder, "cpu")
    chat.tokenizer.chat_template = None
    ids = chat.tokenizer("What", return_tensors="pt")["input_ids"]
    expected = chat.model.generate(ids, max_new_tokens=5, do_sample=False)[0, ids.shape[1] :]
    found = chat.answer("What", 5, lambda text: None)
    assert found == chat.tokenizer.decode(expected, skip_special_tokens=True)
