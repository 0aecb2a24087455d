"""Codes kept between two optimizer steps: made once there, and never past anything that changes a weight."""

from __future__ import annotations

import copy
from collections.abc import Callable, Iterator

import pytest
import torch
from torch import Tensor, nn

from axolotl_bitnet import ops
from axolotl_bitnet.layers import parts
from axolotl_bitnet.layers.bitlinear import BitLinear
from axolotl_bitnet.layers.weight_codes import (
    FEW_ROWS,
    forget_weight_codes,
    keep_weight_codes,
    ternarize,
    weights_unchanged,
)
from axolotl_bitnet.model.convert import convert_to_bitlinear


@pytest.fixture
def made(monkeypatch: pytest.MonkeyPatch) -> Iterator[list[Tensor]]:
    """The weights that are quantized, in order."""
    weights: list[Tensor] = []
    original = ops.ternarize

    def counting(weight: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        weights.append(weight)
        return original(weight)

    monkeypatch.setattr(ops, "ternarize", counting)
    yield weights
    forget_weight_codes()


def step(layer: BitLinear, x: Tensor) -> Tensor:
    y = layer(x)
    y.square().mean().backward()
    return y.detach()


def test_one_quantization_in_a_window_and_one_a_forward_outside(made: list[Tensor]) -> None:
    layer = BitLinear(24, 8)
    with weights_unchanged():
        inside = [step(layer, torch.ones(3, 24)) for _ in range(4)]
    assert len(made) == 1 and made[0] is layer.weight
    outside = [step(layer, torch.ones(3, 24)) for _ in range(2)]
    assert len(made) == 3
    for y in inside + outside:
        assert torch.equal(y, inside[0])


def test_gradients_are_those_without(made: list[Tensor]) -> None:
    layer = BitLinear(24, 8)
    other = copy.deepcopy(layer)
    batches = torch.randn(3, 5, 24)
    with weights_unchanged():
        for x in batches:
            step(layer, x)
    for x in batches:
        step(other, x)
    assert torch.equal(layer.weight.grad, other.weight.grad)


def test_checkpointing_quantizes_each_weight_once(
    made: list[Tensor], tiny_model: Callable[..., nn.Module]
) -> None:
    model = tiny_model("Llama").train()
    names = convert_to_bitlinear(model)
    model.gradient_checkpointing_enable({"use_reentrant": False})
    ids = torch.randint(3, 128, (2, 9))
    with weights_unchanged():
        model(ids, labels=ids).loss.backward()
    assert len(made) == len(names)


OPTIMIZERS: list[Callable[[nn.Module], torch.optim.Optimizer]] = [
    lambda layer: torch.optim.AdamW(layer.parameters(), lr=0.1),
    lambda layer: torch.optim.AdamW(layer.parameters(), lr=0.1, foreach=True),
    lambda layer: torch.optim.AdamW(layer.parameters(), lr=0.1, fused=True),
    lambda layer: torch.optim.SGD(layer.parameters(), lr=10.0),
]


def by_data(layer: BitLinear) -> None:
    layer.weight.data.mul_(-1)


def by_no_grad(layer: BitLinear) -> None:
    with torch.no_grad():
        layer.weight.mul_(-1)


def by_state(layer: BitLinear) -> None:
    layer.load_state_dict({name: -tensor for name, tensor in layer.state_dict().items()})


def by_assignment(layer: BitLinear) -> None:
    state = {name: -tensor for name, tensor in layer.state_dict().items()}
    layer.load_state_dict(state, assign=True)


def by_new_data(layer: BitLinear) -> None:
    layer.weight.data = -layer.weight.data


EDITS = [by_data, by_no_grad, by_state, by_assignment, by_new_data]


@pytest.mark.parametrize("optimizer_of", OPTIMIZERS, ids=["for-loop", "foreach", "fused", "sgd"])
def test_a_window_left_open_ends_with_the_optimizers_step(
    optimizer_of: Callable[[nn.Module], torch.optim.Optimizer], made: list[Tensor]
) -> None:
    """What an interrupted run leaves behind: a loop of one's own must not train on codes of long ago."""
    layer = BitLinear(24, 8)
    optimizer = optimizer_of(layer)
    keep_weight_codes()
    step(layer, torch.randn(6, 24))
    optimizer.step()
    for _ in range(2):  # the window is closed: every forward quantizes
        step(layer, torch.randn(6, 24))
    assert len(made) == 3


@pytest.mark.parametrize("optimizer_of", OPTIMIZERS, ids=["for-loop", "foreach", "fused", "sgd"])
def test_the_next_window_sees_what_the_optimizer_did(
    optimizer_of: Callable[[nn.Module], torch.optim.Optimizer],
) -> None:
    layer = BitLinear(24, 8)
    optimizer = optimizer_of(layer)
    for _ in range(3):
        with weights_unchanged():
            step(layer, torch.randn(6, 24))
            step(layer, torch.randn(6, 24))
        optimizer.step()
        optimizer.zero_grad()
        with weights_unchanged():
            found = ternarize(layer.weight)
        for one, other in zip(found, ops.ternarize.plain(layer.weight.detach().clone()), strict=True):
            assert torch.equal(one, other)


@pytest.mark.slow
def test_the_next_window_sees_what_an_8_bit_optimizer_did() -> None:
    optimizers = pytest.importorskip("torchao.optim")
    layer = BitLinear(256, 64, bias=False)
    optimizer = optimizers.AdamW8bit(layer.parameters(), lr=0.1)
    with weights_unchanged():
        before = ternarize(layer.weight)[0]
        step(layer, torch.randn(6, 256))
    optimizer.step()
    with weights_unchanged():
        found = ternarize(layer.weight)[0]
    assert torch.equal(found, ops.ternarize.plain(layer.weight.detach().clone())[0])
    assert not torch.equal(found, before)


@pytest.mark.parametrize("edit", EDITS)
def test_the_next_window_sees_an_edit(edit: Callable[[BitLinear], None]) -> None:
    layer = BitLinear(24, 8)
    x = torch.randn(4, 24)
    with weights_unchanged():
        before = layer(x)
    edit(layer)
    with weights_unchanged():
        assert not torch.equal(layer(x), before)
        assert torch.equal(ternarize(layer.weight)[0], ops.ternarize.plain(layer.weight.detach().clone())[0])


@pytest.mark.parametrize("edit", [by_no_grad, by_state, by_assignment, by_new_data])
def test_edits_that_can_be_seen_are_seen_inside_a_window_too(edit: Callable[[BitLinear], None]) -> None:
    """All but a write through .data into the same memory: hence the window."""
    layer = BitLinear(24, 8)
    with weights_unchanged():
        ternarize(layer.weight)
        edit(layer)
        assert torch.equal(ternarize(layer.weight)[0], ops.ternarize.plain(layer.weight.detach().clone())[0])


def test_an_error_closes_the_window(made: list[Tensor]) -> None:
    layer = BitLinear(24, 8)
    with pytest.raises(RuntimeError, match="mine"), weights_unchanged():
        raise RuntimeError("mine")
    layer(torch.ones(24))
    layer(torch.ones(24))
    assert len(made) == 2


def test_compiled_layers_keep_nothing(made: list[Tensor]) -> None:
    layer = BitLinear(24, 8)
    compiled = torch.compile(layer, backend="eager", fullgraph=True)
    with weights_unchanged():
        first = compiled(torch.ones(2, 24))
        by_data(layer)
        assert not torch.equal(compiled(torch.ones(2, 24)), first)


@pytest.mark.parametrize("rows, compiled, kept", [(2, True, 6), (2, False, 0), (FEW_ROWS + 1, True, 0)])
def test_compiled_parts_keep_codes_of_few_rows_where_they_are_told_to(
    made: list[Tensor], rows: int, compiled: bool, kept: int
) -> None:
    """Also where the compiler's code writes to the absmeans that it is given."""
    codes_x, r = torch.randint(-127, 128, (rows, 24), dtype=torch.int8), torch.ones(rows, 1)
    weights = [torch.randn(8, 24) for _ in range(6)]
    rest = codes_x, r, [None] * 6, torch.float32
    expected = parts.project.plain(weights, [], *rest)
    made.clear()
    with weights_unchanged(compiled):
        for _ in range(3):
            found = parts.project.opaque([weight.detach() for weight in weights], [], *rest)
            assert len(found) == 12 and all(map(torch.equal, found, expected))
            for mean in found[6:]:
                mean.zero_()
        assert len(made) == (kept or 18)
        weights[0].add_(1)
        parts.project.opaque(weights, [], *rest)
        assert len(made) == (kept + 1 if kept else 24)


@pytest.mark.slow
def test_the_trainers_callbacks_open_and_close_the_window(
    made: list[Tensor], tiny_model: Callable[..., nn.Module], tmp_path: str
) -> None:
    """Two micro-batches a step: each weight once a step, and again where the trainer evaluates."""
    from transformers import Trainer, TrainingArguments

    from axolotl_bitnet.training.keep_weight_codes import KeepWeightCodes

    model = tiny_model("Llama")
    names = convert_to_bitlinear(model)
    ids = torch.randint(3, 128, (12, 9))
    data = [{"input_ids": row, "labels": row} for row in ids]
    args = TrainingArguments(
        str(tmp_path),
        per_device_train_batch_size=2,
        gradient_accumulation_steps=2,
        max_steps=3,
        report_to=[],
        use_cpu=True,
        save_strategy="no",
    )
    trainer = Trainer(model, args, train_dataset=data, callbacks=[KeepWeightCodes()])
    trainer.train()
    assert len(made) == 3 * len(names)
    trainer.evaluate(data[:2])
    assert len(made) == 4 * len(names)
    keep_weight_codes()
    model(ids[:1])
    assert len(made) == 5 * len(names)  # a new window begins with nothing
