"""Tokens a second in llama.cpp: Q2_0 beside bfloat16, from the same random codes of Falcon-E-3B's layers::

    pip install cyllama-vulkan gguf     # a build of llama.cpp for GPUs, with Vulkan
    python benchmarks/llamacpp_gpu.py   # to results/llamacpp_gpu.csv here

A token at a time after a prompt of 64, as llama.cpp's own benchmark does, and a prompt of 512. The vocabulary
is the tests' small one, so that no dense head hides what the layers take. ``--gpu-layers 0`` runs on the CPU.
"""

from __future__ import annotations

import argparse
import time
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

import torch
from common import RESULTS, append_csv
from torch import Tensor

from axolotl_bitnet import convert_to_bitlinear
from axolotl_bitnet.formats.export import open_checkpoint
from axolotl_bitnet.formats.gguf.q2_0 import Q2_0
from axolotl_bitnet.formats.gguf.ternary_type import TernaryType
from axolotl_bitnet.formats.gguf.writer import write_gguf

TOKENIZER = Path(__file__).parents[1] / "examples" / "falcon-e" / "tiny" / "model"
COLUMNS = ("machine", "date", "llama_cpp", "model", "type", "file_gib", "tokens_s", "prompt_tokens_s")


def as_bf16(codes: Tensor, d: Tensor) -> Tensor:
    return (codes * d.to(torch.float32)).to(torch.bfloat16).view(torch.uint8)


BF16 = TernaryType("bf16", 30, 32, 1, 2, as_bf16, lambda packed: (packed, packed))


def make_files(folder: Path, layers: int, hidden: int, inner: int) -> dict[str, Path]:
    """A model's weights in both types."""
    from transformers import AutoTokenizer, LlamaConfig, LlamaForCausalLM

    tokenizer = AutoTokenizer.from_pretrained(TOKENIZER)
    config = LlamaConfig(
        vocab_size=len(tokenizer), hidden_size=hidden, intermediate_size=inner, num_hidden_layers=layers,
        num_attention_heads=hidden // 128, num_key_value_heads=2, head_dim=128, max_position_embeddings=4096,
        tie_word_embeddings=False, bos_token_id=tokenizer.bos_token_id, eos_token_id=tokenizer.eos_token_id,
    )  # fmt: skip
    torch.set_default_dtype(torch.bfloat16)
    model = LlamaForCausalLM(config)
    torch.set_default_dtype(torch.float32)
    convert_to_bitlinear(model)
    model.save_pretrained(folder / "latents")
    tokenizer.save_pretrained(folder / "latents")
    del model
    files = {}
    for type in (Q2_0.type, BF16):
        files[type.name] = folder / f"{type.name}.gguf"
        write_gguf(open_checkpoint(folder / "latents"), files[type.name], type, "bf16", False, None)
    return files


def measure(file: Path, gpu_layers: int, count: int) -> dict[str, float]:
    """Tokens a second of a file: one at a time, and of a prompt."""
    from cyllama.llama import llama_cpp as llama

    llama.disable_logging()
    params = llama.LlamaModelParams()
    params.n_gpu_layers = gpu_layers
    model = llama.LlamaModel(str(file), params)
    options = llama.LlamaContextParams()
    options.n_ctx, options.n_batch, options.n_ubatch = 1024, 512, 512
    context = llama.LlamaContext(model, options)

    def prompt(tokens: int) -> None:
        context.kv_cache_clear()
        context.decode(llama.llama_batch_get_one([5] * tokens, 0))
        context.synchronize()

    def one_by_one(start: int, tokens: int) -> None:
        for place in range(start, start + tokens):
            context.decode(llama.llama_batch_get_one([7], place))
            context.get_logits()
        context.synchronize()

    prompt(512)
    start = time.perf_counter()
    for _ in range(4):
        prompt(512)
    prompt_s = (time.perf_counter() - start) / 4
    prompt(64)
    one_by_one(64, 8)
    start = time.perf_counter()
    one_by_one(72, count)
    return {
        "tokens_s": round(count / (time.perf_counter() - start), 1),
        "prompt_tokens_s": round(512 / prompt_s),
    }


def device() -> str:
    from cyllama.llama import llama_cpp as llama

    llama.ggml_backend_load_all()
    found: Any = llama.ggml_backend_dev_info()
    return "; ".join(f"{each['name']} {each['description']}" for each in found)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--layers", type=int, default=32)
    parser.add_argument("--hidden", type=int, default=2048)
    parser.add_argument("--inner", type=int, default=13312)
    parser.add_argument("--gpu-layers", type=int, default=999)
    parser.add_argument("--tokens", type=int, default=128)
    parser.add_argument("--files", type=Path, help="make the files there and end, or take those there")
    args = parser.parse_args()
    with TemporaryDirectory() as temporary:
        folder = args.files or Path(temporary)
        files = {path.stem: path for path in folder.glob("*.gguf")}
        if not files:
            files = make_files(folder, args.layers, args.hidden, args.inner)
            if args.files:
                return
        from cyllama.llama import llama_cpp as llama

        about = {"machine": device(), "date": time.strftime("%Y-%m-%d"), "llama_cpp": llama.llama_version()}
        print(about, flush=True)
        for name, file in sorted(files.items()):
            row = about | {"model": f"hidden {args.hidden}, {args.inner}, {args.layers} layers", "type": name}
            row |= {"file_gib": round(file.stat().st_size / 2**30, 2)}
            row |= measure(file, args.gpu_layers, args.tokens)
            print(row, flush=True)
            append_csv(RESULTS / "llamacpp_gpu.csv", COLUMNS, [row])


if __name__ == "__main__":
    main()
