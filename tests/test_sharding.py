"""FSDP1 and ZeRO-2/3 in two CPU processes: gradients, steps and fingerprints are the unsharded model's."""

from __future__ import annotations

import importlib.util
import os
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import nn

from axolotl_bitnet.layers.bitlinear import BitLinear
from axolotl_bitnet.model.fingerprint import Fingerprint, fingerprint_model
from axolotl_bitnet.model.preflight import preflight
from axolotl_bitnet.model.whole_weights import whole_weights
from axolotl_bitnet.ternary import dequantize, ternarize
from support import sharded
from support.sharded import WORLD, Block, batch, build, in_ranks, reference, train

FSDP1 = [  # original parameters, resharded after forward, precision, checkpointed
    (True, True, "none", False),
    (True, True, "none", True),
    (True, False, "none", False),
    (True, True, "bf16", False),
    (False, True, "none", False),
    (False, True, "none", True),
    (False, False, "none", False),
    (False, True, "bf16", False),
]
ZERO = [(stage, policy) for stage in (2, 3) for policy in ("none", "bf16")]


def with_fsdp1(rank: int, original: bool, reshard: bool, policy: str, checkpointed: bool) -> dict[str, Any]:
    from torch.distributed.fsdp import FullyShardedDataParallel, MixedPrecision, ShardingStrategy
    from torch.distributed.fsdp.wrap import ModuleWrapPolicy

    bf16 = torch.bfloat16
    model: Any = FullyShardedDataParallel(
        build(torch.float32, checkpointed),
        auto_wrap_policy=ModuleWrapPolicy({Block}),
        sharding_strategy=ShardingStrategy.FULL_SHARD if reshard else ShardingStrategy.SHARD_GRAD_OP,
        mixed_precision=MixedPrecision(param_dtype=bf16, reduce_dtype=bf16) if policy == "bf16" else None,
        use_orig_params=original,
        device_id=torch.device("cpu"),
    )
    optimizer = torch.optim.AdamW(model.parameters(), lr=0.05)
    seen: dict[str, Any] = {"gradients": [], "fingerprints": [fingerprint_model(model)]}
    for step in range(2):
        train(model, [batch(rank, step)])
        if original:
            with model.summon_full_params(model, with_grads=True):
                seen["gradients"].append([parameter.grad.clone() for parameter in model.parameters()])
        optimizer.step()
        optimizer.zero_grad()
        seen["fingerprints"].append(fingerprint_model(model))
    seen["shards"] = [parameter.numel() for parameter in model.parameters()]
    with model.summon_full_params(model):
        seen["weights"] = [parameter.detach().clone() for parameter in model.parameters()]
    return seen


def with_zero(rank: int, stage: int, policy: str) -> dict[str, Any]:
    import deepspeed
    from deepspeed.utils import safe_get_full_fp32_param, safe_get_full_grad

    config = {
        "train_micro_batch_size_per_gpu": 4,
        "zero_optimization": {"stage": stage, "stage3_param_persistence_threshold": 0},
        "zero_allow_untested_optimizer": True,
        "gradient_clipping": 0.0,  # DeepSpeed 0.19's default is 1
        "bf16": {"enabled": policy == "bf16"},
    }
    model = build(torch.float32, checkpointed=False)
    optimizer = torch.optim.AdamW(model.parameters(), lr=0.05)
    engine, *_ = deepspeed.initialize(model=model, optimizer=optimizer, config=config)
    seen: dict[str, Any] = {"gradients": [], "fingerprints": [fingerprint_model(model)]}
    for step in range(2):
        x = batch(rank, step).to(torch.bfloat16 if policy == "bf16" else torch.float32)
        engine.backward(engine(x).float().square().sum())
        seen["gradients"].append([safe_get_full_grad(parameter).clone() for parameter in model.parameters()])
        with torch.no_grad():  # DeepSpeed 0.18's ZeRO-2 gathers into a view, which torch 2.13 forbids outside
            engine.step()
        seen["fingerprints"].append(fingerprint_model(engine))
    seen["weights"] = [safe_get_full_fp32_param(parameter).clone() for parameter in model.parameters()]
    seen["shards"] = [parameter.numel() for parameter in model.parameters()]
    return seen


def zero_preflight() -> tuple[list[str], Fingerprint]:
    """A dense ternary base loaded under ZeRO-3: rescaled, and its fingerprint afterwards."""
    import deepspeed

    config = {"train_batch_size": WORLD, "zero_optimization": {"stage": 3}}
    with deepspeed.zero.Init(config_dict_or_path=config):
        model = nn.Sequential(BitLinear(24, 37))
    with deepspeed.zero.GatheredParameters([model[0].weight], modifier_rank=0), torch.no_grad():
        model[0].weight.copy_(dense_ternary())
    assert model[0].weight.shape == (0,)
    return preflight(model, ["0"]).rescaled, fingerprint_model(model)


def dense_ternary() -> torch.Tensor:
    return dequantize(*ternarize(torch.randn(37, 24, generator=torch.Generator().manual_seed(3))))


