"""How long the first training step waits for the kernels to be compiled, with an empty Triton cache.

One decoder layer of Falcon-E-3B's shape has every shape of the whole model: the first forward and backward
against the second.

    python benchmarks/first_step.py
"""

from __future__ import annotations

import os
import tempfile
import time

import torch
from common import machine, make_ternary


def main() -> None:
    from transformers import LlamaConfig, LlamaModel

    print(machine())
    config = LlamaConfig(hidden_size=2048, intermediate_size=13312, num_hidden_layers=1, vocab_size=1024)
    config.update(dict(num_attention_heads=16, num_key_value_heads=2, head_dim=128))
    for peer in ("nn.Linear", "axolotl-bitnet"):
        model = LlamaModel(config).to("cuda", torch.bfloat16)
        make_ternary(model, peer)
        for step in ("first", "second"):
            torch.cuda.synchronize()
            start = time.perf_counter()
            model(torch.zeros(1, 8192, dtype=torch.long, device="cuda")).last_hidden_state.sum().backward()
            torch.cuda.synchronize()
            print(f"{peer}: {step} step {time.perf_counter() - start:.2f} s", flush=True)


if __name__ == "__main__":
    with tempfile.TemporaryDirectory() as folder:
        os.environ["TRITON_CACHE_DIR"] = folder
        main()
