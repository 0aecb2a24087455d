"""FSDP2's all-gather in 2 bits, on CPU processes: the same run as with FSDP2's own, to the bit."""

from __future__ import annotations

import logging
from collections.abc import Callable
from pathlib import Path
from typing import Any
from unittest.mock import Mock, patch

import pytest
import torch
import torch.distributed as dist
from accelerate.state import GradientState
from torch import Tensor, nn
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.fsdp import MixedPrecisionPolicy, fully_shard

from axolotl_bitnet import ops
from axolotl_bitnet.layers.bitlinear import BitLinear
from axolotl_bitnet.layers.gathered_weight import GatheredWeight
from axolotl_bitnet.layers.weight_codes import forget_weight_codes, keep_weight_codes
from axolotl_bitnet.model.fingerprint import fingerprint_model
from axolotl_bitnet.ops import dequantized_weight, ternarize, transposed_codes
from axolotl_bitnet.training import fsdp2_gather, gather_callback
from axolotl_bitnet.training.fsdp2_gather import gather_ternary
from axolotl_bitnet.training.gather_callback import GatherTernary
from axolotl_bitnet.training.keep_gathered import keep_gathered
from support.sharded import batch, build, in_ranks

TERNARY = 10  # layers of build()
UNITS = 4  # what FSDP2 gathers at once: three blocks, and the rest


def shard(
    gather: str, mesh: Any = None, policy: torch.dtype | None = None, reshard: bool = True, **model: Any
) -> nn.Sequential:
    """The model of support.sharded, sharded by blocks; ``gather`` as in the config."""
    built = build(model.get("latents", torch.float32), model.get("checkpointed", False))
    for module in built.modules():
        if isinstance(module, BitLinear):
            module.backward = model.get("backward", "bf16")
    settings: dict[str, Any] = {"mesh": mesh, "reshard_after_forward": reshard}
    if policy is not None:
        settings["mp_policy"] = MixedPrecisionPolicy(param_dtype=policy)
    for block in built[:3]:
        fully_shard(block, **settings)
    fully_shard(built, **settings)
    if gather == "ternary":
        assert gather_ternary(built) == TERNARY
        if model.get("keep"):
            assert keep_gathered(built) == UNITS
    return built


def losses_and_weights(model: nn.Sequential, steps: int = 3, micro_batches: int = 1, **how: Any) -> list[Any]:
    """Everything that a run shows: losses, gradients, fingerprints and weights."""
    optimizer = torch.optim.AdamW(model.parameters(), lr=0.05)
    first = next(model.parameters())
    dtype = how.get("dtype") or first.dtype
    seen: list[Any] = []
    for step in range(steps):
        if how.get("window"):
            keep_weight_codes(whole=False)
        for micro in range(micro_batches):
            GradientState()._set_sync_gradients(micro == micro_batches - 1)  # as the Trainer does
            if how.get("sync_last"):
                model.set_requires_gradient_sync(micro == micro_batches - 1)
            loss = model(batch(dist.get_rank(), 10 * step + micro).to(dtype)).float().square().sum()
            loss.backward()
            seen.append(loss.detach())
        seen += [parameter.grad.full_tensor() for parameter in model.parameters()]
        torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        forget_weight_codes()
        optimizer.step()
        optimizer.zero_grad()
        seen.append(fingerprint_model(model).digest)
    with torch.no_grad():
        seen.append(model(batch(dist.get_rank(), 99).to(dtype)))
    for module in (model, *model[:3]):
        module.reshard()
    return seen + [parameter.full_tensor().detach() for parameter in model.parameters()]


def pair(run: Callable[[str], list[Any]]) -> tuple[list[Any], list[Any]]:
    return run("native"), run("ternary")


def either(
    policy: torch.dtype | None = None,
    micro_batches: int = 1,
    sync_last: bool = False,
    window: bool = False,
    **how: Any,
) -> Any:
    def run(gather: str) -> list[Any]:
        how_to_run = {
            "micro_batches": micro_batches,
            "sync_last": sync_last,
            "dtype": policy,
            "window": window,
        }
        return losses_and_weights(shard(gather, policy=policy, **how), **how_to_run)

    return pair(run)


def compiled_layers() -> Any:
    def run(gather: str) -> list[Any]:
        model = shard(gather)
        for block in model[:3]:
            block.compile(backend="aot_eager", fullgraph=True)
        return losses_and_weights(model)

    return pair(run)


