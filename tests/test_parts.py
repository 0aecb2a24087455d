"""Parts of layers: registered as PyTorch wants them, the same from latents and from gathered weights."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor
from torch._subclasses.fake_tensor import FakeTensorMode

from axolotl_bitnet import ops, ternary
from axolotl_bitnet.layers import parts
from axolotl_bitnet.layers.gathered_weight import READS, GatheredWeight

ROWS, COLUMNS, HIDDEN = (8, 12), 10, 6
PARTS = {
    "project": parts.project,
    "project_backward": parts.project_backward,
    "gate_and_up": parts.gate_and_up,
    "down_backward": parts.down_backward,
}

by_part = pytest.mark.parametrize("name", PARTS)
by_shards = pytest.mark.parametrize("shards", [0, 1, 3])


def gathered(latents: Tensor, shards: int) -> GatheredWeight:
    g = ternary.absmean(ternary.abs_sum(latents), latents.numel())
    rows = -(-latents.shape[0] // shards)
    packed = torch.stack([ops.pack_shard(latents[k * rows : (k + 1) * rows], g, rows) for k in range(shards)])
    return GatheredWeight(packed, g, ternary.scale_of(g).reshape(1), latents.shape[0], latents.dtype)


def arguments(
    name: str, shards: int, precision: str = "bf16", dtype: torch.dtype = torch.float32
) -> list[Any]:
    """Of a part, with latents or weights gathered from so many shards."""
    generator = torch.Generator().manual_seed(11)

    def randn(*shape: int) -> Tensor:
        return torch.randn(shape, generator=generator)

    shapes = {"down_backward": [(COLUMNS, HIDDEN)], "gate_and_up": [(HIDDEN, COLUMNS)] * 2}
    latents = [randn(*shape) for shape in shapes.get(name, [(rows, COLUMNS) for rows in ROWS])]
    means = [ternary.absmean(ternary.abs_sum(one), one.numel()) for one in latents]
    weights = [gathered(one, shards) for one in latents] if shards else latents
    codes_x, r = ternary.quantize_activations(randn(2, 5, COLUMNS))
    if name == "down_backward":
        gate, up = randn(2, 5, HIDDEN), randn(2, 5, HIDDEN)
        _, r_h = ops.swiglu_quantize(gate, up)
        return [weights, [], means, randn(2, 5, COLUMNS), gate, up, r_h, r, precision, True, torch.float32]
    if name == "gate_and_up":
        return [weights, [], codes_x, r, torch.float32]
    if name == "project":
        return [weights, [], codes_x, r, [randn(ROWS[0]), None], torch.float32]
    dys = [randn(2, 5, rows) for rows in ROWS]
    peaks = [peak for dy in dys for peak in ops.gradient_peaks(dy, r)] if precision == "int8" else []
    return [weights, [], means, dys, peaks, codes_x, r, precision, [True, True, True], torch.float32]


def inner(given: list[Any]) -> list[Any]:
    """The arguments as a compiler's code has them: gathered weights by what they hold."""
    weights, _, *rest = given
    if not isinstance(weights[0], GatheredWeight):
        return given
    held = [tensor for weight in weights for tensor in (weight.packed, weight.g, weight.s)]
    return [held, [weight.shape[0] for weight in weights], *rest]


@by_part
@by_shards
@pytest.mark.parametrize("precision", ["bf16", "int8"])
def test_opcheck(name: str, shards: int, precision: str) -> None:
    torch.library.opcheck(PARTS[name].opaque, tuple(inner(arguments(name, shards, precision))))


@by_part
@by_shards
def test_the_compiler_is_told_the_true_layout(name: str, shards: int) -> None:
    given = inner(arguments(name, shards))
    with FakeTensorMode() as mode:
        fakes = PARTS[name].opaque(*torch.utils._pytree.tree_map_only(Tensor, mode.from_tensor, given))
    for one, fake in zip(PARTS[name].opaque(*given), fakes, strict=True):
        assert (one.dtype, one.shape, one.is_contiguous()) == (fake.dtype, fake.shape, fake.is_contiguous())


@by_part
@pytest.mark.parametrize("shards", [1, 3])
@pytest.mark.parametrize("precision", ["bf16", "int8_dx", "int8"])
def test_gathered_weights_give_what_latents_give(name: str, shards: int, precision: str) -> None:
    expected = PARTS[name](*arguments(name, 0, precision))
    for part in (PARTS[name], READS[PARTS[name].opaque]):
        found = part(*arguments(name, shards, precision))
        assert all(torch.equal(one, other) for one, other in zip(found, expected, strict=True))


def test_latents_beside_gathered_weights() -> None:
    given, expected = arguments("project", 3), parts.project(*arguments("project", 0))
    given[0][1] = arguments("project", 0)[0][1]
    found = READS[parts.project.opaque](*given)
    assert all(torch.equal(one, other) for one, other in zip(found, expected, strict=True))


@pytest.mark.parametrize("wanted", [[True, False, True], [False, True, False], [True, False, False]])
def test_only_wanted_gradients_are_computed(wanted: list[bool]) -> None:
    given = arguments("project_backward", 0)
    every = parts.project_backward(*given)
    given[-2] = wanted
    some = parts.project_backward(*given)
    expected = [one for one, needed in zip(every, wanted, strict=True) if needed]
    assert all(torch.equal(one, other) for one, other in zip(some, expected, strict=True))


def test_peaks_that_are_not_given_are_found() -> None:
    given = arguments("project_backward", 0, "int8")
    expected = parts.project_backward(*given)
    given[4] = []
    found = parts.project_backward(*given)
    assert all(torch.equal(one, other) for one, other in zip(found, expected, strict=True))


def test_the_last_gradient_of_a_mlp_is_left_out() -> None:
    given = arguments("down_backward", 0)
    every = parts.down_backward(*given)
    given[-2] = False
    assert all(
        torch.equal(one, other) for one, other in zip(parts.down_backward(*given), every[:2], strict=True)
    )


def test_eager_layers_call_plain_functions() -> None:
    with torch.profiler.profile(activities=[torch.profiler.ProfilerActivity.CPU]) as profile:
        for name, part in PARTS.items():
            part(*arguments(name, 0))
    assert not any(event.key.startswith("axolotl_bitnet::") for event in profile.key_averages())
