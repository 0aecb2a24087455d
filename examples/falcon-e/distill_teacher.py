"""What a dense teacher would have said: its most likely next tokens at every place of every conversation.

Reads conversations (jsonl, {"messages": [...]} a line), writes a parquet file with two more columns, as
Axolotl's kd plugin reads them: ``logprobs`` and ``target_token_ids``, (tokens, top-k) each. Row i is the
teacher's distribution of the token after the i-th. The student must have the teacher's tokenizer and chat
template.

    python examples/falcon-e/distill_teacher.py TEACHER conversations.jsonl teacher.parquet
"""

from __future__ import annotations

import argparse
import json
import tempfile
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import torch
from datasets import Dataset, Features, Sequence, Value
from torch import Tensor
from transformers import AutoModelForCausalLM, AutoTokenizer

DEVICE = "cuda" if torch.cuda.is_available() else "cpu"
FEATURES = Features(
    {
        "messages": [{"role": Value("string"), "content": Value("string")}],
        "logprobs": Sequence(Sequence(Value("float32"))),
        "target_token_ids": Sequence(Sequence(Value("int32"))),
    }
)


@torch.no_grad()
def most_likely(teacher: Any, samples: list[list[int]], top_k: int) -> list[tuple[Tensor, Tensor]]:
    """Log-probabilities and ids of the top_k next tokens, (tokens, top_k) for each sample."""
    longest = max(map(len, samples))
    ids = torch.tensor([sample + [0] * (longest - len(sample)) for sample in samples], device=DEVICE)
    mask = torch.tensor(
        [[1] * len(sample) + [0] * (longest - len(sample)) for sample in samples], device=DEVICE
    )
    logits = teacher(input_ids=ids, attention_mask=mask, use_cache=False).logits
    likely, places = logits.topk(top_k)
    logprobs = (likely.float() - logits.float().logsumexp(-1, keepdim=True)).cpu()
    return [
        (row[: len(sample)], at[: len(sample)])
        for row, at, sample in zip(logprobs, places.cpu(), samples, strict=True)
    ]


def rows(args: argparse.Namespace) -> Iterator[dict[str, Any]]:
    tokenizer = AutoTokenizer.from_pretrained(args.teacher)
    dtype = torch.bfloat16 if DEVICE == "cuda" else torch.float32
    teacher = AutoModelForCausalLM.from_pretrained(args.teacher, dtype=dtype).to(DEVICE).eval()
    batch: list[tuple[Any, list[int]]] = []

    def flushed() -> Iterator[dict[str, Any]]:
        answers = most_likely(teacher, [ids for _, ids in batch], args.top_k)
        for (messages, _), (logprobs, ids) in zip(batch, answers, strict=True):
            yield {"messages": messages, "logprobs": logprobs.numpy(), "target_token_ids": ids.numpy()}
        batch.clear()

    found = False
    with args.conversations.open(encoding="utf-8") as lines:
        for line in lines:
            messages = json.loads(line)["messages"]
            ids = tokenizer.apply_chat_template(messages, return_dict=False)
            if len(ids) <= args.sequence_len:  # Axolotl drops the others
                batch.append((messages, ids))
            found = found or bool(batch)
            if len(batch) == args.batch:
                yield from flushed()
    if not found:
        raise ValueError(f"{args.conversations}: no conversation of {args.sequence_len} tokens or fewer")
    if batch:
        yield from flushed()


def main() -> None:
    parser = argparse.ArgumentParser(description="Write a teacher's most likely next tokens.")
    parser.add_argument("teacher", type=Path)
    parser.add_argument("conversations", type=Path)
    parser.add_argument("out", type=Path)
    parser.add_argument("--top-k", type=int, default=32)
    parser.add_argument("--sequence-len", type=int, default=2048, help="as in the YAML")
    parser.add_argument("--batch", type=int, default=16)
    args = parser.parse_args()
    args.out.parent.mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryDirectory() as cache:
        written = Dataset.from_generator(rows, FEATURES, cache, gen_kwargs={"args": args})
        written.to_parquet(str(args.out))
    print(f"{len(written)} conversations with {args.top_k} log-probabilities a token: {args.out}")


if __name__ == "__main__":
    main()
