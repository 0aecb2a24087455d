"""Text that the dense model writes by itself, from random first tokens: data that needs no data.

    python experiments/convert_write.py MODEL DATA --sequences 1536 --length 1025

Sampled at temperature 1 from the whole distribution. DATA gets ``general.npy``, the first 256 sequences, for
measurements, and ``written.npy``, the others, to train on; both uint16 (sequences * length,).
"""

from __future__ import annotations

import argparse
from pathlib import Path

import numpy as np
import torch
from transformers import AutoModelForCausalLM


@torch.no_grad()
def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("model", type=Path)
    parser.add_argument("data", type=Path)
    parser.add_argument("--sequences", type=int, default=1536)
    parser.add_argument("--held", type=int, default=256, help="sequences for general.npy")
    parser.add_argument("--length", type=int, default=1025)
    args = parser.parse_args()
    device = "cuda" if torch.cuda.is_available() else "cpu"
    dtype = torch.bfloat16 if device == "cuda" else torch.float32
    model = AutoModelForCausalLM.from_pretrained(args.model, dtype=dtype).to(device).eval()
    torch.manual_seed(0)
    first = torch.randint(3, model.config.vocab_size, (args.sequences, 1), device=device)
    new = args.length - 1
    written = model.generate(
        first, attention_mask=torch.ones_like(first), do_sample=True, temperature=1.0, top_k=0, top_p=1.0,
        max_new_tokens=new, min_new_tokens=new, pad_token_id=0, eos_token_id=None,
    )  # fmt: skip
    tokens = written.cpu().numpy().astype(np.uint16)
    for name, rows in (("written", tokens[args.held :]), ("general", tokens[: args.held])):
        part = args.data / f"{name}.part"
        with part.open("wb") as file:
            np.save(file, rows.flatten())
        part.rename(args.data / f"{name}.npy")
    return 0


if __name__ == "__main__":
    raise SystemExit(main())
