"""bfloat16 latents whose updates are rounded stochastically: torchao's AdamW8bit, whole or sharded.

An AdamW step of 1e-5 is below half a unit in the last place of almost every bfloat16 weight, so rounding to
nearest discards it. AdamW8bit rounds up or down with the probability of the discarded bits instead
(`bf16_stochastic_round=True`), and keeps its moments in 8 bits: 6 bytes per weight in all, where float32
latents with AdamW take 16. A subclass changes two things of it:

1. *The noise.* It comes from the device's random generator, whose state depends on everything that ran
   before. Under DDP every rank rounds its own copy of the weights, and copies that round differently diverge;
   after a resume the noise would be another. So the generator is seeded for each step with the run's seed,
   the step and the shard, and gets its old state back after the step.
2. *The shards.* It hands FSDP2's DTensors with 8-bit moments inside to torch.compile, which cannot trace them
   from torch 2.13 on (torchao 0.17: "attempting to run unimplemented operator aten.view"). The arithmetic is
   elementwise but for blocks of 256 that lie within a shard, so the same function gets the local tensors.

Changes ``Trainer.get_optimizer_cls_and_kwargs`` of transformers, and uses torchao's ``AdamW8bit._new_buffer``
and ``single_param_adam`` and torch's ``disable_cache_limit``. Without one of these names the run is refused
before training. Tests: tests/test_rounding.py, tests/test_upstream_names.py.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from functools import cache
from typing import Any

import torch
import torch.distributed as dist

_EIGHT_BIT_FROM = 4096
"""torchao keeps the moments of smaller shards, or of shards that are no multiple of a block, in bfloat16."""


class RoundingError(ValueError):
    """Updates cannot be rounded stochastically: names are missing, or the moments of a weight would be of two
    kinds on two ranks. The message has the reason."""


def seed_the_rounding(trainer: Any) -> None:
    """Make a trainer create :func:`seeded_adamw` where it would create torchao's AdamW8bit.

    Raises:
        RoundingError: a name that this needs is not there.
    """
    choose = getattr(trainer, "get_optimizer_cls_and_kwargs", None)
    try:
        if choose is None:
            raise AttributeError("the Trainer has no get_optimizer_cls_and_kwargs")
        seeded_adamw()
    except (AttributeError, ImportError) as error:
        raise RoundingError(
            f"`bf16_stochastic_round` does not fit these versions of transformers, torch and torchao: "
            f"{error}. "
            "Use float32 latents (bitnet.latent_dtype) and another optimizer"
        ) from error

    def chosen(*args: Any, **kwargs: Any) -> tuple[type, dict[str, Any]]:
        _, options = choose(*args, **kwargs)
        return seeded_adamw(), {**options, "seed": trainer.args.seed}

    trainer.get_optimizer_cls_and_kwargs = chosen


@cache
def seeded_adamw() -> type[torch.optim.Optimizer]:
    """torchao's AdamW8bit with an argument more: ``seed``, of the noise.

    Raises:
        ImportError, AttributeError: torch or torchao lack a name that is used here.
    """
    from torch._dynamo.utils import disable_cache_limit
    from torchao.optim import AdamW8bit
    from torchao.optim.adam import single_param_adam

    if not hasattr(AdamW8bit, "_new_buffer"):
        raise AttributeError("torchao's AdamW8bit has no _new_buffer")

    class SeededAdamW8bit(AdamW8bit):
        def __init__(self, *args: Any, seed: int = 0, **options: Any) -> None:
            super().__init__(*args, **options)
            self.seed = seed

        @torch.no_grad()
        def step(self, closure: Any = None) -> Any:
            loss = None
            if closure is not None:
                with torch.enable_grad():
                    loss = closure()
            todo = [(group, p) for group in self.param_groups for p in group["params"] if p.grad is not None]
            if todo and not any(self.state[p] for _, p in todo):
                refuse_mixed_moments([p for _, p in todo], self.block_size)
            taken = max((int(self.state[p]["step"]) for _, p in todo if self.state[p]), default=0)
            update = torch.compile(single_param_adam, fullgraph=True, dynamic=False)
            # A compiled variant for each shape: more than the limit allows, but a fixed number.
            seed = noise_seed(self.seed, taken, shard_index(todo[0][1]) if todo else 0)
            with seeded(seed), disable_cache_limit():
                for group, p in todo:
                    self._update(update, group, p)
            return loss

        def _update(self, update: Any, group: dict[str, Any], p: Any) -> None:
            state = self.state[p]
            if not state:
                state["step"] = torch.tensor(0.0)
                state["exp_avg"] = self._new_buffer(p, True)
                state["exp_avg_sq"] = self._new_buffer(p, False)
            state["step"] += 1
            update(
                local(p.detach()),
                local(p.grad),
                state["step"],
                local(state["exp_avg"]),
                local(state["exp_avg_sq"]),
                None,
                group["lr"],
                *group["betas"],
                group["weight_decay"],
                group["eps"],
                True,
                self.bf16_stochastic_round and p.dtype is torch.bfloat16,
            )

    return SeededAdamW8bit


def local(tensor: Any) -> Any:
    """This rank's part of a DTensor; any other tensor as it is."""
    return tensor.to_local() if hasattr(tensor, "device_mesh") else tensor


