"""Text that the dense model writes by itself, from random first tokens: data that needs no data.

    python experiments/convert_write.py MODEL DATA --sequences 3584 --length 1025

Sampled at temperature 1 from the whole distribution. DATA gets ``general.npy``, the first 256 sequences, for
measurements, and ``written.npy``, the others, to train on; both uint16 (sequences * length,).

transformers' ``generate`` copies all keys and values for each token. Here they have their place from the
beginning, so that over a thousand sequences are written at once.
"""

from __future__ import annotations

import argparse
import time
from pathlib import Path
from typing import Any

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor
from transformers import AutoModelForCausalLM
from transformers.models.llama.modeling_llama import apply_rotary_pos_emb


class Writer:
    """A Llama that reads one token of each sequence at a time."""

    def __init__(self, model: Any, sequences: int, length: int) -> None:
        config = model.config
        self.model, self.heads = model.model, config.num_key_value_heads
        self.logits = model.lm_head
        shape = sequences, self.heads, length, model.model.layers[0].self_attn.head_dim
        made = model.model.embed_tokens.weight.new_empty
        self.cache = [(made(shape), made(shape)) for _ in model.model.layers]

    def __call__(self, ids: Tensor, place: int) -> Tensor:
        """Logits (sequences, vocabulary) of the token after ``ids`` (sequences,) at ``place``."""
        hidden = self.model.embed_tokens(ids)[:, None]
        cos_sin = self.model.rotary_emb(hidden, torch.full((1, 1), place, device=ids.device))
        for layer, (keys, values) in zip(self.model.layers, self.cache, strict=True):
            attention, x = layer.self_attn, layer.input_layernorm(hidden)
            split = (len(ids), 1, -1, attention.head_dim)
            q, k, v = (
                project(x).view(split).transpose(1, 2)
                for project in (attention.q_proj, attention.k_proj, attention.v_proj)
            )
            q, k = apply_rotary_pos_emb(q, k, *cos_sin)
            keys[:, :, place], values[:, :, place] = k[:, :, 0], v[:, :, 0]
            # the query heads that share a key are its queries: keys are read once
            q = q.reshape(len(ids), self.heads, -1, attention.head_dim)
            x = F.scaled_dot_product_attention(q, keys[:, :, : place + 1], values[:, :, : place + 1])
            hidden = hidden + attention.o_proj(x.reshape(len(ids), 1, -1))
            hidden = hidden + layer.mlp(layer.post_attention_layernorm(hidden))
        return self.logits(self.model.norm(hidden))[:, 0]


@torch.no_grad()
def write(model: Any, sequences: int, length: int) -> Tensor:
    """Tokens, int64 (sequences, length)."""
    writer = Writer(model, sequences, length - 1)
    device = model.lm_head.weight.device
    tokens = torch.randint(3, model.config.vocab_size, (sequences, length), device=device)
    for place in range(length - 1):
        chances = writer(tokens[:, place], place).float().softmax(-1)
        # the largest of p / Exp(1) falls on a token with its chance p
        tokens[:, place + 1] = chances.div_(torch.empty_like(chances).exponential_()).argmax(-1)
    return tokens


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("model", type=Path)
    parser.add_argument("data", type=Path)
    parser.add_argument("--sequences", type=int, default=3584)
    parser.add_argument("--held", type=int, default=256, help="sequences for general.npy")
    parser.add_argument("--length", type=int, default=1025)
    parser.add_argument("--batch", type=int, default=1280, help="sequences written at once")
    args = parser.parse_args()
    device = "cuda" if torch.cuda.is_available() else "cpu"
    dtype = torch.bfloat16 if device == "cuda" else torch.float32
    model = AutoModelForCausalLM.from_pretrained(args.model, dtype=dtype).to(device).eval()
    torch.manual_seed(0)
    began, parts = time.monotonic(), []
    for start in range(0, args.sequences, args.batch):
        part = write(model, min(args.batch, args.sequences - start), args.length)
        parts.append(part.cpu().numpy().astype(np.uint16))
        print(f"{start + len(part)} sequences, {time.monotonic() - began:.1f} s", flush=True)
    tokens = np.concatenate(parts)
    for name, rows in (("general", tokens[: args.held]), ("written", tokens[args.held :])):
        path = args.data / f"{name}.part"
        with path.open("wb") as file:
            np.save(file, rows.flatten())
        path.rename(args.data / f"{name}.npy")
    return 0


if __name__ == "__main__":
    raise SystemExit(main())