def worker(rank: int, folder: str, zero: bool) -> None:
    os.environ |= {"RANK": str(rank), "LOCAL_RANK": str(rank), "WORLD_SIZE": str(WORLD)}
    os.environ["DS_ACCELERATOR"] = "cpu"
    if zero:
        import deepspeed

        deepspeed.init_distributed("gloo", auto_mpi_discovery=False)
        seen: list[Any] = [with_zero(rank, *case) for case in ZERO]
        seen.append(zero_preflight())
    else:
        seen = [with_fsdp1(rank, *case) for case in FSDP1]
    torch.save(seen, Path(folder) / f"{rank}.pt")


def run(folder: Path, zero: bool) -> list[list[Any]]:
    in_ranks(worker, str(folder), zero)
    return [torch.load(folder / f"{rank}.pt", weights_only=False) for rank in range(WORLD)]


@pytest.fixture(scope="module")
def fsdp1(tmp_path_factory: pytest.TempPathFactory) -> list[list[Any]]:
    """What each rank saw, for each case of FSDP1; one start of the processes for all of them."""
    return run(tmp_path_factory.mktemp("fsdp1"), zero=False)


@pytest.fixture(scope="module")
def zero(tmp_path_factory: pytest.TempPathFactory) -> list[list[Any]]:
    if importlib.util.find_spec("deepspeed") is None:
        pytest.skip("deepspeed is not installed")
    return run(tmp_path_factory.mktemp("zero"), zero=True)


@pytest.mark.slow
@pytest.mark.parametrize("index", range(len(FSDP1)), ids=["-".join(map(str, case)) for case in FSDP1])
def test_fsdp1_is_the_unsharded_model(fsdp1: list[list[Any]], index: int) -> None:
    original, _, policy, checkpointed = FSDP1[index]
    expected = reference(policy, torch.float32, checkpointed)
    for rank in range(WORLD):
        seen = fsdp1[rank][index]
        assert [f.digest for f in seen["fingerprints"]] == expected["fingerprints"]
        assert sorted(seen["fingerprints"][-1].tensors) == sorted(expected["tensors"])
        assert_equal([seen["weights"]], [expected["weights"]])
        if original:  # else FSDP1 shows no whole gradients
            assert_equal(seen["gradients"], expected["gradients"])
    assert len(set(expected["fingerprints"])) == 3  # every step flipped codes


@pytest.mark.slow
def test_fsdp1_shards_end_within_a_row(fsdp1: list[list[Any]]) -> None:
    ends = fsdp1[0][0]["shards"]  # with original parameters: how much of each the first rank holds
    assert any(held % 24 and held > 37 for held in ends)


@pytest.mark.slow
@pytest.mark.parametrize("index", range(len(ZERO)), ids=[f"zero{stage}-{policy}" for stage, policy in ZERO])
def test_zero_is_the_unsharded_model(
    zero: list[list[Any]], index: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    stage, policy = ZERO[index]
    if policy == "bf16":  # DeepSpeed takes its float32 masters from the model in bfloat16
        monkeypatch.setattr(sharded, "build", lambda *args: build(*args).to(torch.bfloat16).float())
    expected = reference(policy, torch.float32, False)
    for rank in range(WORLD):
        seen = zero[rank][index]
        assert [f.digest for f in seen["fingerprints"]] == expected["fingerprints"]
        assert list(seen["fingerprints"][-1].tensors) == expected["tensors"]
        assert_equal(seen["gradients"], expected["gradients"])
        assert_equal([seen["weights"]], [expected["weights"]])
        assert (sum(seen["shards"]) == 0) == (stage == 3)


@pytest.mark.slow
def test_zero3_bases_are_looked_at_before_training(zero: list[list[Any]]) -> None:
    layer = BitLinear(24, 37)
    layer.weight.data = dense_ternary()
    plain = nn.Sequential(layer)
    before = fingerprint_model(plain).digest
    assert preflight(plain, ["0"]).rescaled == ["0"]
    for rank in range(WORLD):
        rescaled, after = zero[rank][-1]
        assert rescaled == ["0"]
        assert after.digest == fingerprint_model(plain).digest != before


def test_a_shard_that_cannot_be_gathered_is_refused() -> None:
    model = nn.Sequential(BitLinear(24, 37))
    model[0].weight.data = model[0].weight.data[:5]
    with pytest.raises(RuntimeError, match=r"^0: its weight is a shard of shape \(5, 24\)"):
        list(whole_weights(model))
    freed = nn.Sequential(BitLinear(24, 37))
    freed[0].weight.untyped_storage().resize_(0)
    with pytest.raises(RuntimeError, match="shard"):
        list(whole_weights(freed))


def assert_equal(ones: list[list[torch.Tensor]], others: list[list[torch.Tensor]]) -> None:
    for step, other_step in zip(ones, others, strict=True):
        for one, other in zip(step, other_step, strict=True):
            assert torch.equal(one, other.to(one.dtype)) and other.abs().max() > 0