@contextmanager
def seeded(seed: int) -> Iterator[None]:
    """The CPU's and the current GPU's generators start from this seed, and continue as before afterwards."""
    cuda = torch.cuda.get_rng_state() if torch.cuda.is_available() else None
    cpu = torch.get_rng_state()
    torch.default_generator.manual_seed(seed)
    if cuda is not None:
        torch.cuda.manual_seed(seed)
    try:
        yield
    finally:
        torch.set_rng_state(cpu)
        if cuda is not None:
            torch.cuda.set_rng_state(cuda)


def noise_seed(seed: int, step: int, shard: int) -> int:
    """A seed of its own for each run, step (below 2**28) and shard (below 2**16)."""
    return (seed % 2**19) << 44 | (step % 2**28) << 16 | shard % 2**16


def shard_index(parameter: Any) -> int:
    """Which shard of an FSDP2 model this rank holds; 0 where weights are whole. Replicas have one number."""
    mesh: Any = getattr(parameter, "device_mesh", None)
    index = 0
    for dim, placement in enumerate(parameter.placements if mesh is not None else ()):
        if placement.is_shard():
            index = index * mesh.size(dim) + mesh.get_local_rank(dim)
    return index


def refuse_mixed_moments(parameters: list[Any], block: int) -> None:
    """Every rank must call it.

    Raises:
        RoundingError: a weight's shards are of sizes for which torchao keeps 8-bit moments on one rank and
            bfloat16 ones on another: no checkpoint could gather them.
    """
    sharded = [parameter for parameter in parameters if hasattr(parameter, "device_mesh")]
    if not sharded:
        return
    count = torch.tensor(
        [float(eight_bit(local(parameter).numel(), block)) for parameter in sharded],
        device=sharded[0].device_mesh.device_type,
    )
    dist.all_reduce(count)
    ranks = dist.get_world_size()
    for parameter, found in zip(sharded, count.tolist(), strict=True):
        if 0 < found < ranks:
            raise RoundingError(
                f"a weight of shape {tuple(parameter.shape)} over {ranks} ranks: {int(found)} of its shards "
                f"would have 8-bit moments and {int(ranks - found)} bfloat16 ones (multiples of {block} "
                f"elements, at least {_EIGHT_BIT_FROM}, are kept in 8 bits), and no checkpoint could gather "
                "them. Use another number of GPUs, or float32 latents (bitnet.latent_dtype) and another "
                "optimizer"
            )


def eight_bit(numel: int, block: int = 256) -> bool:
    """Whether torchao keeps the moments of a shard of so many elements in 8 bits."""
    return numel >= _EIGHT_BIT_FROM and numel % block == 0
