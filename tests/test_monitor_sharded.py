"""The monitor under FSDP2, its replicas, FSDP1 and DDP: everywhere the unsharded figures."""

from __future__ import annotations

import os
from dataclasses import asdict
from functools import partial
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.distributed as dist
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.fsdp import FullyShardedDataParallel, ShardingStrategy, fully_shard

from axolotl_bitnet.training.fsdp2_gather import gather_ternary
from axolotl_bitnet.training.monitor import sampling as sample
from axolotl_bitnet.training.monitor.callback import Observation, observe
from axolotl_bitnet.training.monitor.sampling import Unwatchable
from axolotl_bitnet.training.monitor.start_weight_codes import load_start, save_start
from support.sharded import WORLD, batch, build, in_ranks

pytestmark = pytest.mark.slow

STEPS = 3


def fsdp2(gather: bool = False, mesh: bool = False, reshard: bool = True) -> Any:
    model = build(torch.float32, False)
    on = init_device_mesh("cpu", (2, 1), mesh_dim_names=("replicate", "shard")) if mesh else None
    for block in (*model[:3], model):
        fully_shard(block, mesh=on, reshard_after_forward=reshard)
    if gather:
        gather_ternary(model)
    return model


def fsdp1(original: bool = True, whole: bool = False) -> Any:
    model = build(torch.float32, False)
    strategy = ShardingStrategy.NO_SHARD if whole else ShardingStrategy.FULL_SHARD
    settings = {"device_id": torch.device("cpu"), "use_orig_params": original, "sharding_strategy": strategy}
    for index in range(3):
        model[index] = FullyShardedDataParallel(model[index], **settings)
    return FullyShardedDataParallel(model, **settings)


def plain(**_: Any) -> Any:
    return build(torch.float32, False)


def watch(model: Any) -> list[dict[str, Any]]:
    """Looks between steps whose gradients are the same on all ranks."""
    optimizer = torch.optim.AdamW(model.parameters(), lr=0.03)
    seen = observe(model, None, 0.03)
    found = [as_data(seen)]
    for step in range(STEPS):
        model(batch(0, step)).square().sum().backward()
        optimizer.step()
        optimizer.zero_grad()
        with torch.no_grad():
            model(batch(0, 50))  # an evaluation, which may leave weights gathered
        seen = observe(model, seen, 0.03)
        found.append(as_data(seen))
    return found


def as_data(seen: Observation) -> dict[str, Any]:
    return {name: asdict(view) for name, view in seen.layers.items()} | {"metrics": seen.metrics()}


def sampled() -> Any:
    """Of every matrix some elements, on each rank; all ranks get one result."""
    limit, sample.ELEMENTS = sample.ELEMENTS, 10 * 200
    try:
        return watch(fsdp2())
    finally:
        sample.ELEMENTS = limit


def resumed(folder: str) -> Any:
    """Codes of the start, written by each rank and read back."""
    model = fsdp2()
    start = observe(model)
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.to_local().add_(0.1)
    seen = observe(model, start)
    where = Path(folder) / "checkpoint-1"
    where.mkdir(exist_ok=True)
    dist.barrier()
    save_start(where, seen)
    codes, scales = load_start(where, seen)
    same = all(torch.equal(one, other) for one, other in zip(codes, start.codes, strict=True))
    kept = all(scales[name] == view.scale for name, view in start.layers.items())
    dist.barrier()
    return same, kept, sorted(path.name for path in where.iterdir()), seen.sharded


def flattened() -> str:
    try:
        observe(fsdp1(original=False))
    except Unwatchable as error:
        return str(error)
    return "seen"


CASES: dict[str, Any] = {
    "fsdp2": fsdp2,
    "fsdp2, 2-bit gather": partial(fsdp2, gather=True),
    "fsdp2, not resharded": partial(fsdp2, gather=True, reshard=False),
    "fsdp2, two replicas": partial(fsdp2, mesh=True),
    "fsdp1": fsdp1,
    "fsdp1, whole": partial(fsdp1, whole=True),
    "ddp": plain,
}


def worker(rank: int, folder: str) -> None:
    os.environ["RANK"] = str(rank)
    seen: dict[str, Any] = {name: watch(make()) for name, make in CASES.items()}
    seen |= {"resumed": resumed(folder), "flattened": flattened(), "sampled": sampled()}
    torch.save(seen, Path(folder) / f"{rank}.pt")


@pytest.fixture(scope="module")
def ranks(tmp_path_factory: pytest.TempPathFactory) -> list[dict[str, Any]]:
    folder = tmp_path_factory.mktemp("monitor")
    in_ranks(worker, str(folder))
    return [torch.load(folder / f"{rank}.pt") for rank in range(WORLD)]


@pytest.mark.parametrize("name", CASES)
def test_figures_are_those_of_the_unsharded_model(ranks: list[dict[str, Any]], name: str) -> None:
    expected = watch(plain())
    assert expected[-1]["metrics"]["bitnet/flips"] > 0 and expected[-1]["metrics"]["bitnet/frozen"] == 0
    for seen in ranks:
        assert list(seen[name][0]) == list(expected[0])
        for one, other in zip(seen[name], expected, strict=True):
            for layer in other:
                assert one[layer] == pytest.approx(other[layer], rel=1e-4, abs=1e-9), layer


def test_of_a_sample_all_ranks_have_the_same_figures(ranks: list[dict[str, Any]]) -> None:
    one, other = (seen["sampled"] for seen in ranks)
    assert one == other
    exact = watch(plain())[-1]["metrics"]
    assert one[-1]["metrics"]["bitnet/zeros"] == pytest.approx(exact["bitnet/zeros"], abs=0.08)
    assert one[-1]["metrics"] != exact


def test_each_rank_keeps_its_codes_of_the_start(ranks: list[dict[str, Any]]) -> None:
    for seen in ranks:
        same, kept, files, sharded = seen["resumed"]
        assert same and kept and sharded
        assert files == ["bitnet_monitor_0.safetensors", "bitnet_monitor_1.safetensors"]


def test_flattened_weights_are_not_looked_at(ranks: list[dict[str, Any]]) -> None:
    assert all("use_orig_params" in seen["flattened"] for seen in ranks)
