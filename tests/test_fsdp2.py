"""BitLinear under FSDP2, two CPU processes: gradients, step and fingerprint are the unsharded model's."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from torch.distributed.tensor import DTensor

from axolotl_bitnet.model.fingerprint import fingerprint_model
from support.sharded import WORLD, batch, build, in_ranks, reference, train

CASES = [
    (policy, latents, checkpointed)
    for policy in ("none", "bf16")
    for latents in (torch.float32, torch.bfloat16)
    for checkpointed in (False, True)
]


def sharded(rank: int, policy: str, latents: torch.dtype, checkpointed: bool) -> dict[str, Any]:
    from torch.distributed.fsdp import MixedPrecisionPolicy, fully_shard

    model = build(latents, checkpointed)
    settings: dict[str, Any] = {"reshard_after_forward": True}
    if policy == "bf16":
        settings["mp_policy"] = MixedPrecisionPolicy(param_dtype=torch.bfloat16)
    for block in model[:3]:
        fully_shard(block, **settings)
    fully_shard(model, **settings)
    assert all(isinstance(parameter, DTensor) for parameter in model.parameters())
    optimizer = torch.optim.AdamW(model.parameters(), lr=0.05)
    seen: dict[str, Any] = {"gradients": [], "fingerprints": [fingerprint_model(model).digest]}
    for step in range(2):
        train(model, [batch(rank, step).to(torch.bfloat16 if policy == "bf16" else latents)])
        seen["gradients"].append([parameter.grad.full_tensor() for parameter in model.parameters()])
        optimizer.step()
        optimizer.zero_grad()
        seen["fingerprints"].append(fingerprint_model(model).digest)
    seen["weights"] = [parameter.full_tensor().detach() for parameter in model.parameters()]
    seen["tensors"] = list(fingerprint_model(model).tensors)
    seen["local rows"] = [parameter.to_local().shape[0] for parameter in model.parameters()]
    return seen


def worker(rank: int, folder: str) -> None:
    torch.save([sharded(rank, *case) for case in CASES], Path(folder) / f"{rank}.pt")


@pytest.fixture(scope="module")
def ranks(tmp_path_factory: pytest.TempPathFactory) -> list[list[dict[str, Any]]]:
    """What each rank saw, for each of CASES; one start of the processes for all of them."""
    folder = tmp_path_factory.mktemp("fsdp2")
    in_ranks(worker, str(folder))
    return [torch.load(folder / f"{rank}.pt") for rank in range(WORLD)]


def name_of(case: tuple[str, torch.dtype, bool]) -> str:
    policy, latents, checkpointed = case
    return f"{policy}-{str(latents).removeprefix('torch.')}-{'checkpointed' if checkpointed else 'plain'}"


by_case = pytest.mark.parametrize("index", range(len(CASES)), ids=[name_of(case) for case in CASES])


@pytest.mark.slow
@by_case
def test_gradients_and_steps_are_the_unsharded_ones(ranks: list[list[dict[str, Any]]], index: int) -> None:
    expected = reference(*CASES[index])
    for rank in range(WORLD):
        seen = ranks[rank][index]
        for step in range(2):
            for one, other in zip(seen["gradients"][step], expected["gradients"][step], strict=True):
                assert one.dtype == other.dtype and torch.equal(one, other)
                assert other.abs().max() > 0
        for one, other in zip(seen["weights"], expected["weights"], strict=True):
            assert torch.equal(one, other)


@pytest.mark.slow
@by_case
def test_fingerprint_is_the_unsharded_one(ranks: list[list[dict[str, Any]]], index: int) -> None:
    expected = reference(*CASES[index])
    for rank in range(WORLD):
        assert ranks[rank][index]["fingerprints"] == expected["fingerprints"]
        assert ranks[rank][index]["tensors"] == expected["tensors"]
    assert len(set(expected["fingerprints"])) == 3  # every step flipped codes
    assert len(expected["tensors"]) == 10


@pytest.mark.slow
def test_the_ranks_held_different_rows(ranks: list[list[dict[str, Any]]]) -> None:
    rows = [ranks[rank][0]["local rows"] for rank in range(WORLD)]
    assert 37 in [sum(pair) for pair in zip(*rows, strict=True)] and rows[0] != rows[1]
