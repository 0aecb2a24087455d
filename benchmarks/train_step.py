"""The whole training step of Falcon-E-shaped Llamas: forward, backward and a fused AdamW step, no loss head.

Random weights and tokens; every peer in one process, medians, peak memory allocated. ``help`` is what
everybody gets: none, Liger's kernels (RMSNorm, rotary embedding, SwiGLU), or decoder layers under
torch.compile. ``latents`` is the dtype of weights, gradients and optimizer state; float32 computes under
bfloat16 autocast.

    python benchmarks/train_step.py --out benchmarks/results/train_step.csv
"""

from __future__ import annotations

import argparse
import itertools
import sys
from collections.abc import Iterator
from contextlib import contextmanager, nullcontext
from datetime import date
from pathlib import Path
from typing import Any

import torch
from common import FLOAT8, PEERS, RESULTS, free, machine, make_ternary, median_ms, read_csv, write_csv

from axolotl_bitnet.layers.weight_codes import weights_unchanged as weights_unchanged

SHAPES = {"1B": (9216, 24), "3B": (13312, 32)}  # intermediate size, layers; hidden 2048, heads 16 / 2 of 128
ROWS = {  # name: shape, sequences of a micro-batch, tokens of each, micro-batches per step, checkpointing
    "3B 8k": ("3B", 1, 8192, 1, False),
    "3B 32k ckpt": ("3B", 4, 8192, 1, True),
    "1B 8k": ("1B", 1, 8192, 1, False),
    "1B 4x4k ckpt": ("1B", 1, 4096, 4, True),
}
HELPS = ("none", "liger", "compile")
LATENTS = ("bfloat16", "float32")
OURS = {f"axolotl-bitnet, {backward}": backward for backward in ("int8_dx", "int8")}


def build(shape: str, peer: str, help: str, checkpointing: bool, dtype: torch.dtype, **settings: Any) -> Any:
    """A Llama without head on the GPU, random, converted, in training mode."""
    from transformers import LlamaConfig, LlamaModel

    intermediate, layers = SHAPES[shape]
    config = LlamaConfig(
        hidden_size=2048,
        intermediate_size=intermediate,
        num_hidden_layers=layers,
        num_attention_heads=16,
        num_key_value_heads=2,
        head_dim=128,
        vocab_size=32768,
        max_position_embeddings=32768,
        attn_implementation="sdpa",
        use_cache=False,
    )
    torch.manual_seed(0)
    default = torch.get_default_dtype()
    torch.set_default_dtype(dtype)
    with torch.device("cuda"):
        model = LlamaModel(config)
    torch.set_default_dtype(default)
    make_ternary(model, peer, **settings)
    if checkpointing:
        model.gradient_checkpointing_enable({"use_reentrant": False})
    if help == "compile":
        for layer in model.layers:
            layer.compile()
    return model.train()


@contextmanager
def helped(help: str) -> Iterator[None]:
    """Liger's classes and functions in place of transformers' own, as Axolotl's plugin puts them."""
    from transformers.models.llama import modeling_llama

    own = dict(vars(modeling_llama))
    if help == "liger":
        from liger_kernel.transformers import apply_liger_kernel_to_llama

        apply_liger_kernel_to_llama(cross_entropy=False, fused_linear_cross_entropy=False)
    try:
        yield
    finally:
        vars(modeling_llama).update(own)


def measure(
    row: str, peer: str, help: str, dtype: torch.dtype, repeats: int, **settings: Any
) -> tuple[float, float]:
    """Median milliseconds of a step, and the peak of allocated GiB."""
    shape, sequences, tokens, micro_batches, checkpointing = ROWS[row]
    free()
    with helped(help):
        model = build(shape, peer, help, checkpointing, dtype, **settings)
        optimizer = torch.optim.AdamW(model.parameters(), lr=1e-5, fused=True)
        ids = torch.randint(32768, (sequences, tokens), device="cuda")
        gradient = torch.randn(sequences, tokens, 2048, device="cuda", dtype=torch.bfloat16) / tokens
        # As the plugin's callback does; weights that are read once need no memory for it.
        rereads = peer == "axolotl-bitnet" and (micro_batches > 1 or checkpointing)
        window = weights_unchanged if rereads else nullcontext

        def step() -> None:
            with window():
                for _ in range(micro_batches):
                    with torch.autocast("cuda", torch.bfloat16, enabled=dtype == torch.float32):
                        hidden = model(ids).last_hidden_state
                    hidden.backward(gradient.to(hidden.dtype))
            optimizer.step()
            optimizer.zero_grad(set_to_none=True)

        step()
        torch.cuda.reset_peak_memory_stats()
        milliseconds = median_ms(step, repeats, warmup=1)
    return milliseconds, torch.cuda.max_memory_allocated() / 2**30


def main() -> None:
    parser = argparse.ArgumentParser(description="The whole training step of Falcon-E-shaped Llamas.")
    parser.add_argument("--rows", nargs="+", choices=ROWS, default=list(ROWS))
    parser.add_argument("--helps", nargs="+", choices=HELPS, default=list(HELPS))
    parser.add_argument("--peers", nargs="+", choices=(*PEERS, *OURS, *FLOAT8), default=list(PEERS))
    parser.add_argument("--latents", nargs="+", choices=LATENTS, default=list(LATENTS))
    parser.add_argument("--repeats", type=int, default=10)
    parser.add_argument("--append", action="store_true", help="add to the CSV instead of replacing it")
    parser.add_argument("--out", type=Path, default=RESULTS / "train_step.csv")
    args = parser.parse_args()

    print(gpu := machine())
    results: list[dict[str, Any]] = read_csv(args.out) if args.append and args.out.exists() else []
    for row, help, latents, peer in itertools.product(args.rows, args.helps, args.latents, args.peers):
        if latents == "float32" and peer in PEERS[2:]:
            continue  # their training is bfloat16
        settings = {"backward": OURS[peer]} if peer in OURS else {}
        kind = PEERS[1] if peer in OURS else peer
        try:
            ms, gib = measure(row, kind, help, getattr(torch, latents), args.repeats, **settings)
        except Exception as error:  # a peer that cannot is a result too
            print(f"{row} {help} {latents} {peer}: {type(error).__name__}: {error}"[:300], file=sys.stderr)
            continue
        results.append(dict(row=row, help=help, latents=latents, peer=peer))
        results[-1] |= dict(ms=f"{ms:.1f}", peak_gib=f"{gib:.1f}", gpu=gpu, date=str(date.today()))
        print(*results[-1].values(), flush=True)
        write_csv(args.out, results)


if __name__ == "__main__":
    main()