def replicas() -> Any:
    mesh = init_device_mesh("cpu", (2, dist.get_world_size() // 2), mesh_dim_names=("replicate", "shard"))
    return pair(lambda gather: losses_and_weights(shard(gather, mesh=mesh)))


def edited_weights() -> Any:
    """Weights that change in every way there is, between forwards: each forward sees them."""

    def run(gather: str) -> list[Any]:
        model, x = shard(gather), batch(0, 0)
        seen = [model(x).detach()]
        for parameter in model.parameters():
            parameter.data.mul_(-1.5)
        seen.append(model(x).detach())
        model.load_state_dict({name: tensor * 0.5 for name, tensor in model.state_dict().items()})
        seen.append(model(x).detach())
        for _, parameter in model.named_parameters():
            parameter.to_local().data.add_(0.01)
        model.eval()
        with torch.inference_mode():
            seen.append(model(x).clone())
        assert len({float(y.float().sum()) for y in seen}) == len(seen)
        return seen

    return pair(run)


def already_used() -> Any:
    """Switched over after a forward that left whole weights behind, by the callback."""

    def run(gather: str) -> list[Any]:
        model = shard("native", reshard=False)
        if gather == "ternary":
            with torch.no_grad():
                model(batch(0, 0))
            GatherTernary().on_train_begin(None, None, None, model=model)
        return losses_and_weights(model)

    return pair(run)


def reference() -> Any:
    """A bfloat16 reference beside a float32 policy, as DPO has them: the same outputs at first."""
    policy = shard("native", policy=torch.bfloat16)
    other = build(torch.float32, False)
    with torch.no_grad():
        for layer in other.modules():
            if isinstance(layer, BitLinear):
                layer.weight.data = layer.weight.bfloat16().float()
    for block in (*other[:3], other):
        fully_shard(block, mp_policy=MixedPrecisionPolicy(param_dtype=torch.bfloat16))
    GatherTernary(other).on_train_begin(None, None, None, model=policy)
    seen: list[list[Any]] = [[], []]
    for step in range(2):
        x = batch(dist.get_rank(), step).bfloat16()
        y = policy(x)
        y.float().sum().backward()
        with torch.no_grad():
            seen[1].append(other(x))
        seen[0].append(y.detach())
    return seen


def gathered() -> Any:
    """What the layers see, what FSDP2 keeps of it, and what travels."""
    model = shard("ternary", reshard=False, policy=torch.bfloat16)
    whole = {name: parameter.full_tensor() for name, parameter in model.named_parameters()}
    with torch.no_grad():
        model(batch(0, 0).bfloat16())
    weight, latents = model[0].gate.weight, whole["0.gate.weight"]
    assert isinstance(weight, GatheredWeight) and isinstance(weight, nn.Parameter)
    assert weight.dtype == torch.bfloat16 and weight.shape == latents.shape and weight.requires_grad
    rows = -(-latents.shape[0] // dist.get_world_size())
    assert weight.packed.numel() == dist.get_world_size() * -(-rows // 4) * latents.shape[1]
    codes, s, g = ops.ternarize.plain(latents)
    for one, other in zip(ternarize(weight), (codes, s, g), strict=True):
        assert torch.equal(one, other)
    assert torch.equal(
        dequantized_weight(weight, g, torch.float32), ops.dequantized_weight.plain(latents, g, torch.float32)
    )
    assert torch.equal(transposed_codes(weight, g)[0], codes.t())
    assert torch.equal(weight * 2, ops.dequantized_weight.plain(latents, g, torch.bfloat16) * 2)
    with FakeTensorMode() as fake:  # a compiler logs what it compiles
        assert "GatheredWeight((37, 24)" in repr(fake.from_tensor(weight))
    with pytest.raises(RuntimeError, match="only read"):
        weight.data.zero_()
    assert (
        fingerprint_model(model[0]).tensors["gate"].codes
        == fingerprint_model(build_like(latents)).tensors["0"].codes
    )
    model[0].reshard()
    assert not isinstance(model[0].gate.weight, GatheredWeight)
    assert gather_ternary(model) == 0  # all of them are
    return [], []


def packed_once() -> Any:
    """While weights are said not to change, shards are packed and summed once; afterwards anew each time."""
    model, counts = shard("ternary"), []
    packs, sums = Mock(side_effect=ops.pack_shard), Mock(side_effect=ops.abs_sum_parts)
    with patch.object(ops, "pack_shard", packs), patch.object(ops, "abs_sum_parts", sums):
        for said in (True, False):
            if said:
                keep_weight_codes(whole=False)
            for _ in range(3):
                model(batch(0, 0)).sum().backward()
            counts.append((packs.call_count, sums.call_count))
            packs.reset_mock()
            sums.reset_mock()
            forget_weight_codes()
    assert counts[0] == (TERNARY, TERNARY)
    assert counts[1] == (3 * 2 * TERNARY, 3 * TERNARY)  # packed for a forward and for a backward
    return [], []


def gathered_once_a_step() -> Any:
    """Kept weights are gathered once for a step's micro-batches, and are shards for its optimizer step."""
    model, counts = shard("ternary", keep=True), []
    optimizer = torch.optim.SGD(model.parameters(), lr=0.05)
    packed = Mock(side_effect=fsdp2_gather._Unit.packed, autospec=True)
    with patch.object(fsdp2_gather._Unit, "packed", lambda *args: packed(*args)):
        for constant in (True, False, True):
            if constant:
                keep_weight_codes(whole=False)
            for micro in range(3):
                GradientState()._set_sync_gradients(micro == 2)
                model(batch(0, micro)).sum().backward()
                kept = constant and micro < 2
                assert isinstance(model[0].gate.weight, GatheredWeight) == kept
            forget_weight_codes()
            optimizer.step()
            model.eval()
            with torch.no_grad():
                model(batch(0, 9))
            assert not isinstance(model[0].gate.weight, GatheredWeight)
            model.train()
            counts.append(packed.call_count)
            packed.reset_mock()
    assert counts == [2 * UNITS, 7 * UNITS, 2 * UNITS]  # one of each in the evaluation
    return [], []


def large_others() -> Any:
    """A module whose other parameters take more than its codes reshards as configured."""
    model = build(torch.float32, False)
    model[0].extra = nn.Parameter(torch.zeros(1000))
    for module in (*model[:3], model):
        fully_shard(module)
    assert gather_ternary(model) == TERNARY and keep_gathered(model) == UNITS - 1
    keep_weight_codes(whole=False)
    GradientState()._set_sync_gradients(False)
    model(batch(0, 0)).sum().backward()
    kept = [isinstance(block.gate.weight, GatheredWeight) for block in model[:3]]
    forget_weight_codes()
    assert kept == [False, True, True]
    return [], []


def build_like(latents: Tensor) -> nn.Sequential:
    layer = BitLinear(latents.shape[1], latents.shape[0], bias=False)
    layer.weight.data = latents
    return nn.Sequential(layer)


def falls_back(name: str) -> Any:
    """A torch without one of the names that the gather uses, or one that gathers otherwise: the run is the
    native one, and one sentence says so; where codes are asked for, it ends before a step."""

    def gone(*args: Any) -> None:
        raise AttributeError(f"no attribute '{name}'")

    def shifted(self: Any) -> Any:
        return torch.zeros_like(codes(self))

    codes = GatheredWeight.codes
    owner, value = {
        "codes": (GatheredWeight, shifted),
        "_param_groups": (fsdp2_gather, gone),
        "_Scales": (fsdp2_gather, gone),
    }.get(name, (fsdp2_gather._TernaryParam, property(gone) if name == "all_gather_inputs" else gone))

    def run(gather: str) -> list[Any]:
        model = shard("native")
        if gather == "ternary":
            before, said = getattr(owner, name), []
            setattr(owner, name, value)
            handler = logging.Handler()
            handler.emit = lambda record: said.append(record.getMessage())  # type: ignore[method-assign]
            logging.getLogger("axolotl.bitnet").addHandler(handler)
            try:
                with pytest.raises(RuntimeError, match=r"`bitnet.gather: ternary`: torch .* Remove `gather`"):
                    GatherTernary(required=True).on_train_begin(None, None, None, model=model)
                GatherTernary().on_train_begin(None, None, None, model=model)
            finally:
                setattr(owner, name, before)
                logging.getLogger("axolotl.bitnet").removeHandler(handler)
            assert len(said) == 1 and "gathers whole weights, not 2-bit codes" in said[0]
            reason = "other codes arrived than those of the whole weight" if name == "codes" else name
            assert reason in said[0]
        return losses_and_weights(model)

    return pair(run)


def works_after_its_check() -> Any:
    """The callback's check of one layer leaves nothing behind."""

    def run(gather: str) -> list[Any]:
        model = shard("native")
        if gather == "ternary":
            GatherTernary(required=True).on_train_begin(None, None, None, model=model)
            assert sum(1 for _ in fsdp2_gather.ternary_params(model)) == TERNARY
        return losses_and_weights(model)

    return pair(run)


CASES: dict[str, tuple[int, Callable[[], Any]]] = {  # name: processes, what they do
    "float32": (2, either),
    "bfloat16 latents": (2, lambda: either(latents=torch.bfloat16)),
    "computing in bfloat16": (2, lambda: either(policy=torch.bfloat16)),
    "not resharded after the forward": (2, lambda: either(policy=torch.bfloat16, reshard=False)),
    "activation checkpointing": (2, lambda: either(checkpointed=True)),
    "an 8-bit backward": (2, lambda: either(checkpointed=True, backward="int8")),
    "accumulation": (2, lambda: either(micro_batches=3)),
    "accumulation, gradients reduced at the end": (2, lambda: either(micro_batches=3, sync_last=True)),
    "accumulation, bytes kept": (2, lambda: either(micro_batches=3, window=True, checkpointed=True)),
    "accumulation, kept gathered": (2, lambda: either(micro_batches=3, window=True, keep=True)),
    "kept gathered, gradients reduced at the end": (
        2,
        lambda: either(micro_batches=3, window=True, keep=True, checkpointed=True, sync_last=True),
    ),
    "kept gathered, one micro-batch": (2, lambda: either(window=True, keep=True, policy=torch.bfloat16)),
    "gathered once a step": (2, gathered_once_a_step),
    "gathered as before beside large parameters": (2, large_others),
    "packed once": (2, packed_once),
    "compiled layers": (2, compiled_layers),
    "edited weights": (2, edited_weights),
    "already used": (2, already_used),
    "what is gathered": (2, gathered),
    "policy and reference": (2, reference),
    "checked before training": (2, works_after_its_check),
    "falls back: codes that are others": (2, lambda: falls_back("codes")),
    "falls back: no groups": (2, lambda: falls_back("_param_groups")),
    "falls back: no sizes": (2, lambda: falls_back("_Scales")),
    "falls back: asked in another way": (2, lambda: falls_back("all_gather_inputs")),
    "falls back: made in another way": (2, lambda: falls_back("init_unsharded_param")),
    "four ranks, one without a row of the last layer": (4, either),
    "two replicas of two shards": (4, replicas),
    "what four ranks gather": (4, gathered),
    "eight ranks, most without a row of the last layer": (8, either),
    "two replicas of four shards": (8, replicas),
}


def worker(rank: int, world: int, folder: str, names: list[str]) -> None:
    for name in names:
        native, ternary = CASES[name][1]()
        torch._dynamo.reset()
        if rank in (0, world - 1):
            torch.save((native, ternary), Path(folder) / f"{name}-{int(rank > 0)}.pt")


@pytest.fixture(scope="module")
def runs(tmp_path_factory: pytest.TempPathFactory, request: pytest.FixtureRequest) -> Path:
    """Folder of what the first and the last rank saw of every case; one start a number of processes."""
    folder = tmp_path_factory.mktemp("gather")
    tests = [item for item in request.session.items if item.path == request.path]
    asked = {item.callspec.params["name"] for item in tests if "runs" in item.fixturenames}
    for world in sorted({CASES[name][0] for name in asked}):
        names = [name for name, (wanted, _) in CASES.items() if wanted == world and name in asked]
        in_ranks(worker, world, str(folder), names, world=world)
    return folder


@pytest.mark.slow
@pytest.mark.parametrize(
    "name", [pytest.param(name, marks=[pytest.mark.once][: world > 4]) for name, (world, _) in CASES.items()]
)
def test_a_run_is_the_native_one_to_the_bit(runs: Path, name: str) -> None:
    for rank in (0, 1):
        native, ternary = torch.load(runs / f"{name}-{rank}.pt")
        assert len(native) == len(ternary)
        for one, other in zip(native, ternary, strict=True):
            assert one == other if isinstance(one, str) else torch.equal(one, other)


def test_unsharded_models_are_left_alone() -> None:
    assert gather_ternary(build(torch.float32, False)) == 0


def test_a_torch_that_cannot_keep_them_gathers_codes_each_time(monkeypatch: pytest.MonkeyPatch) -> None:
    def gone(model: nn.Module) -> None:
        raise AttributeError("no attribute '_reshard_after_forward'")

    said: list[str] = []
    monkeypatch.setattr(gather_callback, "keep_gathered", gone)
    monkeypatch.setattr(gather_callback, "warn", said.append)
    callback = GatherTernary(keep=True)
    callback.on_train_begin(None, None, None, model=nn.Linear(2, 2))
    assert len(said) == 1 and "anew in every pass" in said[0] and "_reshard_after_forward" in said[0]
