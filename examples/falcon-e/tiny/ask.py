"""Ask a trained model the held-out questions, with plain transformers, and count the exact answers.

What loads here is what ships: nothing of the training code is imported. Any folder that transformers can load
will do::

    python examples/falcon-e/tiny/ask.py outputs/tiny-sft/packed
    python examples/falcon-e/tiny/ask.py outputs/tiny-sft/packed --min 0.9    # exit 1 below 90 %

Mind that ``outputs/tiny-sft`` itself holds latents, which plain transformers runs as a dense model: its
answers are not those of the ternary model, and need not be right.
"""

from __future__ import annotations

import argparse
import json
import os
import sys
from pathlib import Path
from typing import Any

# Transformers compiles the unpacking of 2-bit weights: that needs a C++ compiler and outlasts the answering.
os.environ["TORCH_COMPILE_DISABLE"] = "1"

import torch
from transformers import AutoModelForCausalLM, AutoTokenizer

HELDOUT = Path(__file__).resolve().parent / "heldout.jsonl"
BATCH = 100
MAX_NEW_TOKENS = 8  # the longest right answer has three digits and the end of the turn
SHOWN = 5


def read_questions(path: Path) -> list[tuple[dict[str, str], str]]:
    """The user's turn and the right answer of every row."""
    rows = [json.loads(line) for line in path.read_text(encoding="utf-8").splitlines()]
    if not rows:
        raise SystemExit(f"{path} holds no questions")
    return [(row["messages"][0], row["messages"][1]["content"]) for row in rows]


@torch.no_grad()
def ask(model: Any, tokenizer: Any, turns: list[dict[str, str]]) -> list[str]:
    """The model's greedy answers to one batch of questions."""
    inputs = tokenizer.apply_chat_template(
        [[turn] for turn in turns],
        add_generation_prompt=True,
        padding=True,
        return_dict=True,
        return_tensors="pt",
    ).to(model.device)
    tokens = model.generate(**inputs, max_new_tokens=MAX_NEW_TOKENS, do_sample=False)
    return tokenizer.batch_decode(tokens[:, inputs["input_ids"].shape[1] :], skip_special_tokens=True)


def main() -> None:
    parser = argparse.ArgumentParser(description="Ask a model the held-out questions, count exact answers.")
    parser.add_argument("model", type=Path, help="folder of a packed model: outputs/tiny-sft/packed")
    parser.add_argument("heldout", type=Path, nargs="?", default=HELDOUT, help="default: %(default)s")
    parser.add_argument("--min", type=float, default=0.0, metavar="SHARE", help="exit 1 below it (0.9)")
    args = parser.parse_args()
    for path in (args.model / "config.json", args.heldout):
        if not path.is_file():
            raise SystemExit(f"{path} does not exist")

    # A batch of a decoder-only model continues at the right end, so the padding must be on the left.
    tokenizer = AutoTokenizer.from_pretrained(args.model, padding_side="left")
    model = AutoModelForCausalLM.from_pretrained(args.model, dtype=torch.float32).eval()
    model.to("cuda" if torch.cuda.is_available() else "cpu")

    questions = read_questions(args.heldout)
    answers: list[str] = []
    for start in range(0, len(questions), BATCH):
        answers += ask(model, tokenizer, [turn for turn, _ in questions[start : start + BATCH]])

    for (turn, _), answer in list(zip(questions, answers, strict=True))[:SHOWN]:
        print(f"{turn['content']} {answer}")
    exact = sum(answer == right for (_, right), answer in zip(questions, answers, strict=True))
    share = exact / len(questions)
    print(f"held-out: {exact} of {len(questions)} exact ({share:.1%})".replace("%)", " %)"))
    if share < args.min:
        sys.exit(1)


if __name__ == "__main__":
    main()
