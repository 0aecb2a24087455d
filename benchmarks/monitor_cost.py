"""What a look of the monitor adds to a training step, were every step logged.

Steps with and without a look in turn, in one run: medians of the wall clock from one synchronization to the
next. A step is what the Trainer makes of one that it logs: after each backward pass it asks whether the loss
is a number, then come the optimizer's step, the callbacks, and at last the loss is read. ``share`` is what
one look adds to one step; divide it by `logging_steps`. ``codes_mib`` is what the looks keep in memory.

    python benchmarks/monitor_cost.py --out benchmarks/results/monitor_cost.csv
    python benchmarks/monitor_cost.py --dry-run      # a tiny model on the CPU: does it run?
"""

from __future__ import annotations

import argparse
import statistics
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from common import RESULTS, free, machine, write_csv
from torch import nn
from train_step import LATENTS, ROWS, build

from axolotl_bitnet import convert_to_bitlinear
from axolotl_bitnet.layers.weight_codes import weights_unchanged as weights_unchanged
from axolotl_bitnet.training.monitor.callback import observe


def tiny() -> nn.Module:
    from transformers import LlamaConfig, LlamaModel

    sizes = {"hidden_size": 128, "intermediate_size": 256, "num_hidden_layers": 2, "vocab_size": 32768}
    model = LlamaModel(LlamaConfig(**sizes, num_attention_heads=4, num_key_value_heads=2, use_cache=False))
    convert_to_bitlinear(model)
    return model.train()


Look = Callable[[], None]


def training_step(
    model: nn.Module, sequences: int, tokens: int, micro_batches: int
) -> Callable[[Look | None], None]:
    """A step as the Trainer makes and logs it, with a look where it calls its callbacks."""
    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-5, fused=True)
    weight = next(model.parameters())
    ids = torch.randint(32768, (sequences, tokens), device=weight.device)

    def step(look: Look | None) -> None:
        with weights_unchanged():
            for _ in range(micro_batches):
                autocast = weight.is_cuda and weight.dtype == torch.float32
                with torch.autocast("cuda", torch.bfloat16, enabled=autocast):
                    loss = model(ids).last_hidden_state.float().square().mean()
                loss.backward()
                if loss.isnan() or loss.isinf():
                    raise FloatingPointError("the loss is not a number")
        optimizer.step()
        optimizer.zero_grad(set_to_none=True)
        if look is not None:
            look()
        loss.item()

    return step


def measure(model: nn.Module, step: Callable[[Look | None], None], repeats: int) -> dict[str, Any]:
    """Medians over ``repeats`` steps of each kind, in milliseconds."""
    seen = observe(model, None, 1e-5)
    times: dict[bool, list[float]] = {False: [], True: []}

    def look() -> None:
        nonlocal seen
        seen = observe(model, seen, 1e-5)
        seen.metrics()

    for turn in range(2 * repeats + 4):
        looks = turn % 2 == 1
        begin = time.perf_counter()
        step(look if looks else None)
        if turn >= 4:
            times[looks].append(1000 * (time.perf_counter() - begin))
    without, with_look = statistics.median(times[False]), statistics.median(times[True])
    kept = sum(one.numel() for one in (*seen.codes, *seen.before, *seen.start)) / 2**20
    return {
        "step_ms": f"{without:.2f}",
        "with_look_ms": f"{with_look:.2f}",
        "share": f"{with_look / without - 1:.4f}",
        "codes_mib": f"{kept:.1f}",
    }


def main() -> None:
    parser = argparse.ArgumentParser(description="What a look of the monitor adds to a training step.")
    parser.add_argument("--rows", nargs="+", choices=ROWS, default=list(ROWS))
    parser.add_argument("--latents", nargs="+", choices=LATENTS, default=["float32"])
    parser.add_argument("--repeats", type=int, default=15)
    parser.add_argument("--dry-run", action="store_true", help="a tiny model on the CPU; nothing is written")
    parser.add_argument("--out", type=Path, default=RESULTS / "monitor_cost.csv")
    args = parser.parse_args()
    if args.dry_run:
        model = tiny()
        print(measure(model, training_step(model, 1, 64, 2), 2))
        return
    print(machine())
    results = []
    for row in args.rows:
        for latents in args.latents:
            shape, sequences, tokens, micro_batches, checkpointing = ROWS[row]
            free()
            model = build(shape, "axolotl-bitnet", "none", checkpointing, getattr(torch, latents))
            step = training_step(model, sequences, tokens, micro_batches)
            results.append({"row": row, "latents": latents, **measure(model, step, args.repeats)})
            print(*results[-1].values(), flush=True)
            write_csv(args.out, results)
            del model, step


if __name__ == "__main__":
    main()
