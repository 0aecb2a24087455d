"""kernels/shards.py against the twins' bytes, codes and values."""

from __future__ import annotations

import pytest
import torch

from axolotl_bitnet import ops, ternary
from axolotl_bitnet.ops.kernels import shards as kernel
from axolotl_bitnet.ops.kernels import weights
from support.kernel_cases import same

SHAPES = [(1, 1), (5, 3), (8, 16), (37, 24), (64, 100), (66, 33)]
CASES = [(*shape, count, torch.float32) for shape in SHAPES for count in (1, 3, 8)]
CASES.append((12, 2049, 2, torch.float32))
CASES += [(37, 24, 3, dtype) for dtype in (torch.bfloat16, torch.float16)]


def shards_of(weight: torch.Tensor, count: int) -> list[torch.Tensor]:
    """As FSDP2 cuts it; the last may have fewer rows, or none."""
    chunks = list(weight.chunk(count))
    return chunks + [weight[:0]] * (count - len(chunks))


@pytest.mark.parametrize("rows, columns, count, dtype", CASES, ids=str)
def test_there_and_back(rows: int, columns: int, count: int, dtype: torch.dtype) -> None:
    weight = torch.randn(rows, columns).to(dtype)
    codes, _, g = ops.ternarize.plain(weight)
    most = -(-rows // count)
    parts = []
    for shard in shards_of(weight, count):
        parts.append(kernel.pack_shard(shard, g, most))
        same(parts[-1], ops.pack_shard.plain(shard, g, most))
    packed = torch.stack(parts)
    assert packed.shape == (count, -(-most // 4), columns)
    same(kernel.unpack_shards(packed, rows), codes)
    same(ops.unpack_shards.plain(packed, rows), codes)
    same(ops.transposed_shards.plain(packed, rows), codes.t().contiguous())
    if rows % (4 * count) == 0:
        same(kernel.transposed_shards(packed, rows), codes.t().contiguous())
    for wanted in (torch.float32, torch.bfloat16, torch.float16):
        expected = ops.dequantized_weight.plain(weight, g, wanted)
        same(kernel.dequantize_shards(packed, g, rows, wanted), expected)
        same(ops.dequantize_shards.plain(packed, g, rows, wanted), expected)


def test_a_poisoned_weight_is_nan_wherever_it_is_used() -> None:
    weight = torch.randn(8, 4)
    weight[3, 2] = torch.nan
    codes, _, g = ops.ternarize.plain(weight)
    packed = kernel.pack_shard(weight, g, 8)[None]
    same(kernel.unpack_shards(packed, 8), codes)
    assert kernel.dequantize_shards(packed, g, 8, torch.float32).isnan().all()


def test_views_are_read_as_they_are() -> None:
    whole = torch.randn(40, 66)
    for weight in (whole[:, 1:50], whole[::3], whole.t()):
        _, _, g = ops.ternarize.plain(weight)
        rows = weight.shape[0]
        same(kernel.pack_shard(weight, g, rows), ops.pack_shard.plain(weight, g, rows))
    packed = kernel.pack_shard(whole, ops.ternarize.plain(whole)[2], 40)[None]
    transposed = packed.transpose(1, 2).contiguous().transpose(1, 2)
    same(kernel.unpack_shards(transposed, 40), ops.unpack_shards.plain(packed, 40))
    same(kernel.transposed_shards(transposed, 40), ops.transposed_shards.plain(packed, 40))


@pytest.mark.parametrize("count", [1, 2, 3])
@pytest.mark.parametrize("shapes", [[(37, 24), (24, 37), (5, 24)], [(64, 32), (16, 32), (2, 4112)], [(9, 3)]])
def test_the_weights_of_a_layer_in_one_launch(shapes: list[tuple[int, int]], count: int) -> None:
    layout = ops.ShardLayout(count, shapes)
    packed = torch.randint(256, (count, layout.packed_size), dtype=torch.uint8)
    expected = []
    for (rows, columns), part in zip(shapes, layout.parts, strict=True):
        weight = torch.randn(rows, columns)
        codes, _, g = ops.ternarize.plain(weight)
        for rank, shard in enumerate(shards_of(weight, count)):
            own = packed[rank, part.packed_at :][: part.bytes * columns]
            own.copy_(kernel.pack_shard(shard, g, part.shard_rows).view(-1))
        own = packed[:, part.packed_at :][:, : part.bytes * columns].view(count, part.bytes, columns)
        same(kernel.unpack_shards(own, rows), codes)
        expected.append(codes)
    for made in (kernel.unpack_layer(packed, layout), ops.unpack_layer.plain(packed, layout)):
        assert made.shape == (layout.codes_size,)
        for part, codes in zip(layout.parts, expected, strict=True):
            same(made[part.codes_at :][: codes.numel()].view(codes.shape), codes)


@pytest.mark.parametrize("rows", [0, 1, 7, 300])
def test_the_sums_of_shards_make_the_absmean(rows: int) -> None:
    weight = torch.randn(rows, 77) * 0.02
    parts = weights.abs_sum_parts(weight)
    assert parts.dtype == torch.float64 and parts.shape == (512,)
    assert float(parts.sum()) == float(ternary.abs_sum(weight))
