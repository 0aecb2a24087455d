"""GRPO's rollouts without vLLM, before and after: a policy in training that generates, on one GPU::

    python benchmarks/rollout.py        # to results/rollout.csv here

The shape of Falcon-E-3B with random weights, float32 latents, bfloat16 autocast around its forward as the
Trainer has it, prompts of 64 tokens, greedy. ``bitlinear`` is the policy as it trains, ``codes kept`` the
same with its codes kept between the steps of gradient accumulation (a byte a weight), ``packed`` what a run
does now, and ``bf16`` the dense model. All but ``bf16`` give the same tokens, which is checked.
"""

from __future__ import annotations

import argparse
import time
from contextlib import nullcontext
from typing import Any

import torch
from common import RESULTS, append_csv, free, machine
from scaling import SHAPES, VOCABULARY
from torch import Tensor

from axolotl_bitnet import convert_to_bitlinear
from axolotl_bitnet.layers.weight_codes import weights_unchanged
from axolotl_bitnet.serving.rollouts import packed_layers

COLUMNS = ("machine", "date", "model", "sequences", "who", "tokens", "seconds", "tokens_s", "peak_gib")
WAYS = {"bf16": None, "bitlinear": nullcontext, "codes kept": weights_unchanged, "packed": packed_layers}


def make(layers: int) -> Any:
    from transformers import LlamaConfig, LlamaForCausalLM

    config = LlamaConfig(
        **(SHAPES["3B"] | {"num_hidden_layers": layers}), vocab_size=VOCABULARY,
        max_position_embeddings=4096, tie_word_embeddings=False,
    )  # fmt: skip
    with torch.device("cuda"):
        return LlamaForCausalLM(config).eval()


@torch.no_grad()
def generate(model: Any, way: str, ids: Tensor, tokens: int) -> Tensor:
    inside = WAYS[way]
    arguments = (model,) if way == "packed" else ()
    with nullcontext() if inside is None else inside(*arguments), torch.autocast("cuda", torch.bfloat16):
        found = model.generate(
            ids, attention_mask=torch.ones_like(ids), min_new_tokens=tokens, max_new_tokens=tokens,
            do_sample=False, pad_token_id=0,
        )  # fmt: skip
    return found


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--layers", type=int, default=32)
    parser.add_argument("--sequences", type=int, nargs="+", default=[1, 8, 16, 32, 64])
    parser.add_argument("--tokens", type=int, default=32)
    args = parser.parse_args()
    about = {"machine": machine(), "date": time.strftime("%Y-%m-%d")}
    about |= {"model": f"3B shape, {args.layers} layers", "tokens": args.tokens}
    model = make(args.layers)
    first: dict[int, Tensor] = {}
    for way in WAYS:
        if way == "bf16":
            model.to(torch.bfloat16)
        elif way == "bitlinear":
            model.to(torch.float32)
            convert_to_bitlinear(model)
        for sequences in args.sequences:
            torch.manual_seed(0)
            ids = torch.randint(1, 1000, (sequences, 64), device="cuda")
            generate(model, way, ids, 4)
            free()
            torch.cuda.synchronize()
            start = time.perf_counter()
            found = generate(model, way, ids, args.tokens)
            torch.cuda.synchronize()
            seconds = time.perf_counter() - start
            if way != "bf16":
                same = torch.equal(found, first.setdefault(sequences, found))
                assert same, f"{way}, {sequences} sequences: other tokens"
            row = about | {"sequences": sequences, "who": way, "seconds": round(seconds, 3)}
            row |= {"tokens_s": round(sequences * args.tokens / seconds, 1)}
            row |= {"peak_gib": round(torch.cuda.max_memory_allocated() / 2**30, 2)}
            print(row, flush=True)
            append_csv(RESULTS / "rollout.csv", COLUMNS, [row])


if __name__ == "__main__":
    main()
