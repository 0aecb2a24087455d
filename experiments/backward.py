"""Whether 8-bit input gradients learn as well: the same model, data and seeds, with and without them.

Any Llama-like checkpoint of transformers and any text. Latents and optimizer state in float32, compute under
bfloat16 autocast (float32 without a GPU), AdamW; the last tenth of the text is held out.

    python experiments/backward.py MODEL_FOLDER TEXT --steps 400 --out experiments/results/backward.csv
"""

from __future__ import annotations

import argparse
from pathlib import Path
from typing import Any

import torch
from shared import RESULTS, free, machine, write_csv
from torch import Tensor

from axolotl_bitnet import convert_to_bitlinear

DEVICE = "cuda" if torch.cuda.is_available() else "cpu"


def batches(tokens: Tensor, count: int, length: int, seed: int) -> Tensor:
    """(count, length) windows of a text, drawn at random."""
    generator = torch.Generator().manual_seed(seed)
    starts = torch.randint(len(tokens) - length, (count,), generator=generator)
    return torch.stack([tokens[start : start + length] for start in starts.tolist()]).to(DEVICE)


def loss_of(model: Any, ids: Tensor) -> Tensor:
    with torch.autocast(DEVICE, torch.bfloat16, enabled=DEVICE == "cuda"):
        return model(ids, labels=ids, use_cache=False).loss


def train(text: Tensor, seed: int, args: argparse.Namespace, **settings: Any) -> list[dict[str, Any]]:
    """Losses of one training, every ``args.every`` steps."""
    from transformers import AutoModelForCausalLM

    free()
    model = AutoModelForCausalLM.from_pretrained(args.model, dtype=torch.float32).to(DEVICE)
    convert_to_bitlinear(model, **settings)
    optimizer = torch.optim.AdamW(model.parameters(), lr=args.lr, weight_decay=0.0, fused=True)
    schedule = torch.optim.lr_scheduler.OneCycleLR(optimizer, args.lr, args.steps, pct_start=0.05)
    edge = len(text) * 9 // 10
    held_out = batches(text[edge:], 4 * args.batch, args.length, seed=0).split(args.batch)
    rows, recent = [], []
    for step in range(1, args.steps + 1):
        loss = loss_of(model, batches(text[:edge], args.batch, args.length, seed * 1_000_000 + step))
        loss.backward()
        optimizer.step()
        schedule.step()
        optimizer.zero_grad(set_to_none=True)
        recent.append(loss.detach())
        if step % args.every == 0:
            model.eval()
            with torch.no_grad():
                evaluated = torch.stack([loss_of(model, ids) for ids in held_out]).mean()
            model.train()
            row = dict(backward=settings["backward"], seed=seed, step=step)
            rows.append(row | dict(loss=f"{torch.stack(recent).mean():.4f}", eval_loss=f"{evaluated:.4f}"))
            print(*rows[-1].values(), flush=True)
            recent.clear()
    return rows


def main() -> None:
    parser = argparse.ArgumentParser(description="Whether 8-bit input gradients learn as well.")
    parser.add_argument("model", type=Path)
    parser.add_argument("text", type=Path)
    parser.add_argument("--steps", type=int, default=400)
    parser.add_argument("--every", type=int, default=50)
    parser.add_argument("--batch", type=int, default=8)
    parser.add_argument("--length", type=int, default=1024)
    parser.add_argument("--lr", type=float, default=5e-4)
    parser.add_argument("--seeds", type=int, nargs="+", default=[1])
    parser.add_argument("--out", type=Path, default=RESULTS / "backward.csv")
    args = parser.parse_args()

    from transformers import AutoTokenizer

    print(machine() if DEVICE == "cuda" else DEVICE)
    text = torch.tensor(AutoTokenizer.from_pretrained(args.model)(args.text.read_text())["input_ids"])
    rows: list[dict[str, Any]] = []
    for seed in args.seeds:
        for backward in ("bf16", "int8_dx"):
            rows += train(text, seed, args, backward=backward)
            write_csv(args.out, rows)


if __name__ == "__main__":
    main()
