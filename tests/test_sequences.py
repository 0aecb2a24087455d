"""Sample packing, context parallelism: a token's codes depend on it alone, wherever its row is cut."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.distributed as dist
from safetensors.torch import load_file, save_file
from torch import nn
from torch.distributed.nn.functional import all_gather as gather_with_gradients
from transformers import AttentionInterface, LlamaConfig, LlamaForCausalLM

from axolotl_bitnet.layers.bitlinear import BitLinear
from axolotl_bitnet.model.convert import convert_to_bitlinear
from support import TINY
from support.runs import config, train
from support.sharded import in_ranks


@pytest.mark.parametrize("cuts", [[5, 13, 1], [19], [8, 11], [1] * 19])
def test_a_row_may_be_cut_anywhere(cuts: list[int]) -> None:
    layer = BitLinear(24, 36, bias=True)
    x = torch.randn(1, 19, 24, requires_grad=True)
    x.data[0, 4] *= 100  # a neighbour's size must not matter
    dy = torch.randn(1, 19, 36)
    whole = layer(x)
    whole.backward(dy)
    dx, dw = x.grad, layer.weight.grad
    layer.zero_grad()
    assert dx is not None and dw is not None
    for part, upstream, slope, expected in zip(
        *(tensor.split(cuts, dim=1) for tensor in (x.detach(), dy, dx, whole.detach())), strict=True
    ):
        part = part.clone().requires_grad_()
        y = layer(part)
        y.backward(upstream)
        assert torch.equal(y, expected)
        torch.testing.assert_close(part.grad, slope)
    torch.testing.assert_close(layer.weight.grad, dw)  # the ranks' parts add up


def test_packed_samples_do_not_see_one_another(tiny_model: Callable[..., nn.Module]) -> None:
    model = tiny_model("Llama", attn_implementation="sdpa").eval()
    convert_to_bitlinear(model)
    first, second = torch.randint(3, 128, (1, 7)), torch.randint(3, 128, (1, 12))
    positions = torch.cat([torch.arange(7), torch.arange(12)])[None]
    with torch.no_grad():
        packed = model(torch.cat([first, second], 1), position_ids=positions, use_cache=False).logits
        apart = torch.cat([model(ids, use_cache=False).logits for ids in (first, second)], 1)
        shifted = model(torch.cat([first, second], 1), use_cache=False).logits
    assert (packed - apart).norm() < 0.01 * apart.norm()  # attention adds in another order; a code may flip
    assert (shifted - apart).norm() > 0.1 * apart.norm()  # as one sequence, they do


@pytest.mark.slow
def test_axolotl_trains_packed_samples(tmp_path: Path) -> None:
    keys: dict[str, Any] = {"sample_packing": True, "pad_to_sequence_len": True, "micro_batch_size": 1}
    keys |= {"attn_implementation": "sdpa", "sequence_len": 256, "reinit_weights": True}
    run = train(config(tmp_path, TINY / "model", **keys))
    seen: list[torch.Tensor] = [batch["position_ids"] for batch in run.trainer.get_train_dataloader()]
    assert all(int((positions == 0).sum()) > 4 for positions in seen[:3])  # many samples a row
    assert len(run.losses) == 3
    assert '"verified": true' in (tmp_path / "out" / "bitnet.json").read_text()
    # nothing waits for a GPU within a step
    assert not run.trainer.args.logging_nan_inf_filter and "get_batch_samples" in vars(run.trainer)


def attend_over_all(
    module: nn.Module, q: torch.Tensor, k: torch.Tensor, v: torch.Tensor, mask: Any, **kwargs: Any
) -> tuple[torch.Tensor, None]:
    """Causal attention of this process's part of the queries to the keys and values of all processes."""
    start = 0
    if dist.is_initialized():
        start = dist.get_rank() * q.shape[2]
        k, v = (torch.cat(gather_with_gradients(part.contiguous()), dim=2) for part in (k, v))
    k, v = (part.repeat_interleave(q.shape[1] // part.shape[1], dim=1) for part in (k, v))
    scores = q @ k.transpose(2, 3) * q.shape[-1] ** -0.5
    later = torch.arange(k.shape[2]) > start + torch.arange(q.shape[2])[:, None]
    return (scores.masked_fill(later, float("-inf")).softmax(-1) @ v).transpose(1, 2), None


def context_parallel_run(ids: torch.Tensor) -> dict[str, torch.Tensor]:
    """Two steps of a ternary Llama on rows of which every process holds a stretch."""
    AttentionInterface.register("over_all", attend_over_all)
    torch.manual_seed(3)
    model = LlamaForCausalLM(
        LlamaConfig(
            hidden_size=32, intermediate_size=48, num_hidden_layers=2, num_attention_heads=4, vocab_size=64,
            num_key_value_heads=2, attn_implementation="over_all", use_cache=False,
        )
    )  # fmt: skip
    convert_to_bitlinear(model)
    world, rank = (dist.get_world_size(), dist.get_rank()) if dist.is_initialized() else (1, 0)
    length = (ids.shape[1] - 1) // world
    stretch = slice(rank * length, (rank + 1) * length)
    positions = torch.arange(ids.shape[1] - 1)[None, stretch]
    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-3)
    seen: dict[str, torch.Tensor] = {}
    for step in range(2):
        logits = model(ids[:, :-1][:, stretch], position_ids=positions).logits
        loss = nn.functional.cross_entropy(logits.flatten(0, 1), ids[:, 1:][:, stretch].flatten()) / world
        loss.backward()
        seen[f"loss{step}"] = loss.detach().clone()
        for name, parameter in model.named_parameters():
            assert parameter.grad is not None
            if world > 1:
                dist.all_reduce(parameter.grad)
            seen[f"{step}.{name}"] = parameter.grad.clone()
        if world > 1:
            dist.all_reduce(seen[f"loss{step}"])
        optimizer.step()
        optimizer.zero_grad()
    return seen


def context_parallel_process(rank: int, ids: torch.Tensor, out: str) -> None:
    seen = context_parallel_run(ids)
    if rank == 0:
        save_file(seen, out)


@pytest.mark.slow
def test_rows_shared_by_two_processes(tmp_path: Path) -> None:
    """Context parallelism, keys and values gathered instead of passed round a ring: the same gradients."""
    ids = torch.randint(64, (2, 25))
    whole = context_parallel_run(ids)
    in_ranks(context_parallel_process, ids, str(tmp_path / "seen.safetensors"))
    shared = load_file(tmp_path / "seen.safetensors")
    assert shared.keys() == whole.keys()
    for name, tensor in whole.items():
        torch.testing.assert_close(shared[name], tensor, rtol=2e-4, atol=2e-6, msg=name)
