"""What FSDP2 gathers, and what a step then takes: bfloat16 weights, or 2-bit codes, or torchao's.

A Falcon-E-shaped Llama sharded over all GPUs, float32 latents, compute in bfloat16, one sequence a GPU.
Links slower than the ones at hand are simulated: after every all-gather and reduce-scatter its stream waits
for as long as the bytes that a GPU receives (sends) would take at so many GB/s.

    torchrun --nproc-per-node 2 benchmarks/gather.py --out benchmarks/results/gather.csv
"""

from __future__ import annotations

import argparse
import gc
import os
import time
from functools import partial
from pathlib import Path
from statistics import median
from typing import Any

import torch
import torch.distributed as dist
from common import RESULTS, machine, make_ternary, write_csv
from torch import Tensor
from torch.distributed.fsdp import MixedPrecisionPolicy, fully_shard
from torch.distributed.fsdp._fully_shard._fsdp_collectives import DefaultAllGather, DefaultReduceScatter
from train_step import SHAPES

from axolotl_bitnet.training.fsdp2_gather import gather_ternary

KINDS = ("nn.Linear", "native", "ternary", "torchao")


class Link:
    """Bytes counted, and a speed for all communication of a model."""

    def __init__(self, cycles: float) -> None:
        self.cycles, self.speed = cycles, 0.0  # cycles per second; bytes per second, 0: as fast as it is
        self.gathered = self.reduced = 0

    def pass_on(self, nbytes: int) -> None:
        if self.speed:
            torch.cuda._sleep(int(nbytes / self.speed * self.cycles))


class SlowAllGather(DefaultAllGather):
    def __init__(self, link: Link) -> None:
        super().__init__()
        self.link = link

    def __call__(self, output_tensor: Tensor, input_tensor: Tensor, *rest: Any, **more: Any) -> Any:
        work = super().__call__(output_tensor, input_tensor, *rest, **more)
        received = output_tensor.nbytes - input_tensor.nbytes
        self.link.gathered += received
        self.link.pass_on(received)
        return work


class SlowReduceScatter(DefaultReduceScatter):
    def __init__(self, link: Link) -> None:
        super().__init__()
        self.link = link

    def __call__(self, output_tensor: Tensor, input_tensor: Tensor, *rest: Any, **more: Any) -> Any:
        work = super().__call__(output_tensor, input_tensor, *rest, **more)
        sent = input_tensor.nbytes - output_tensor.nbytes
        self.link.reduced += sent
        self.link.pass_on(sent)
        return work


def build(kind: str, shape: str, layers: int | None, checkpointing: bool, link: Link) -> Any:
    """A sharded Llama without head, random, in training mode."""
    from transformers import LlamaConfig, LlamaModel

    intermediate, depth = SHAPES[shape]
    config = LlamaConfig(hidden_size=2048, intermediate_size=intermediate, num_hidden_layers=layers or depth)
    config.update(dict(num_attention_heads=16, num_key_value_heads=2, head_dim=128, vocab_size=32768))
    config.update(dict(max_position_embeddings=32768, use_cache=False))
    with torch.device("cuda" if kind == "torchao" else "meta"):
        model = LlamaModel(config)
    make_ternary(model, {"native": "axolotl-bitnet", "ternary": "axolotl-bitnet"}.get(kind, kind))
    if checkpointing:
        model.gradient_checkpointing_enable({"use_reentrant": False})
    shard = partial(fully_shard, mp_policy=MixedPrecisionPolicy(param_dtype=torch.bfloat16))
    for layer in model.layers:
        shard(layer)
    shard(model)
    if kind != "torchao":  # its tensors cannot be made later
        model.to_empty(device="cuda")
        torch.manual_seed(0)
        for parameter in model.parameters():
            parameter.data.normal_(std=0.02) if parameter.dim() > 1 else parameter.data.fill_(1)
    model.rotary_emb = type(model.rotary_emb)(config, device="cuda")
    for module in (model, *model.layers):
        module.set_custom_all_gather(SlowAllGather(link))
        module.set_custom_reduce_scatter(SlowReduceScatter(link))
    if kind == "ternary":
        gather_ternary(model)
    return model.train()


