"""Small layers that FSDP2 takes together: the same run, in fewer units."""

from __future__ import annotations

from types import SimpleNamespace
from typing import Any

import pytest
import torch
import torch.distributed as dist
from accelerate.state import GradientState
from torch import nn
from torch.distributed.algorithms._checkpoint.checkpoint_wrapper import checkpoint_wrapper
from torch.distributed.fsdp import FSDPModule, MixedPrecisionPolicy

from axolotl_bitnet import convert_to_bitlinear
from axolotl_bitnet.layers.weight_codes import forget_weight_codes, keep_weight_codes
from axolotl_bitnet.model.fingerprint import fingerprint_model
from axolotl_bitnet.training import fsdp2_together
from axolotl_bitnet.training.fsdp2_gather import gather_ternary
from axolotl_bitnet.training.fsdp2_together import shard_together
from axolotl_bitnet.training.keep_gathered import keep_gathered
from axolotl_bitnet.training.layer_compile import compile_layers
from support.models import tiny_model
from support.sharded import in_ranks

LAYERS = 6


def prepare(model: Any) -> Any:
    """As accelerate does it: layer by layer, then the whole."""
    from torch.distributed.fsdp import fully_shard

    policy = MixedPrecisionPolicy(param_dtype=torch.bfloat16)
    for layer in model.model.layers:
        fully_shard(layer._checkpoint_wrapped_module, mp_policy=policy, reshard_after_forward=True)
    return fully_shard(model, mp_policy=policy)


def sharded(together: bool) -> Any:
    torch.manual_seed(5)
    model = tiny_model("Llama", num_hidden_layers=LAYERS)
    convert_to_bitlinear(model)
    layers = model.model.layers
    for index, layer in enumerate(layers):
        layers[index] = checkpoint_wrapper(layer)
    accelerator = SimpleNamespace(prepare=prepare)
    if together:
        shard_together(accelerator)
    return accelerator.prepare(model)


def units(model: nn.Module) -> list[int]:
    """Modules of each unit."""
    states = [module._get_fsdp_state() for module in model.modules() if isinstance(module, FSDPModule)]
    return [len(state._modules) for state in dict.fromkeys(states)]


def steps(model: Any, compiled: bool) -> list[Any]:
    if compiled:
        compile_layers(model, backend="aot_eager")
    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-2)
    seen: list[Any] = []
    for step in range(2):
        keep_weight_codes(whole=False)
        for last in (False, True):
            GradientState()._set_sync_gradients(last)
            seed = 10 * step + 2 * last + dist.get_rank()
            ids = torch.randint(3, 128, (2, 24), generator=torch.Generator().manual_seed(seed))
            loss = model(input_ids=ids, labels=ids, use_cache=False).loss
            loss.backward()
            seen.append(loss.detach())
        seen += [parameter.grad.full_tensor() for parameter in model.parameters()]
        forget_weight_codes()
        optimizer.step()
        optimizer.zero_grad()
        seen.append(fingerprint_model(model).digest)
    model.eval()
    with torch.no_grad():
        seen.append(model(input_ids=ids, use_cache=False).logits)
    return seen


def work(rank: int) -> None:
    for compiled in (False, True):
        apart, together = sharded(together=False), sharded(together=True)
        assert units(apart) == [1] * (LAYERS + 1) and units(together) == [1, 4, 2]
        for model in (apart, together):
            assert gather_ternary(model) == 7 * LAYERS and keep_gathered(model) == LAYERS
        for one, other in zip(steps(apart, compiled), steps(together, compiled), strict=True):
            assert one == other if isinstance(one, str) else torch.equal(one, other)
        torch._dynamo.reset()
    fsdp2_together._MOST_WEIGHTS = 2 * sum(p.numel() for p in tiny_layer().parameters())
    assert units(sharded(together=True)) == [1, 2, 2, 2]
    fsdp2_together._MOST_WEIGHTS = 0
    assert units(sharded(together=True)) == [1] * (LAYERS + 1)


def tiny_layer() -> nn.Module:
    return tiny_model("Llama", num_hidden_layers=1).model.layers[0]


@pytest.mark.slow
def test_a_run_in_fewer_units_is_the_same_to_the_bit() -> None:
    in_ranks(work)


def test_the_name_is_put_back(monkeypatch: pytest.MonkeyPatch) -> None:
    sharded_by: list[Any] = []

    def original(module: Any, **settings: Any) -> None:
        sharded_by.append(module)

    monkeypatch.setattr(torch.distributed.fsdp, "fully_shard", original)
    layer, other = tiny_layer(), nn.Linear(2, 2)
    with fsdp2_together.layers_together():
        torch.distributed.fsdp.fully_shard(layer)
        torch.distributed.fsdp.fully_shard(other)
        torch.distributed.fsdp.fully_shard(tiny_layer())
        assert sharded_by == [layer, other]
    assert torch.distributed.fsdp.fully_shard is original and len(sharded_by) == 3
    with pytest.raises(ValueError, match="of the model"), fsdp2_together.layers_together():
        raise ValueError("of the model")
    assert torch.distributed.fsdp.fully_shard is original
