"""What came of a run of the study: packed, verified, and asked ten questions beside the dense model.

    python experiments/convert_show.py BASE LATENTS OUT --packed LATENTS/packed --text kjv_held_out.npy

BASE is the dense model's folder, LATENTS a run's output; both have the tokenizer. OUT gets ``model.gguf``
(Q2_0), and ``packed`` unless the run itself made one; both are verified against the latents. ``prompts.json``
gets the most likely 32 tokens after each of the prompts below, of the dense model and of the packed one in
plain transformers, and in llama.cpp if xllamacpp is there. The prompts were fixed before a model was trained.

With ``--text``, the held-out figures of ``convert.py`` too, of the dense model and the latents; and the loss
of the packed folder in plain transformers, in float32.
"""

from __future__ import annotations

import argparse
import json
import os
import sys
from pathlib import Path
from typing import Any

import numpy as np
import torch
import torch.nn.functional as F
from convert_train import measure
from shared import ROOT
from transformers import AutoModelForCausalLM, AutoTokenizer

from axolotl_bitnet import convert_to_bitlinear, export_gguf, pack_checkpoint, verify_checkpoint

PROMPTS = (
    "The Linux kernel is",
    "To open a file in Python,",
    "The primary key of a table",
    "In the beginning God created",
    "And it came to pass in those days,",
    "Use git rebase when",
    "The capital of France is",
    "Water boils when",
    "The difference between a list and a tuple is",
    "My grandmother always told me that",
)
TOKENS = 32


def opened(folder: Path) -> Any:
    """A folder in float32, by transformers alone."""
    device = "cuda" if torch.cuda.is_available() else "cpu"
    return AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32, device_map=device).eval()


@torch.no_grad()
def answers(model: Any, tokenizer: Any) -> list[list[int]]:
    """Greedy tokens after each prompt."""
    found = []
    for prompt in PROMPTS:
        ids = tokenizer(prompt, return_tensors="pt").to(model.device)
        ids.pop("token_type_ids", None)
        out = model.generate(**ids, max_new_tokens=TOKENS, min_new_tokens=TOKENS, do_sample=False)
        found.append(out[0, ids["input_ids"].shape[1] :].tolist())
    return found


def windows(text: Path, device: torch.device, length: int = 1024, most: int = 128) -> list[Any]:
    """Tokens and labels, as convert.py measures them."""
    ids = torch.from_numpy(np.load(text).astype(np.int64)).to(device)
    count = min(most, (len(ids) - 1) // length) * length
    return list(zip(ids[:count].view(-1, 1, length), ids[1 : count + 1].view(-1, 1, length), strict=True))


def compare(base: Path, latents: Path, text: Path) -> None:
    """Print the figures of convert.py, of the dense model and of the latents on the int8 path."""
    dense, ternary = opened(base), opened(latents)
    convert_to_bitlinear(ternary)
    batches = windows(text, dense.device)
    before = measure(dense, batches)
    after = measure(ternary, batches, before["likely"])
    for name, found in (("dense", before), ("ternary", after)):
        print(name, {key: value for key, value in found.items() if key != "likely"}, flush=True)


@torch.no_grad()
def held_out(model: Any, text: Path) -> float:
    """Cross-entropy in plain transformers."""
    batches = windows(text, model.device)
    losses = [
        F.cross_entropy(model(input_ids=x, use_cache=False).logits[0].float(), y[0]) for x, y in batches
    ]
    return float(torch.stack(losses).mean())


def write(path: Path, engines: dict[str, list[list[int]]], tokenizer: Any) -> None:
    rows = [
        {"prompt": prompt, **{name: tokenizer.decode(found[index]) for name, found in engines.items()}}
        for index, prompt in enumerate(PROMPTS)
    ]
    path.write_text(json.dumps(rows, indent=1, ensure_ascii=False) + "\n")
    print(path.read_text(), flush=True)


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    for name in ("base", "latents", "out"):
        parser.add_argument(name, type=Path)
    parser.add_argument("--packed", type=Path)
    parser.add_argument("--text", type=Path)
    args = parser.parse_args()
    args.out.mkdir(parents=True, exist_ok=True)
    tokenizer = AutoTokenizer.from_pretrained(args.base)
    packed = args.packed or pack_checkpoint(args.latents, args.out / "packed", overwrite=True)
    file = export_gguf(args.latents, args.out / "model.gguf", "q2_0", overwrite=True)
    for artifact in (packed, file):
        report = verify_checkpoint(artifact, args.latents)
        print(artifact.name, report.layers, "layers", report.weights, "codes", report.digest, flush=True)
        for check in report.checks:
            print(" ", check.name, check.verdict, check.detail, flush=True)
        assert report.ok, report.mismatches
    if args.text:
        compare(args.base, args.latents, args.text)
    engines = {}
    for name, folder in (("dense", args.base), ("ternary", packed)):
        model = opened(folder)
        engines[name] = answers(model, tokenizer)
    write(args.out / "prompts.json", engines, tokenizer)
    if args.text:
        print("packed, in plain transformers, held out:", held_out(model, args.text), flush=True)
    try:
        sys.path.append(str(ROOT / "tests"))
        from support.llamacpp import LlamaCpp

        server = LlamaCpp(file, threads=min(8, os.cpu_count() or 1))
    except ImportError:
        print("llama.cpp is not here: pip install xllamacpp", flush=True)
        return 0
    engines["llama.cpp"] = [server.greedy(tokenizer(text)["input_ids"], TOKENS) for text in PROMPTS]
    write(args.out / "prompts.json", engines, tokenizer)
    pairs = zip(engines["ternary"], engines["llama.cpp"], strict=True)
    print(
        "llama.cpp gives", sum(a == b for a, b in pairs), "of", len(PROMPTS), "answers the same", flush=True
    )
    return 0


if __name__ == "__main__":
    raise SystemExit(main())