def measure(kind: str, args: argparse.Namespace, cycles: float) -> list[dict[str, Any]]:
    gc.collect()
    torch.cuda.empty_cache()
    torch.cuda.reset_peak_memory_stats()
    link = Link(cycles)
    model = build(kind, args.shape, args.layers, args.checkpointing, link)
    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-5, fused=True)
    ids = torch.randint(32768, (1, args.tokens), device="cuda")
    gradient = torch.randn(1, args.tokens, 2048, device="cuda", dtype=torch.bfloat16) / args.tokens

    def step() -> float:
        torch.cuda.synchronize()
        dist.barrier()
        start = time.perf_counter()
        link.gathered = link.reduced = 0
        model(ids).last_hidden_state.backward(gradient)
        optimizer.step()
        optimizer.zero_grad(set_to_none=True)
        if kind == "torchao":
            from torchao.prototype.quantized_training import precompute_bitnet_scale_for_fsdp

            precompute_bitnet_scale_for_fsdp(model)
        torch.cuda.synchronize()
        return (time.perf_counter() - start) * 1e3

    rows = []
    for speed in (0.0, *args.speeds):
        link.speed = speed * 1e9
        times = [step() for _ in range(args.repeats + (2 if speed == 0.0 else 1))]
        took = torch.tensor(median(times[-args.repeats :]), device="cuda")
        dist.all_reduce(took, dist.ReduceOp.MAX)
        peak = torch.cuda.max_memory_allocated() / 2**30
        row = dict(shape=args.shape, layers=len(model.layers), gpus=dist.get_world_size(), tokens=args.tokens)
        row |= dict(
            checkpointing=args.checkpointing, gather=kind, link_gb_s=f"{speed:g}" if speed else "as it is"
        )
        row |= dict(ms=f"{took.item():.1f}", peak_gib=f"{peak:.1f}", gathered_mb=f"{link.gathered / 1e6:.0f}")
        rows.append(row | dict(reduced_mb=f"{link.reduced / 1e6:.0f}"))
        if dist.get_rank() == 0:
            print(*rows[-1].values(), flush=True)
    return rows


def cycles_a_second() -> float:
    torch.cuda._sleep(10_000)
    start, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))
    start.record()
    torch.cuda._sleep(200_000_000)
    end.record()
    end.synchronize()
    return 200_000_000 / (start.elapsed_time(end) / 1e3)


def main() -> None:
    parser = argparse.ArgumentParser(description="What FSDP2 gathers, and what a step then takes.")
    parser.add_argument("--kinds", nargs="+", choices=KINDS, default=list(KINDS))
    parser.add_argument("--shape", choices=SHAPES, default="3B")
    parser.add_argument("--layers", type=int, help="instead of the shape's own")
    parser.add_argument("--tokens", type=int, default=8192)
    parser.add_argument("--checkpointing", action="store_true")
    parser.add_argument("--speeds", type=float, nargs="*", default=[100, 50, 25], help="GB/s a GPU, each way")
    parser.add_argument("--repeats", type=int, default=4)
    parser.add_argument("--out", type=Path, default=RESULTS / "gather.csv")
    args = parser.parse_args()

    torch.cuda.set_device(int(os.environ["LOCAL_RANK"]))
    dist.init_process_group("nccl")
    if dist.get_rank() == 0:
        print(machine())
    results: list[dict[str, Any]] = []
    for kind in args.kinds:
        try:
            results += measure(kind, args, cycles_a_second())
        except Exception as error:  # a peer that cannot is a result too
            print(f"{kind}: {type(error).__name__}: {error}"[:500], flush=True)
        if dist.get_rank() == 0 and results:
            write_csv(args.out, results)
    dist.destroy_process_group()


if __name__ == "__main__":
    main()
