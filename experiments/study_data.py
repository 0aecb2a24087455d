"""Token batches of the study: a text as it is, as conversations (SFT), and as pairs of answers (DPO).

The last tenth of the text's lines is held out for all three. Every batch is ``ids`` and ``labels``, int64
(rows, length), where labels[i, j] is the token that follows ids[i, j], or -100 where no loss is taken.
"""

from __future__ import annotations

import random
import re
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

IGNORED = -100
REFERENCE = re.compile(r"^\S*\d+:\d+ ")  # "Ge1:1 ", before each verse of the King James Bible


@dataclass(frozen=True)
class Batches:
    """Batches of one task: ``train`` is a stream of tokens, or samples (samples, length), or pairs of them
    (samples, 2, length)."""

    train: tuple[Tensor, Tensor]
    held_out: list[tuple[Tensor, Tensor]]
    batch: int
    length: int

    def draw(self, steps: int, seed: int) -> tuple[Tensor, Tensor]:
        """ids and labels of every step, (steps, rows, length), drawn with this seed."""
        generator = torch.Generator().manual_seed(seed)
        ids, labels = self.train
        if ids.dim() == 1:  # a stream: windows at random places
            starts = torch.randint(len(ids) - self.length, (steps * self.batch,), generator=generator)
            places = starts[:, None] + torch.arange(self.length)
            drawn = ids[places], labels[places]
        else:  # samples: one permutation after another
            epochs = -(-steps * self.batch // len(ids))
            order = torch.cat([torch.randperm(len(ids), generator=generator) for _ in range(epochs)])
            order = order[: steps * self.batch]
            drawn = ids[order], labels[order]
        rows = [_rows(part.view(steps, self.batch, *part.shape[1:])) for part in drawn]
        return rows[0], rows[1]


def _rows(batches: Tensor) -> Tensor:
    """(steps, batch, length) as it is; pairs (steps, batch, 2, length) with all first answers first."""
    return batches if batches.dim() == 3 else batches.transpose(1, 2).flatten(1, 2)


def load(text: Path, tokenizer: Any, small: bool = False) -> dict[str, Batches]:
    """The three tasks, 8,192 tokens per step (some hundred if ``small``, to try the script on a CPU)."""
    lines = [line.strip() for line in text.read_text(encoding="utf-8").splitlines() if line.strip()]
    edge = len(lines) * 9 // 10
    parts = lines[:edge], lines[edge:]
    sizes = ((2, 128), (2, 128), (2, 64)) if small else ((8, 1024), (16, 512), (16, 256))
    makers = {"lm": _stream, "sft": _conversations, "dpo": _pairs}
    return {
        task: make(parts, tokenizer, *size) for (task, make), size in zip(makers.items(), sizes, strict=True)
    }


def _stream(parts: tuple[list[str], list[str]], tokenizer: Any, batch: int, length: int) -> Batches:
    train, held_out = (torch.tensor(tokenizer("\n".join(part))["input_ids"]) for part in parts)
    windows = (len(held_out) - 1) // length
    ids = held_out[: windows * length].view(windows, length)
    labels = held_out[1 : windows * length + 1].view(windows, length)
    return Batches((train[:-1], train[1:]), _split(ids, labels, batch), batch, length)


def _conversations(parts: tuple[list[str], list[str]], tokenizer: Any, batch: int, length: int) -> Batches:
    encoded = []
    for part in parts:
        verses = [REFERENCE.sub("", line) for line in part]
        starts = range(0, len(verses) - 9, 9)
        answers = [" ".join(verses[i + 1 : i + 9]) for i in starts]
        encoded.append(_chats(tokenizer, [verses[i] for i in starts], answers, length))
    return Batches(encoded[0], _split(*encoded[1], batch), batch, length)


def _pairs(parts: tuple[list[str], list[str]], tokenizer: Any, batch: int, length: int) -> Batches:
    """The passage as it goes on against the same words shuffled."""
    shuffle = random.Random(0).shuffle
    encoded = []
    for part in parts:
        verses = [REFERENCE.sub("", line) for line in part]
        questions, answers = [], []
        for i in range(0, len(verses) - 4, 4):
            words = " ".join(verses[i + 1 : i + 4]).split()
            shuffled = words[:]
            shuffle(shuffled)
            questions += [verses[i]] * 2
            answers += [" ".join(words), " ".join(shuffled)]
        ids, labels = _chats(tokenizer, questions, answers, length)
        encoded.append((ids.view(-1, 2, length), labels.view(-1, 2, length)))
    ids, labels = (part[: 8 * batch] for part in encoded[1])
    pairs = zip(ids.split(batch), labels.split(batch), strict=True)
    return Batches(encoded[0], [(_rows(a[None])[0], _rows(b[None])[0]) for a, b in pairs], batch, length)


def _chats(tokenizer: Any, questions: list[str], answers: list[str], length: int) -> tuple[Tensor, Tensor]:
    """Exchanges in ChatML, padded; loss on the answers and the tokens that end them."""
    before = "<|im_start|>user\nContinue the passage: {}<|im_end|>\n<|im_start|>assistant\n"
    prompts = tokenizer([before.format(question) for question in questions])["input_ids"]
    replies = tokenizer([f"{answer}<|im_end|>" for answer in answers])["input_ids"]
    ids = torch.zeros(len(prompts), length, dtype=torch.long)
    labels = torch.full((len(prompts), length), IGNORED)
    for row, (prompt, reply) in enumerate(zip(prompts, replies, strict=True)):
        prompt = prompt[: length // 2]
        tokens = (prompt + reply)[: length + 1]
        ids[row, : len(tokens) - 1] = torch.tensor(tokens[:-1])
        labels[row, len(prompt) - 1 : len(tokens) - 1] = torch.tensor(tokens[len(prompt) :])
    return ids, labels


def _split(ids: Tensor, labels: Tensor, batch: int) -> list[tuple[Tensor, Tensor]]:
    whole = len(ids) // batch * batch
    return list(zip(ids[:whole].split(batch), labels[:whole].split(batch), strict=True))
