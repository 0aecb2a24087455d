"""What came of a run of the study: packed, verified, and asked ten questions beside the dense model.

    python experiments/convert_show.py MODEL WORK/base WORK/docs-tuned-8k OUT

MODEL is the folder with the GGUF file, whose tokenizer both get. OUT gets ``packed`` and ``model.gguf``
(Q2_0), both verified against the latents, and ``prompts.json``: the most likely 32 tokens after each of the
prompts below, of the dense model and of the packed one in plain transformers, and in llama.cpp if xllamacpp
is there. The prompts were fixed before a model was trained.
"""

from __future__ import annotations

import argparse
import json
import sys
from pathlib import Path
from typing import Any

import torch
from shared import ROOT
from transformers import AutoModelForCausalLM, AutoTokenizer

from axolotl_bitnet import export_gguf, pack_checkpoint, verify_checkpoint

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


@torch.no_grad()
def answers(folder: Path, tokenizer: Any, device: str) -> list[list[int]]:
    """Greedy tokens after each prompt in float32, of a folder opened by transformers alone."""
    model = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32, device_map=device).eval()
    found = []
    for prompt in PROMPTS:
        ids = tokenizer(prompt, return_tensors="pt").to(device)
        out = model.generate(**ids, max_new_tokens=TOKENS, min_new_tokens=TOKENS, do_sample=False)
        found.append(out[0, ids["input_ids"].shape[1] :].tolist())
    return found


def write(path: Path, engines: dict[str, list[list[int]]], tokenizer: Any) -> None:
    rows = [
        {"prompt": prompt, **{name: tokenizer.decode(found[index]) for name, found in engines.items()}}
        for index, prompt in enumerate(PROMPTS)
    ]
    path.write_text(json.dumps(rows, indent=1, ensure_ascii=False) + "\n")
    print(path.read_text(), flush=True)


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    for name in ("model", "base", "latents", "out"):
        parser.add_argument(name, type=Path)
    args = parser.parse_args()
    device = "cuda" if torch.cuda.is_available() else "cpu"
    gguf = next(args.model.glob("*.gguf"))
    tokenizer = AutoTokenizer.from_pretrained(args.model, gguf_file=gguf.name)
    tokenizer.save_pretrained(args.latents)
    packed = pack_checkpoint(args.latents, args.out / "packed", overwrite=True)
    file = export_gguf(args.latents, args.out / "model.gguf", "q2_0", overwrite=True)
    for artifact in (packed, file):
        report = verify_checkpoint(artifact, args.latents)
        print(artifact.name, report.layers, "layers", report.weights, "codes", report.digest, flush=True)
        for check in report.checks:
            print(" ", check.name, check.verdict, check.detail, flush=True)
        assert report.ok, report.mismatches
    engines = {"dense": answers(args.base, tokenizer, device), "ternary": answers(packed, tokenizer, device)}
    write(args.out / "prompts.json", engines, tokenizer)
    try:
        sys.path.append(str(ROOT / "tests"))
        from support.llamacpp import LlamaCpp

        server = LlamaCpp(file)
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
