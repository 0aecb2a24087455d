"""What a teacher and a stretched start cost: time and memory of a step, and of the start.

    python experiments/convert_cost.py OUT.csv [--shapes 0.6b,1.7b] [--liger 1]

A ternary student of a Qwen3's shape (random weights, float32 latents, bfloat16 autocast), 4 x 2,048 tokens a
step, forward and backward, 151,936 words: with transformers' own loss, with Liger's fused one, and with a
teacher of the same shape in bfloat16; and that teacher's forward alone. Medians of ten steps; peak memory
beyond what lies there before the step. First the loss itself is checked against float64.
"""

from __future__ import annotations

import argparse
import gc
import statistics
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from shared import append_csv
from torch import nn

from axolotl_bitnet import convert_to_bitlinear
from axolotl_bitnet.training.stretch import stretch_latents
from axolotl_bitnet.training.teacher import Teacher, teach
from axolotl_bitnet.training.teacher_loss import teacher_loss

SHAPES = {  # hidden, layers, heads, key-value heads, MLP
    "0.6b": (1024, 28, 16, 8, 3072),
    "1.7b": (2048, 28, 16, 8, 6144),
    "3b": (2560, 32, 20, 4, 9728),
    "tiny": (64, 2, 4, 2, 128),
}
COLUMNS = ("shape", "what", "ms", "peak_gib", "device", "torch", "error")


def build(shape: str, words: int, dtype: torch.dtype, device: str) -> Any:
    from transformers import AutoModelForCausalLM, Qwen3Config

    hidden, layers, heads, kv, mlp = SHAPES[shape]
    config = Qwen3Config(
        vocab_size=words,
        hidden_size=hidden,
        num_hidden_layers=layers,
        num_attention_heads=heads,
        num_key_value_heads=kv,
        head_dim=max(16, 128 if hidden > 64 else 16),
        intermediate_size=mlp,
        tie_word_embeddings=True,
        use_cache=False,
    )
    with torch.device(device):
        return AutoModelForCausalLM.from_config(config, dtype=dtype, attn_implementation="sdpa")


def check(device: str) -> None:
    """The kernel and the products on this device against float64."""
    for tokens, words, size in ((7, 33, 16), (1000, 151_936, 256), (513, 49_153, 104)):
        if device == "cpu" and words > 1000:
            continue
        for dtype in (torch.float32, torch.bfloat16):
            for temperature, weight in ((1.0, 1.0), (2.0, 0.3)):
                make = lambda *shape, dtype=dtype: torch.randn(shape, device=device).to(dtype)  # noqa: E731
                h, w = make(tokens, size), (make(words, size) * 0.2)
                th, tw = h + 0.3 * make(tokens, size), w + 0.05 * make(words, size)
                labels = torch.randint(words, (tokens,), device=device)
                head = w.float().clone().requires_grad_()
                mine = h.clone().requires_grad_()
                items = torch.tensor(float(tokens), device=device)
                loss, kl, _ = teacher_loss(mine, head, th, tw, labels, items, temperature, weight, dtype)
                loss.backward()
                hd, wd = h.double().requires_grad_(), w.double().requires_grad_()
                z, t = hd @ wd.t(), th.double() @ tw.double().t()
                p = torch.log_softmax(t / temperature, -1)
                q = torch.log_softmax(z / temperature, -1)
                soft = (p.exp() * (p - q)).sum()
                hard = nn.functional.cross_entropy(z, labels, reduction="sum")
                want = (weight * temperature**2 * soft + (1 - weight) * hard) / tokens
                want.backward()
                off = [float(abs(loss - want) / want), float(abs(kl - soft) / soft)]
                for found, exact in ((mine.grad, hd.grad), (head.grad, wd.grad)):
                    off.append(float((found.double() - exact).norm() / exact.norm()))
                print(
                    tokens, words, dtype, temperature, weight, [f"{value:.1e}" for value in off], flush=True
                )
                bounds = (1e-4, 1e-4, 1e-5, 1e-5) if dtype == torch.float32 else (1e-4, 1e-4, 1e-2, 1e-2)
                assert all(value < bound for value, bound in zip(off, bounds, strict=True)), off


