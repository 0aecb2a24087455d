"""Sample packing, context parallelism: a token's codes depend on it alone, wherever its row is cut."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from runs import TINY, config, train
from torch import nn

from axolotl_bitnet.bitlinear import BitLinear
from axolotl_bitnet.convert import convert_to_bitlinear


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


def test_axolotl_trains_packed_samples(tmp_path: Path) -> None:
    keys: dict[str, Any] = {"sample_packing": True, "pad_to_sequence_len": True, "micro_batch_size": 1}
    keys |= {"attn_implementation": "sdpa", "sequence_len": 256, "reinit_weights": True}
    run = train(config(tmp_path, TINY / "model", **keys))
    seen: list[torch.Tensor] = [batch["position_ids"] for batch in run.trainer.get_train_dataloader()]
    assert all(int((positions == 0).sum()) > 4 for positions in seen[:3])  # many samples a row
    assert len(run.losses) == 3
    assert '"verified": true' in (tmp_path / "out" / "bitnet.json").read_text()
