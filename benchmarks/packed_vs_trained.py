"""Hold a packed model against the trained one, as its users load it.

    python benchmarks/packed_vs_trained.py outputs/falcon-e-3b-sft [--prompts FILE] [--tokens 8]

The packed folder is loaded with plain ``AutoModelForCausalLM.from_pretrained`` in a process of its own, which
does not import axolotl_bitnet. The trained model is built from the latents, with its non-ternary tensors
rounded to bfloat16. In float32 the logits must be equal bit for bit (exit status 1 if not); in bfloat16,
where transformers rounds the scales of the activations, the relative error and the share of equal greedy
tokens are reported.
"""

from __future__ import annotations

import argparse
import json
import os
import subprocess
import sys
import tempfile
from pathlib import Path

os.environ.setdefault(
    "TORCH_COMPILE_DISABLE", "1"
)  # transformers compiles its unpacking; the same numbers without

import torch
from safetensors.torch import load_file, save_file
from transformers import AutoModelForCausalLM, AutoTokenizer

DTYPES = (torch.float32, torch.bfloat16)
PROMPTS = [
    "The capital of France is",
    "What is 17 + 25?",
    "Once upon a time, in a small village by the sea,",
    "def fibonacci(n):",
    "In the beginning",
]


@torch.no_grad()
def measure(model: torch.nn.Module, batches: list[torch.Tensor], tokens: int) -> dict[str, torch.Tensor]:
    """Logits of every prompt and the tokens of a greedy continuation."""
    results = {}
    for index, ids in enumerate(batches):
        results[f"logits.{index}"] = model(ids).logits.float().contiguous()
        for _ in range(tokens):
            ids = torch.cat([ids, model(ids).logits[:, -1:].argmax(-1)], dim=1)
        results[f"greedy.{index}"] = ids
    return results


def load_trained(folder: Path, dtype: torch.dtype) -> torch.nn.Module:
    """The model that trained: latents with BitLinear layers, the rest rounded to bfloat16."""
    from axolotl_bitnet import convert_to_bitlinear

    config = json.loads((folder / "config.json").read_text())
    model = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32)
    dense = config["axolotl_bitnet"]["dense"]
    head = model.get_output_embeddings()
    skip = [name for name in dense if model.get_submodule(name) is not head]
    ternary = {f"{name}.weight" for name in convert_to_bitlinear(model, skip)}
    for name, parameter in model.named_parameters():
        if name not in ternary:
            parameter.data = parameter.data.to(torch.bfloat16).to(torch.float32)
    return model.to(dtype).eval()


def main() -> int:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("run", type=Path, help="a run's output_dir: latents, and packed/ below")
    parser.add_argument("--prompts", type=Path, help="text file, a prompt a line")
    parser.add_argument("--tokens", type=int, default=8, help="length of the greedy continuations")
    parser.add_argument("--packed-only", type=Path, metavar="FOLDER", help=argparse.SUPPRESS)
    args = parser.parse_args()

    prompts = args.prompts.read_text().splitlines() if args.prompts else PROMPTS
    tokenizer = AutoTokenizer.from_pretrained(args.run / "packed")
    batches = [tokenizer(prompt, return_tensors="pt").input_ids for prompt in prompts if prompt]

    if args.packed_only:
        for dtype in DTYPES:
            model = AutoModelForCausalLM.from_pretrained(args.run / "packed", dtype=dtype).eval()
            save_file(measure(model, batches, args.tokens), args.packed_only / f"{dtype}.safetensors")
        assert "axolotl_bitnet" not in sys.modules
        return 0

    failed = False
    with tempfile.TemporaryDirectory() as folder:
        subprocess.run([sys.executable, *sys.argv, "--packed-only", folder], check=True)
        both = {dtype: load_file(f"{folder}/{dtype}.safetensors") for dtype in DTYPES}
    for dtype, packed in both.items():
        name = str(dtype).removeprefix("torch.")
        trained = measure(load_trained(args.run, dtype), batches, args.tokens)
        ours = torch.cat([trained[f"logits.{i}"].flatten() for i in range(len(batches))])
        theirs = torch.cat([packed[f"logits.{i}"].flatten() for i in range(len(batches))])
        error = float((ours - theirs).norm() / ours.norm())
        new = [slice(batch.shape[1], None) for batch in batches]
        pairs = [(trained[f"greedy.{i}"][0, s], packed[f"greedy.{i}"][0, s]) for i, s in enumerate(new)]
        same = sum(int((a == b).sum()) for a, b in pairs) / sum(a.numel() for a, _ in pairs)
        equal = torch.equal(ours, theirs)
        print(
            f"{name}: logits {'equal bit for bit' if equal else 'differ'}, relative error {error:.2e}, "
            f"greedy tokens equal {same:.1%} ({len(batches)} prompts x {args.tokens})"
        )
        failed |= dtype == torch.float32 and not equal
    return int(failed)


if __name__ == "__main__":
    raise SystemExit(main())