def timed(step: Callable[[], Any], model: Any, device: str, repeats: int = 10) -> tuple[float, float]:
    """Median milliseconds, and the peak beyond what lies there, GiB."""
    if device == "cpu":
        began = time.monotonic()
        step()
        return 1000 * (time.monotonic() - began), 0.0
    times = []
    for index in range(repeats + 3):
        model.zero_grad(set_to_none=True)
        torch.cuda.synchronize()
        if index == 3:
            torch.cuda.reset_peak_memory_stats()
            there = torch.cuda.memory_allocated()
        start, end = torch.cuda.Event(enable_timing=True), torch.cuda.Event(enable_timing=True)
        start.record()
        step()
        end.record()
        torch.cuda.synchronize()
        times.append(start.elapsed_time(end))
    return statistics.median(times[3:]), (torch.cuda.max_memory_allocated() - there) / 2**30


def costs(shape: str, device: str, liger: bool, write: Callable[..., None]) -> None:
    words, rows, length = (512, 1, 64) if device == "cpu" else (151_936, 4, 2048)
    student = build(shape, words, torch.float32, device)
    convert_to_bitlinear(student)
    student.train()
    ids = torch.randint(words, (rows, length), device=device)
    bf16 = torch.autocast(device, torch.bfloat16, enabled=device != "cpu", cache_enabled=True)

    def plain() -> None:
        with bf16:
            loss = student(input_ids=ids, labels=ids).loss
        loss.backward()

    def fused() -> None:
        from liger_kernel.transformers import LigerFusedLinearCrossEntropyLoss

        with bf16:
            hidden = student.model(input_ids=ids).last_hidden_state[:, :-1].flatten(0, 1)
            loss = LigerFusedLinearCrossEntropyLoss()(student.lm_head.weight, hidden, ids[:, 1:].flatten())
        loss.backward()

    for name, step in (("cross-entropy", plain), *((("liger", fused),) if liger else ())):
        try:
            write(shape, name, *timed(step, student, device))
        except Exception as error:
            write(shape, name, 0, 0, f"{type(error).__name__}: {error}"[:150])
        gc.collect()
    teacher = build(shape, words, torch.bfloat16 if device != "cpu" else torch.float32, device).eval()

    def forward() -> None:
        with torch.no_grad():
            teacher(input_ids=ids)

    write(shape, "teacher's forward", *timed(forward, student, device))
    teach(student, Teacher(teacher))
    write(shape, "teacher", *timed(plain, student, device))


def start(shape: str, device: str, write: Callable[..., None]) -> None:
    """Seconds of the stretched start, as milliseconds."""
    words = 512 if device == "cpu" else 151_936
    model = build(shape, words, torch.float32, device)
    convert_to_bitlinear(model)
    inputs = [torch.randint(words, (1, 2048), device=device) for _ in range(8)]
    torch.cuda.synchronize() if device != "cpu" else None
    there = torch.cuda.memory_allocated() if device != "cpu" else 0
    began = time.monotonic()
    with torch.autocast(device, torch.bfloat16, enabled=device != "cpu"):
        fits = stretch_latents(model, inputs)
    spent = 1000 * (time.monotonic() - began)
    peak = (torch.cuda.max_memory_allocated() - there) / 2**30 if device != "cpu" else 0.0
    write(shape, f"stretched start of {len(fits)} matrices", spent, peak)


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("out", type=Path)
    parser.add_argument("--shapes", default="0.6b,1.7b")
    parser.add_argument("--starts", default="3b")
    parser.add_argument("--liger", type=int, default=1)
    args = parser.parse_args()
    device = "cuda" if torch.cuda.is_available() else "cpu"
    name = torch.cuda.get_device_name() if device == "cuda" else "cpu"

    def write(shape: str, what: str, ms: float, peak: float, error: str = "") -> None:
        row = (shape, what, f"{ms:.5g}", f"{peak:.4g}", name, torch.__version__, error)
        append_csv(args.out, COLUMNS, [dict(zip(COLUMNS, row, strict=True))])
        print(*row, flush=True)

    check(device)
    for shape in filter(None, args.shapes.split(",")):
        costs(shape, device, bool(args.liger), write)
        gc.collect()
        torch.cuda.empty_cache() if device == "cuda" else None
    for shape in filter(None, args.starts.split(",")):
        if device == "cuda":
            torch.cuda.reset_peak_memory_stats()
        start(shape, device, write)
    return 0


if __name__ == "__main__":
    raise SystemExit(main())
