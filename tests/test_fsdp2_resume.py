"""FSDP2, two CPU processes: a run saved as sharded state dicts, as Axolotl's recipes do it, and resumed by
other processes has the losses, weights and fingerprint of the uninterrupted one, bit for bit."""

from __future__ import annotations

import shutil
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.distributed.checkpoint as dcp
from torch import nn
from torch.distributed.checkpoint.state_dict import (
    get_model_state_dict,
    get_optimizer_state_dict,
    set_model_state_dict,
    set_optimizer_state_dict,
)
from torch.distributed.fsdp import MixedPrecisionPolicy, fully_shard

from axolotl_bitnet.model.fingerprint import fingerprint_model
from axolotl_bitnet.storage.trainer_checkpoint import forget, problems
from support.sharded import WORLD, batch, build, in_ranks

pytestmark = pytest.mark.slow

STEPS, SAVED_AT = 6, 3
MODEL, OPTIMIZER = "pytorch_model_fsdp_0", "optimizer_0"  # Accelerate's names


def save(model: nn.Module, optimizer: torch.optim.Optimizer, folder: Path) -> None:
    """What accelerate.utils.fsdp_utils does for SHARDED_STATE_DICT."""
    parts = {
        MODEL: {"model": get_model_state_dict(model)},
        OPTIMIZER: {"optimizer": get_optimizer_state_dict(model, optimizer)},
    }
    for name, state in parts.items():
        dcp.save(state, storage_writer=dcp.FileSystemWriter(folder / name))


def load(model: nn.Module, optimizer: torch.optim.Optimizer, folder: Path) -> None:
    state = {"model": get_model_state_dict(model)}
    dcp.load(state, storage_reader=dcp.FileSystemReader(folder / MODEL))
    set_model_state_dict(model, state["model"])
    state = {"optimizer": get_optimizer_state_dict(model, optimizer)}
    dcp.load(state, storage_reader=dcp.FileSystemReader(folder / OPTIMIZER))
    set_optimizer_state_dict(model, optimizer, state["optimizer"])


def run(rank: int, folder: Path, resumed: bool) -> dict[str, Any]:
    model = build(torch.float32, checkpointed=True)
    for block in model[:3]:
        fully_shard(block, mp_policy=MixedPrecisionPolicy(param_dtype=torch.bfloat16))
    fully_shard(model, mp_policy=MixedPrecisionPolicy(param_dtype=torch.bfloat16))
    optimizer = torch.optim.AdamW(model.parameters(), lr=0.05)
    if resumed:
        load(model, optimizer, folder)
    losses = []
    for step in range(SAVED_AT if resumed else 0, STEPS):
        loss = model(batch(rank, step).to(torch.bfloat16)).float().square().sum()
        loss.backward()
        optimizer.step()
        optimizer.zero_grad()
        losses.append(loss.item())
        if step + 1 == SAVED_AT and not resumed:
            save(model, optimizer, folder)
    return {
        "losses": losses[-(STEPS - SAVED_AT) :],
        "fingerprint": fingerprint_model(model).digest,
        "weights": [parameter.full_tensor().detach() for parameter in model.parameters()],
        "dtypes": {parameter.dtype for parameter in model.parameters()},
    }


def worker(rank: int, folder: str, resumed: bool) -> None:
    torch.save(run(rank, Path(folder), resumed), Path(folder) / f"{rank}-{resumed}.pt")


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A run that saved on its way, and the same run resumed there by new processes."""
    folder = tmp_path_factory.mktemp("fsdp2-resume")
    for resumed in (False, True):
        in_ranks(worker, str(folder), resumed)
    return folder


def test_resumed_shards_are_uninterrupted_bit_for_bit(folder: Path) -> None:
    for rank in range(WORLD):
        whole, resumed = (
            torch.load(folder / f"{rank}-{part}.pt", weights_only=False) for part in (False, True)
        )
        assert resumed["losses"] == whole["losses"] and len(set(whole["losses"])) == STEPS - SAVED_AT
        assert resumed["fingerprint"] == whole["fingerprint"]
        assert resumed["dtypes"] == {torch.float32}
        for one, other in zip(resumed["weights"], whole["weights"], strict=True):
            assert torch.equal(one, other)


def test_shards_are_whole_until_their_metadata_is_gone(folder: Path, tmp_path: Path) -> None:
    made = tmp_path / "checkpoint-3"
    made.mkdir()
    for name in (MODEL, OPTIMIZER):
        shutil.copytree(folder / name, made / name)
        assert len(list((made / name).glob("*.distcp"))) == WORLD
    about_shards = [line for line in problems(made) if MODEL in line or OPTIMIZER in line]
    assert about_shards == []
    forget(made)
    about_shards = [line for line in problems(made) if MODEL in line or OPTIMIZER in line]
    assert len(about_shards) == 2 and all(".metadata is missing" in line for line in about_shards)
