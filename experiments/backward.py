"""Whether an 8-bit backward learns as well: the same model, data, rate and seeds in each precision.

Two bases: one that was never ternary, over a ramp; and one that is ternary, which is what the first one's
bf16 run of the same seed left. A row has the held-out loss, the share of codes that differ from the start's
and from those of three quarters of the run, and the cosine of the weights' gradient against bf16's at the
run's start (beside it, of bf16's on two batches). The loop is the study's (study_train.py).

Wants a Llama-like checkpoint of transformers, and the King James Bible's tokens as convert_data.py writes
them. A process a GPU takes seeds of its own:

    python experiments/backward.py MODEL_FOLDER DATA_FOLDER --seeds 1 --out experiments/results/backward.csv
"""

from __future__ import annotations

import argparse
import copy
import tempfile
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import torch
from safetensors.torch import load_file
from shared import RESULTS, append_csv, machine
from study_data import Batches
from study_step import DEVICE, Flat, Step, lm_loss, plain_token_losses
from study_train import Setting, train
from torch import Tensor
from torch.nn.functional import cosine_similarity

from axolotl_bitnet import BitLinear, convert_to_bitlinear

PRECISIONS = ("bf16", "int8_dx", "int8")
RAMP = 0.1


def read_tokens(folder: Path, batch: int, length: int) -> Batches:
    stream, held_out = (
        torch.from_numpy(np.load(folder / f"{name}.npy").astype(np.int64)) for name in ("kjv", "kjv_held_out")
    )
    windows = held_out[: (len(held_out) - 1) // length * length + 1]
    x, y = (part.view(-1, length)[:128].split(8) for part in (windows[:-1], windows[1:]))
    return Batches((stream[:-1], stream[1:]), list(zip(x, y, strict=True)), batch, length)


def gradient_cosines(base: Any, batches: Batches, start: Path | None) -> dict[str, float]:
    """Of the ternary weights' gradient against bf16's on the same batch, by precision; and of bf16's on two
    batches. Means over four batches."""
    model = copy.deepcopy(base).to(DEVICE)
    convert_to_bitlinear(model)
    flat = Flat(model, torch.float32)
    if start is not None:
        for kind, stored in load_file(start).items():
            flat.tensors[kind].data.copy_(stored)
    step = Step(partial(lm_loss, plain_token_losses), model, None, flat)
    ids, labels = (part.to(DEVICE) for part in batches.draw(4, seed=0))
    layers = [module for module in model.modules() if isinstance(module, BitLinear)]

    def gradients(precision: str) -> Tensor:
        for layer in layers:
            layer.backward = precision  # type: ignore[assignment]
        found = []
        for each in zip(ids, labels, strict=True):
            step(*each)
            found.append(flat.tensors["ternary"].grad.clone())  # type: ignore[union-attr]
        return torch.stack(found)

    exact = gradients("bf16")
    found = {name: cosine_similarity(gradients(name), exact, dim=1) for name in PRECISIONS[1:]}
    found["batches"] = cosine_similarity(exact, exact.roll(1, 0), dim=1)
    return {"bf16": 1.0} | {name: float(values.mean()) for name, values in found.items()}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("model", type=Path)
    parser.add_argument("data", type=Path)
    parser.add_argument("--precisions", nargs="+", choices=PRECISIONS, default=list(PRECISIONS))
    parser.add_argument("--seeds", type=int, nargs="+", default=[1, 2, 3])
    parser.add_argument("--steps", type=int, default=400)
    parser.add_argument("--batch", type=int, default=8)
    parser.add_argument("--length", type=int, default=1024)
    parser.add_argument("--rates", type=float, nargs=2, default=[1e-3, 5e-4], help="on the ramp; after it")
    parser.add_argument("--out", type=Path, default=RESULTS / "backward.csv")
    args = parser.parse_args()

    from transformers import AutoModelForCausalLM

    gpu = machine() if DEVICE == "cuda" else DEVICE
    base = AutoModelForCausalLM.from_pretrained(args.model, dtype=torch.float32)
    base.config.use_cache = False
    batches = read_tokens(args.data, args.batch, args.length)
    for seed in args.seeds:
        with tempfile.TemporaryDirectory() as folder:
            trained = Path(folder) / "trained.safetensors"
            for kind, rate in zip(("never ternary", "ternary"), args.rates, strict=True):
                ramp = RAMP if kind == "never ternary" else 0.0
                start = trained if kind == "ternary" else None
                setting = Setting(lr=rate, ramp=ramp, seed=seed, steps=args.steps)
                cosines = gradient_cosines(base, batches, start)
                for precision in args.precisions:  # bf16 first: its latents are the ternary base
                    save = trained if start is None and precision == "bf16" else None
                    result, _ = train(base, setting, batches, "graph", start, save, precision)
                    row = dict(base=kind, backward=precision, seed=seed, lr=rate, steps=args.steps)
                    row |= {name: f"{result[name]:.4f}" for name in ("loss", "eval_loss")}
                    row |= {name: f"{result[name]:.4f}" for name in ("flips_start", "flips_quarter")}
                    row |= dict(cosine=f"{cosines[precision]:.5f}", batches=f"{cosines['batches']:.3f}")
                    row |= dict(ms_step=f"{result['ms_step']:.1f}", gpu=gpu)
                    append_csv(args.out, list(row), [row])
                    print(*row.values(), flush=True)


if __name__ == "__main__":
    main()
