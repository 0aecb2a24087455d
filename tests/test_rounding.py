"""Stochastic rounding of bfloat16 latents: equal on replicas, resumed to the bit, on whole and sharded
weights."""

from __future__ import annotations

from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
import torch.distributed as dist
import torch.distributed.checkpoint as dcp
from torch import nn
from torch.distributed.checkpoint.state_dict import (
    get_model_state_dict,
    get_optimizer_state_dict,
    set_model_state_dict,
    set_optimizer_state_dict,
)
from torch.distributed.fsdp import fully_shard

from axolotl_bitnet.layers.bitlinear import BitLinear
from axolotl_bitnet.training.rounding import (
    RoundingError,
    eight_bit,
    noise_seed,
    refuse_mixed_moments,
    seeded_adamw,
    shard_index,
)
from support.sharded import in_ranks

optim = pytest.importorskip("torchao.optim")

RATE, STEPS, SAVED_AT = 1e-5, 6, 3


@pytest.fixture(autouse=True)
def _eager(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(torch, "compile", lambda function, **_: function)  # takes a minute


def build(rows: int = 64) -> nn.Sequential:
    """A norm, whose moments are bfloat16, and 64 rows of 256 (8-bit moments, whole or halved)."""
    torch.manual_seed(1)
    return nn.Sequential(nn.RMSNorm(256), BitLinear(256, rows, bias=False)).bfloat16()


def adamw(model: nn.Module, seed: int = 7) -> Any:
    options: dict[str, Any] = dict(lr=RATE, betas=(0.9, 0.95), bf16_stochastic_round=True)
    return seeded_adamw()(model.parameters(), **options, seed=seed)


def train(model: nn.Module, optimizer: Any, rank: int, steps: range, ranks: int = 1) -> None:
    """Steps whose gradients are averaged as DDP does it, unless the model is sharded."""
    for step in steps:
        x = torch.randn(8, 256, generator=torch.Generator().manual_seed(100 * step + rank)).bfloat16()
        model(x).float().square().mean().backward()
        for parameter in model.parameters():
            if ranks > 1:
                dist.all_reduce(parameter.grad)
        torch.rand(rank + 1)  # every rank has drawn other numbers by now
        before = torch.get_rng_state()
        optimizer.step()
        if isinstance(optimizer, seeded_adamw()):
            assert torch.equal(torch.get_rng_state(), before)
        optimizer.zero_grad()


def weights(model: nn.Module) -> list[torch.Tensor]:
    return [value.full_tensor() for value in model.parameters()]  # type: ignore[attr-defined]


def ddp(rank: int, folder: Path) -> None:
    for seeded in (True, False):
        model = build()
        torch.manual_seed(rank)
        optimizer = adamw(model) if seeded else torchao_adamw(model)
        train(model, optimizer, rank, range(STEPS), ranks=2)
        torch.save([value.detach() for value in model.parameters()], folder / f"ddp-{seeded}-{rank}.pt")


def torchao_adamw(model: nn.Module) -> Any:
    return optim.AdamW8bit(model.parameters(), lr=RATE, betas=(0.9, 0.95), bf16_stochastic_round=True)


def sharded() -> nn.Module:
    model = build()
    fully_shard(model)
    return model


def fsdp2(rank: int, folder: Path) -> None:
    """One run in one go, and one that saves as Accelerate does under SHARDED_STATE_DICT and is resumed."""
    model = sharded()
    assert [shard_index(parameter) for parameter in model.parameters()] == [rank, rank]
    optimizer = adamw(model)
    train(model, optimizer, rank, range(STEPS))
    kinds = [type(optimizer.state[value]["exp_avg"].to_local()).__name__ for value in model.parameters()]
    assert kinds == ["Tensor", "OptimState8bit"]
    expected = weights(model)

    model = sharded()
    optimizer = adamw(model)
    train(model, optimizer, rank, range(SAVED_AT))
    saved = {"model": get_model_state_dict(model), "optimizer": get_optimizer_state_dict(model, optimizer)}
    dcp.save(saved, storage_writer=dcp.FileSystemWriter(folder / "checkpoint"))
    model = sharded()
    optimizer = adamw(model)
    state = {"model": get_model_state_dict(model), "optimizer": get_optimizer_state_dict(model, optimizer)}
    dcp.load(state, storage_reader=dcp.FileSystemReader(folder / "checkpoint"))
    set_model_state_dict(model, state["model"])
    set_optimizer_state_dict(model, optimizer, state["optimizer"])
    train(model, optimizer, rank, range(SAVED_AT, STEPS))
    torch.save((expected, weights(model)), folder / f"fsdp2-{rank}.pt")


def mixed(rank: int, folder: Path) -> None:
    """31 rows of 256 over two ranks: 4,096 and 3,840 elements."""
    model = build(rows=31)
    fully_shard(model)
    try:
        refuse_mixed_moments(list(model.parameters()), 256)
    except RoundingError as error:
        (folder / f"mixed-{rank}").write_text(str(error))


def worker(rank: int, folder: str) -> None:
    torch.compile = lambda function, **_: function  # type: ignore[assignment]
    for case in (ddp, fsdp2, mixed):
        case(rank, Path(folder))


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("rounding")
    in_ranks(worker, str(folder))
    return folder


def load(folder: Path, name: str) -> list[Any]:
    return [torch.load(folder / f"{name}-{rank}.pt", weights_only=True) for rank in range(2)]


def equal(one: list[torch.Tensor], other: list[torch.Tensor]) -> bool:
    return all(map(torch.equal, one, other))


@pytest.mark.slow
def test_replicas_under_ddp_stay_equal(folder: Path) -> None:
    first, second = load(folder, "ddp-True")
    assert equal(first, second) and not equal(first, [value.detach() for value in build().parameters()])
    first, second = load(folder, "ddp-False")
    assert not equal(first, second), "without the seed they drift apart"


@pytest.mark.slow
def test_shards_resume_to_the_bit(folder: Path) -> None:
    (expected, resumed), other = load(folder, "fsdp2")
    assert equal(expected, resumed) and equal(expected, other[0])
    assert not equal(expected, [value.detach() for value in build().parameters()])


@pytest.mark.slow
def test_shards_with_moments_of_two_kinds_are_refused(folder: Path) -> None:
    (text,) = {(folder / f"mixed-{rank}").read_text() for rank in range(2)}
    assert text.startswith(
        "a weight of shape (31, 256) over 2 ranks: 1 of its shards would have 8-bit moments"
    )


@pytest.mark.parametrize("seeded", [True, False])
def test_the_step_alone_decides_the_noise(seeded: bool) -> None:
    models = [build() for _ in range(2)]
    for number, model in enumerate(models):
        torch.manual_seed(number)
        train(model, adamw(model) if seeded else torchao_adamw(model), 0, range(STEPS))
    assert equal(list(models[0].parameters()), list(models[1].parameters())) is seeded


def test_updates_below_half_a_unit_add_up() -> None:
    """The mean of many weights moves by what was asked; rounded to nearest, none moves."""
    moved = {}
    for rounds in (True, False):
        weight = nn.Parameter(torch.full((256, 256), 0.75, dtype=torch.bfloat16))
        optimizer = seeded_adamw()(
            [weight], lr=RATE, betas=(0.9, 0.95), weight_decay=0.0, bf16_stochastic_round=rounds
        )
        for _ in range(20):
            weight.grad = torch.ones_like(weight)
            optimizer.step()
        moved[rounds] = 0.75 - weight.detach().double().mean().item()
    assert moved[False] == 0
    assert moved[True] == pytest.approx(20 * RATE, rel=0.15)


def test_second_moments_in_bfloat16_need_a_beta2_that_they_can_decay_by() -> None:
    """Why a beta2 of 0.996 and more is refused: norms have bfloat16 moments."""
    from axolotl_bitnet.plugin.refusals.rounding import HIGHEST_BETA2

    left = {}
    for beta2 in (0.95, 0.99, 0.999):
        weight = nn.Parameter(torch.ones(256, dtype=torch.bfloat16))
        optimizer = optim.AdamW8bit([weight], lr=RATE, betas=(0.9, beta2), bf16_stochastic_round=True)
        weight.grad = torch.linspace(0.5, 1.5, 256).bfloat16()
        optimizer.step()
        state = optimizer.state[weight]["exp_avg_sq"]
        before = state.float().clone()
        for _ in range(50):
            weight.grad = torch.zeros_like(weight)
            optimizer.step()
        left[beta2] = (state.float() / before).mean().item()
    assert left[0.95] == pytest.approx(0.95**50, rel=0.1) and left[0.99] == pytest.approx(0.99**50, rel=0.3)
    assert left[0.999] == 1, "nothing decays"
    assert 0.99 < HIGHEST_BETA2 < 0.999


@pytest.mark.parametrize(
    ("numel", "kept"), [(4095, False), (4096, True), (4096 + 128, False), (3840, False), (512 * 576, True)]
)
def test_which_moments_are_in_eight_bits(numel: int, kept: bool) -> None:
    weight = nn.Parameter(torch.zeros(numel, dtype=torch.bfloat16))
    optimizer = adamw(nn.ParameterList([weight]))
    weight.grad = torch.ones_like(weight)
    optimizer.step()
    assert (type(optimizer.state[weight]["exp_avg"]).__name__ == "OptimState8bit") is kept
    assert eight_bit(numel) is kept


def test_every_step_and_shard_has_a_seed_of_its_own() -> None:
    seeds = {noise_seed(seed, step, shard) for seed in (0, 42) for step in range(50) for shard in range(8)}
    assert len(seeds) == 2 * 50 * 8 and max(seeds) < 2**63
    assert noise_seed(2**40, 10**9, 0) < 2**63


def test_replicas_of_a_shard_share_its_number() -> None:
    """HSDP: a mesh of two replicas by four shards."""
    placements = [SimpleNamespace(is_shard=lambda sharded=sharded: sharded) for sharded in (False, True)]
    found = []
    for at in [(replica, shard) for replica in range(2) for shard in range(4)]:
        mesh = SimpleNamespace(size=lambda dim: (2, 4)[dim], get_local_rank=lambda dim, at=at: at[dim])
        found.append(shard_index(SimpleNamespace(device_mesh=mesh, placements=placements)))
    assert found == [0, 1, 2, 3] * 2 and shard_index(torch.zeros(2)) == 0
