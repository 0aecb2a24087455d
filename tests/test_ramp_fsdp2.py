"""The ramp under FSDP2, two CPU processes: the unsharded run's losses and weights, and codes gathered from
its end on."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from torch.distributed.fsdp import MixedPrecisionPolicy, fully_shard

from axolotl_bitnet.layers.gathered_weight import GatheredWeight
from axolotl_bitnet.training.fsdp2_gather import gather_ternary
from axolotl_bitnet.training.gather_callback import GatherTernary
from axolotl_bitnet.training.ramp import RampSchedule, fully_ternary, set_ramp
from support.sharded import WORLD, batch, build, in_ranks

pytestmark = pytest.mark.slow

STEPS, RAMP = 5, 3
CASES = [("float32", False), ("float32", True), ("bfloat16", False)]


class _State:
    def __init__(self, step: int) -> None:
        self.global_step, self.max_steps = step, STEPS
        self.best_metric = self.best_model_checkpoint = self.best_global_step = None


def shard(compute: str, checkpointed: bool) -> Any:
    model = build(torch.float32, checkpointed)
    policy = MixedPrecisionPolicy(param_dtype=torch.bfloat16 if compute == "bfloat16" else None)
    for block in (*model[:3], model):
        fully_shard(block, mp_policy=policy)
    return model


def train(model: Any, x_of: Any, gather: bool, halves: int) -> dict[str, Any]:
    """With the callbacks as the Trainer calls them; ``halves`` micro-batches a step."""
    callbacks: list[Any] = [RampSchedule(RAMP), *([GatherTernary()] if gather else [])]
    optimizer = torch.optim.AdamW(model.parameters(), lr=0.05)
    seen: dict[str, Any] = {"losses": [], "ternary": [], "gathered": []}
    gathered: list[bool] = []
    hook = model[0].gate.register_forward_pre_hook(
        lambda layer, _: gathered.append(isinstance(layer.weight, GatheredWeight))
    )
    for callback in callbacks:
        callback.on_train_begin(None, _State(0), None, model=model)
    for step in range(STEPS):
        for callback in callbacks:
            callback.on_step_begin(None, _State(step), None, model=model)
        for half in range(halves):
            loss = model(x_of(step, half)).float().square().sum()
            (loss / halves).backward()
            seen["losses"].append(loss.detach())
        optimizer.step()
        optimizer.zero_grad()
        seen["gathered"].append(gathered[-1])
        with torch.no_grad(), fully_ternary(model):
            seen["ternary"].append(model(x_of(99, 0)).float())
    hook.remove()
    return seen


def sharded(rank: int, compute: str, checkpointed: bool) -> dict[str, Any]:
    model = shard(compute, checkpointed)
    dtype = getattr(torch, compute)
    seen = train(model, lambda step, _: batch(rank, step).to(dtype), gather=True, halves=1)
    for module in (model, *model[:3]):
        module.reshard()
    return seen | {"weights": [parameter.full_tensor().detach() for parameter in model.parameters()]}


def mixed_without_latents() -> str:
    model = shard("float32", False)
    gather_ternary(model)
    set_ramp(model, 0.5)
    try:
        model(batch(0, 0))
    except RuntimeError as error:
        return str(error)
    return "nothing"


def worker(rank: int, folder: str) -> None:
    seen: list[Any] = [sharded(rank, *case) for case in CASES]
    torch.save([*seen, mixed_without_latents()], Path(folder) / f"{rank}.pt")


@pytest.fixture(scope="module")
def ranks(tmp_path_factory: pytest.TempPathFactory) -> list[list[Any]]:
    folder = tmp_path_factory.mktemp("ramp")
    in_ranks(worker, str(folder))
    return [torch.load(folder / f"{rank}.pt") for rank in range(WORLD)]


@pytest.mark.parametrize("index", range(2), ids=["plain", "checkpointed"])
def test_it_is_the_unsharded_run(ranks: list[list[Any]], index: int) -> None:
    model = build(torch.float32, CASES[index][1])
    expected = train(model, lambda step, half: batch(half, step), gather=False, halves=WORLD)
    for rank in range(WORLD):
        seen = ranks[rank][index]
        torch.testing.assert_close(
            torch.stack(seen["losses"]), torch.stack(expected["losses"][rank::2]), rtol=1e-4, atol=1e-4
        )
        for one, other in zip(seen["weights"], model.parameters(), strict=True):
            torch.testing.assert_close(one, other.detach(), rtol=1e-3, atol=1e-3)


@pytest.mark.parametrize("index", range(len(CASES)))
def test_codes_are_gathered_from_the_ramps_end_on(ranks: list[list[Any]], index: int) -> None:
    for rank in range(WORLD):
        seen = ranks[rank][index]
        assert seen["gathered"] == [step >= RAMP for step in range(STEPS)]
        assert all(torch.isfinite(y).all() for y in seen["ternary"])


def test_latents_are_needed(ranks: list[list[Any]]) -> None:
    assert all("mixes codes with latents" in seen[-1] for seen in ranks)
