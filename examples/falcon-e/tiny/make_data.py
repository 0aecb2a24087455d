"""Write the demo's tokenizer and data: two-digit sums as questions and answers.

The demo needs a task that is small enough for a laptop and has one right answer, so that "it learned" can be
counted instead of felt. This script makes everything that is not a weight::

    model/tokenizer.json, model/tokenizer_config.json    byte-level BPE, one token a digit, ChatML
    train.jsonl      questions with their answers, for supervised fine-tuning (sft.yaml)
    dpo.jsonl        some of these questions with the right answer preferred to a wrong one (dpo.yaml)
    heldout.jsonl    questions that are in neither of the two, for ask.py

The files are committed; running the script again writes the same bytes::

    python examples/falcon-e/tiny/make_data.py
"""

from __future__ import annotations

import argparse
import json
import random
from collections.abc import Iterable
from pathlib import Path
from typing import Any

from tokenizers import AddedToken, Tokenizer, decoders, models, pre_tokenizers, trainers

HERE = Path(__file__).resolve().parent

OPERANDS = range(0, 100)
HELDOUT = 500
PREFERENCES = 640
VOCABULARY = 512  # as in model/config.json

PAD, EOS = "<|pad|>", "<|im_end|>"
SPECIAL = [PAD, "<|im_start|>", EOS]
CHAT_TEMPLATE = (
    "{% for message in messages %}"
    "<|im_start|>{{ message['role'] }}\n{{ message['content'] }}<|im_end|>\n"
    "{% endfor %}"
    "{% if add_generation_prompt %}<|im_start|>assistant\n{% endif %}"
)


def question(a: int, b: int) -> dict[str, str]:
    """The user's turn."""
    return {"role": "user", "content": f"What is {a} + {b}?"}


def answer(value: int) -> dict[str, str]:
    """The assistant's turn."""
    return {"role": "assistant", "content": str(value)}


def wrong_sum(a: int, b: int, rng: random.Random) -> int:
    """A plausible mistake: a unit or a ten too many or too few, never below zero."""
    near = [a + b + error for error in (-10, -1, 1, 10)]
    return rng.choice([value for value in near if value >= 0])


def sft_row(a: int, b: int) -> dict[str, Any]:
    """A conversation, as axolotl's ``type: chat_template`` reads it."""
    return {"messages": [question(a, b), answer(a + b)]}


def dpo_row(a: int, b: int, rng: random.Random) -> dict[str, Any]:
    """A preference, as axolotl's ``type: chat_template.default`` reads it."""
    return {"messages": [question(a, b)], "chosen": answer(a + b), "rejected": answer(wrong_sum(a, b, rng))}


def build_tokenizer() -> Tokenizer:
    """A byte-level BPE that can write any text, knows the task's words, and splits numbers into digits."""
    tokenizer = Tokenizer(models.BPE())
    # Single digits let the model see the columns of an addition.
    tokenizer.pre_tokenizer = pre_tokenizers.Sequence(
        [pre_tokenizers.Digits(individual_digits=True), pre_tokenizers.ByteLevel(add_prefix_space=False)]
    )
    tokenizer.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=VOCABULARY,
        min_frequency=1,
        special_tokens=[AddedToken(token, special=True, normalized=False) for token in SPECIAL],
        initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
        show_progress=False,
    )
    # The digits around the words give them the spaces that they have in a question.
    tokenizer.train_from_iterator([question(1, 2)["content"], "user", "assistant"], trainer)
    # The task has few words: reserved tokens fill the vocabulary up to the size of the embedding.
    missing = VOCABULARY - tokenizer.get_vocab_size()
    tokenizer.add_special_tokens([AddedToken(f"<|reserved_{i}|>", normalized=False) for i in range(missing)])
    return tokenizer


def write_tokenizer(folder: Path) -> None:
    """Write the two files that AutoTokenizer reads."""
    folder.mkdir(parents=True, exist_ok=True)
    build_tokenizer().save(str(folder / "tokenizer.json"))
    settings = {
        "tokenizer_class": "PreTrainedTokenizerFast",
        "pad_token": PAD,
        "eos_token": EOS,
        "model_max_length": 512,
        "clean_up_tokenization_spaces": False,
        "chat_template": CHAT_TEMPLATE,
    }
    (folder / "tokenizer_config.json").write_text(json.dumps(settings, indent=2) + "\n", encoding="utf-8")


def write_jsonl(path: Path, rows: Iterable[dict[str, Any]]) -> None:
    """One JSON object a line."""
    path.write_text("".join(json.dumps(row, separators=(",", ":")) + "\n" for row in rows), encoding="utf-8")


def main() -> None:
    parser = argparse.ArgumentParser(description="Write the tokenizer and data of the tiny Falcon-E demo.")
    parser.add_argument("--out", type=Path, default=HERE, help="folder to write to (default: this script's)")
    parser.add_argument("--seed", type=int, default=0, help="of shuffle and wrong answers (default: 0)")
    args = parser.parse_args()

    rng = random.Random(args.seed)
    pairs = [(a, b) for a in OPERANDS for b in OPERANDS]
    rng.shuffle(pairs)
    heldout, train = pairs[:HELDOUT], pairs[HELDOUT:]

    write_tokenizer(args.out / "model")
    write_jsonl(args.out / "heldout.jsonl", (sft_row(a, b) for a, b in heldout))
    write_jsonl(args.out / "train.jsonl", (sft_row(a, b) for a, b in train))
    write_jsonl(args.out / "dpo.jsonl", (dpo_row(a, b, rng) for a, b in train[:PREFERENCES]))


if __name__ == "__main__":
    main()
