"""The whole training step of Falcon-E-shaped Llamas: forward, backward and a fused AdamW step, no loss head.

Random weights and tokens; every peer in one process, medians, peak memory allocated. ``help`` is what
everybody gets: none, Liger's kernels (RMSNorm, rotary embedding, SwiGLU), decoder layers under torch.compile,
or layers as the plugin compiles them for `torch_compile: true`, with their checkpoint inside; these also as
CUDA graphs (`torch_compile_mode: reduce-overhead`), for which gradients keep their memory.
``latents`` is the dtype of weights, gradients and optimizer state; float32 computes under bfloat16 autocast.
With ``--busy`` one more step is profiled: milliseconds in which some kernel runs.

    python benchmarks/train_step.py --out benchmarks/results/train_step.csv
"""

from __future__ import annotations

import argparse
import itertools
import sys
from collections.abc import Callable, Iterator
from contextlib import contextmanager, nullcontext
from datetime import date
from functools import partial
from pathlib import Path
from typing import Any

import torch
from common import FLOAT8, PEERS, RESULTS, free, machine, make_ternary, median_ms, read_csv, write_csv
from profiled_step import union

from axolotl_bitnet.layers.weight_codes import weights_unchanged
from axolotl_bitnet.training.layer_compile import keep_gradients

SHAPES = {"1B": (9216, 24), "3B": (13312, 32)}  # intermediate size, layers; hidden 2048, heads 16 / 2 of 128
ROWS = {  # name: shape, sequences of a micro-batch, tokens of each, micro-batches per step, checkpointing
    "3B 8k": ("3B", 1, 8192, 1, False),
    "3B 32k ckpt": ("3B", 4, 8192, 1, True),
    "1B 8k": ("1B", 1, 8192, 1, False),
    "1B 4x4k ckpt": ("1B", 1, 4096, 4, True),
}
HELPS = ("none", "liger", "compile", "plugin", "graphs")
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
    elif help in HELPS[3:]:
        from axolotl_bitnet.training.compiled_attention_rng import without_random_state
        from axolotl_bitnet.training.layer_compile import compile_layers

        without_random_state()
        compile_layers(model, **({"mode": "reduce-overhead"} if help == "graphs" else {}))
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
    row: str, peer: str, help: str, dtype: torch.dtype, repeats: int, busy: bool, **settings: Any
) -> dict[str, str]:
    """Median milliseconds of a step, the peak of allocated GiB, and with ``busy`` the GPU's busy time."""
    shape, sequences, tokens, micro_batches, checkpointing = ROWS[row]
    free()
    with helped(help):
        model = build(shape, peer, help, checkpointing, dtype, **settings)
        optimizer = torch.optim.AdamW(model.parameters(), lr=1e-5, fused=True)
        ids = torch.randint(32768, (sequences, tokens), device="cuda")
        gradient = torch.randn(sequences, tokens, 2048, device="cuda", dtype=torch.bfloat16) / tokens
        # As the plugin's callback does; weights that are read once need no memory for it.
        rereads = peer == "axolotl-bitnet" and (micro_batches > 1 or checkpointing)
        window = partial(weights_unchanged, compiled=help == "plugin") if rereads else nullcontext

        graphs = help == "graphs"
        if graphs:
            keep_gradients(model)

        def step() -> None:
            with window():
                for _ in range(micro_batches):
                    if graphs:
                        torch.compiler.cudagraph_mark_step_begin()
                    with torch.autocast("cuda", torch.bfloat16, enabled=dtype == torch.float32):
                        hidden = model(ids).last_hidden_state
                    hidden.backward(gradient.to(hidden.dtype))
            optimizer.step()
            optimizer.zero_grad(set_to_none=not graphs)

        step()
        torch.cuda.reset_peak_memory_stats()
        found = {"ms": f"{median_ms(step, repeats, warmup=1):.1f}"}
        found["peak_gib"] = f"{torch.cuda.max_memory_allocated() / 2**30:.1f}"
        if busy:
            found["busy_ms"] = f"{busy_ms(step):.1f}"
    return found


def busy_ms(step: Callable[[], None]) -> float:
    """Milliseconds of one step in which some kernel runs."""
    with torch.profiler.profile(activities=[torch.profiler.ProfilerActivity.CUDA]) as profile:
        step()
        torch.cuda.synchronize()
    events = profile.profiler.kineto_results.events()
    kernels = [event for event in events if event.device_type() == torch.autograd.DeviceType.CUDA]
    return union([(kernel.start_ns(), kernel.start_ns() + kernel.duration_ns()) for kernel in kernels]) / 1e6


def main() -> None:
    parser = argparse.ArgumentParser(description="The whole training step of Falcon-E-shaped Llamas.")
    parser.add_argument("--rows", nargs="+", choices=ROWS, default=list(ROWS))
    parser.add_argument("--helps", nargs="+", choices=HELPS, default=list(HELPS))
    parser.add_argument("--peers", nargs="+", choices=(*PEERS, *OURS, *FLOAT8), default=list(PEERS))
    parser.add_argument("--latents", nargs="+", choices=LATENTS, default=list(LATENTS))
    parser.add_argument("--repeats", type=int, default=10)
    parser.add_argument("--busy", action="store_true", help="profile one more step")
    parser.add_argument("--append", action="store_true", help="add to the CSV instead of replacing it")
    parser.add_argument("--out", type=Path, default=RESULTS / "train_step.csv")
    args = parser.parse_args()

    print(gpu := machine())
    results: list[dict[str, Any]] = read_csv(args.out) if args.append and args.out.exists() else []
    for row, help, latents, peer in itertools.product(args.rows, args.helps, args.latents, args.peers):
        if latents == "float32" and peer in PEERS[2:]:
            continue  # their training is bfloat16
        if peer in FLOAT8 and help in HELPS[:2]:
            continue  # slow, unless compiled
        settings = {"backward": OURS[peer]} if peer in OURS else {}
        kind = PEERS[1] if peer in OURS else peer
        try:
            found = measure(row, kind, help, getattr(torch, latents), args.repeats, args.busy, **settings)
        except Exception as error:  # a peer that cannot is a result too
            print(f"{row} {help} {latents} {peer}: {type(error).__name__}: {error}"[:300], file=sys.stderr)
            continue
        results.append(dict(row=row, help=help, latents=latents, peer=peer))
        results[-1] |= found | dict(gpu=gpu, date=str(date.today()))
        print(*results[-1].values(), flush=True)
        write_csv(args.out, results)


if __name__ == "__main__":
    main()
