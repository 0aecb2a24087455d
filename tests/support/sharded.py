"""Processes of one group, and a small model to shard over them: its batches, and the unsharded run."""

from __future__ import annotations

import copy
import multiprocessing
import tempfile
from collections.abc import Callable
from datetime import timedelta
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

from axolotl_bitnet.layers.bitlinear import BitLinear
from axolotl_bitnet.model.fingerprint import fingerprint_model

WORLD = 2
_PRELOADED = [
    "pytest",
    "torch.distributed.fsdp",
    "torch._dynamo",  # what an optimizer's first step imports
    "torch._inductor",
    "safetensors.torch",
    "transformers.models.llama.modeling_llama",
    "axolotl_bitnet.model.fingerprint",
    "axolotl_bitnet.training.fsdp2_gather",
    "axolotl_bitnet.training.monitor.callback",
    "axolotl_bitnet.training.teacher",
]


def in_ranks(work: Callable[..., Any], *arguments: Any, world: int = WORLD) -> None:
    """``work(rank, *arguments)`` in each of ``world`` processes, which are one gloo group.

    They are forked from a server that holds the imports, for these take longer than the work. (In forks of
    this process, which has run backwards, torch refuses to run another.)
    """
    multiprocessing.set_forkserver_preload(_PRELOADED)
    with tempfile.TemporaryDirectory() as folder:
        settings = (f"file://{folder}/rendezvous", world, work, arguments)
        torch.multiprocessing.start_processes(_rank, settings, world, start_method="forkserver")


def _rank(
    rank: int, rendezvous: str, world: int, work: Callable[..., Any], arguments: tuple[Any, ...]
) -> None:
    torch.set_num_threads(1)
    dist.init_process_group("gloo", rendezvous, timedelta(seconds=300), world_size=world, rank=rank)
    try:
        work(rank, *arguments)
    finally:
        dist.destroy_process_group()


class Block(nn.Module):
    """Siblings that share codes, a bias, a norm, and rows that do not divide by the number of ranks."""

    def __init__(self, checkpointed: bool) -> None:
        super().__init__()
        self.checkpointed = checkpointed
        self.norm = nn.LayerNorm(24)
        self.gate, self.up = BitLinear(24, 37), BitLinear(24, 37, bias=False)
        self.down = BitLinear(37, 24, bias=False)

    def forward(self, x: Tensor) -> Tensor:
        if self.checkpointed and torch.is_grad_enabled():
            return x + checkpoint(self.inner, x, use_reentrant=False)
        return x + self.inner(x)

    def inner(self, x: Tensor) -> Tensor:
        h = self.norm(x)
        return self.down(torch.sigmoid(self.gate(h)) * self.up(h))


def build(latents: torch.dtype, checkpointed: bool) -> nn.Sequential:
    torch.manual_seed(7)
    blocks = (Block(checkpointed) for _ in range(3))
    return nn.Sequential(*blocks, BitLinear(24, 5)).to(latents)


def batch(rank: int, step: int) -> Tensor:
    return torch.randn(4, 6, 24, generator=torch.Generator().manual_seed(100 * step + rank))


def train(model: nn.Module, inputs: list[Tensor]) -> None:
    for x in inputs:
        model(x).float().square().sum().backward()


def reference(policy: str, latents: torch.dtype, checkpointed: bool) -> dict[str, Any]:
    """The unsharded model: both ranks' gradients, averaged in the dtype that FSDP reduces in."""
    model = build(latents, checkpointed)
    optimizer = torch.optim.AdamW(model.parameters(), lr=0.05)
    seen: dict[str, Any] = {"gradients": [], "fingerprints": [fingerprint_model(model).digest]}
    for step in range(2):
        halves = []
        for rank in range(WORLD):
            computed = copy.deepcopy(model)
            if policy == "bf16":
                computed.to(torch.bfloat16)
            x = batch(rank, step).to(next(computed.parameters()).dtype)
            train(computed, [x])
            halves.append([parameter.grad for parameter in computed.parameters()])
        for parameter, first, second in zip(model.parameters(), *halves, strict=True):
            parameter.grad = (first / WORLD + second / WORLD).to(parameter.dtype)
        seen["gradients"].append([parameter.grad.clone() for parameter in model.parameters()])
        optimizer.step()
        optimizer.zero_grad()
        seen["fingerprints"].append(fingerprint_model(model).digest)
    seen["weights"] = [parameter.detach() for parameter in model.parameters()]
    seen["tensors"] = list(fingerprint_model(model).tensors)
    return seen
