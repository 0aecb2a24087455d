"""One linear layer, forward and backward, against its peers: bfloat16 weights, 8192 tokens.

python benchmarks/linear.py --out benchmarks/results/linear.csv
"""

from __future__ import annotations

import argparse
from pathlib import Path

import torch
from common import PEERS, RESULTS, free, machine, make_ternary, median_ms, write_csv
from each_kernel import MATRICES, random
from torch import nn


def measure(peer: str, out_features: int, columns: int, tokens: int) -> tuple[float, float]:
    """Median microseconds of a forward and a backward, and the peak of allocated MiB."""
    free()
    model = nn.Sequential(nn.Linear(columns, out_features, bias=False, device="cuda", dtype=torch.bfloat16))
    make_ternary(model, peer)
    x, dy = random(1, tokens, columns).requires_grad_(), random(1, tokens, out_features)

    def run() -> None:
        x.grad = model[0].weight.grad = None
        model(x.view_as(x)).backward(dy)  # a new tensor object: no codes left on it from the last round

    return median_ms(run, repeats=30, warmup=5) * 1e3, torch.cuda.max_memory_allocated() / 2**20


def main() -> None:
    parser = argparse.ArgumentParser(description="One linear layer, forward and backward, against its peers.")
    parser.add_argument("--tokens", type=int, default=8192)
    parser.add_argument("--out", type=Path, default=RESULTS / "linear.csv")
    args = parser.parse_args()
    print(machine())
    rows = []
    for layer in ("1B/3B q, o", "1B gate, up", "1B down", "3B gate, up", "3B down"):
        dense = None
        for peer in PEERS:
            us, mib = measure(peer, *MATRICES[layer], args.tokens)
            dense = dense or us
            row = dict(layer=layer, peer=peer, us=f"{us:.0f}", x_nn_linear=f"{us / dense:.2f}")
            rows.append(row | dict(peak_mib=f"{mib:.0f}"))
            print(*rows[-1].values(), flush=True)
    write_csv(args.out, rows)


if __name__ == "__main__":
    main()
