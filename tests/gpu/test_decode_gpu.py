"""Products of a few rows with packed weights on a GPU: the definition's bits, whatever ran just before."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor

from axolotl_bitnet.ops import pack_codes, packed_matmul
from axolotl_bitnet.ops.kernels import decode, matvec

pytestmark = [
    pytest.mark.gpu,
    pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA GPU"),
]
BF16 = torch.bfloat16
# Rows of each matrix, and columns: q with k and v, gate with up, down; and what fills no tile
LAYERS = [([2048, 256, 256], 2048), ([13312], 2048), ([2048], 13312), ([3072], 23040), ([6912], 2560)]
LAYERS += [([60], 100), ([4, 100, 8], 1000), ([8], 64), ([68], 32768)]
by_layer = pytest.mark.parametrize("sizes, columns", LAYERS, ids=str)


def weights(sizes: list[int], columns: int) -> tuple[Tensor, Tensor]:
    codes = torch.randint(-1, 2, (sum(sizes), columns), dtype=torch.int8, device="cuda")
    return torch.cat([pack_codes(part) for part in codes.split(sizes)]), torch.rand(
        len(sizes), device="cuda"
    ) * 90 + 0.5


@by_layer
@pytest.mark.parametrize("rows", [1, 2, 3, 5, 8, 9, 16, 17, 33])
def test_every_bit_is_the_definition_s(rows: int, sizes: list[int], columns: int) -> None:
    packed, s = weights(sizes, columns)
    x, bias = torch.randn(rows, columns, device="cuda"), torch.randn(sum(sizes), device="cuda")
    for dtype, added in ((BF16, None), (torch.float32, bias), (torch.float16, bias)):
        found = packed_matmul(x, packed, s, sizes, added, dtype)
        assert torch.equal(found, packed_matmul.plain(x, packed, s, sizes, added, dtype))


@pytest.mark.parametrize("out", [2048, 2060])
@pytest.mark.parametrize("columns", [4160, 6912, 8192, 9216, 13312, 16384])
def test_every_program_quantizes_one_wide_row(columns: int, out: int) -> None:
    """In one kernel; with and without overlap; rows that lie apart, of nothing and of what is not finite."""
    packed, s = weights([out], columns)
    bias = torch.randn(out, device="cuda")
    for each in (1, 2) if columns <= 8192 else (1,):
        how = matvec.cut_in_words(columns, 1, each, 4, 256, 8, True)
        for dtype, added in ((BF16, None), (torch.float32, bias)):
            for overlap in (True, False):
                rows = torch.randn(4, columns + 64, device="cuda", dtype=dtype)[:, 64:]
                rows[1], rows[2, 7], rows[3, columns - 1] = 0, float("nan"), 3e4
                for x in rows.split(1):
                    found = decode._few_rows(x, packed, s, (out,), added, dtype, how, overlap)
                    plain = packed_matmul.plain(x, packed, s, [out], added, dtype)
                    torch.testing.assert_close(found, plain, rtol=0, atol=0, equal_nan=True)


@pytest.mark.parametrize("rows", [1, 3, 8, 16])
def test_what_was_written_just_before_is_read(rows: int) -> None:
    """Programs start while the kernel before still runs. x, the weights, the scale and the bias are written
    by that kernel, a large one, and by ours in a chain."""
    for turn in range(40):
        torch.manual_seed(turn)
        packed, s = weights([2048], 2048)
        x, bias = torch.randn(rows, 2048, device="cuda", dtype=BF16), torch.randn(2048, device="cuda")
        expected = x
        for _ in range(3):
            expected = packed_matmul.plain(expected, packed, s, [2048], bias, BF16)
        places = [torch.zeros_like(each) for each in (x, packed, s, bias)]
        busy = torch.zeros(1 << 22, device="cuda")
        torch.cuda.synchronize()
        busy.add_(1)
        for place, each in zip(places, (x, packed, s, bias), strict=True):
            place.copy_(each)
        y, weight, scale, added = places
        for _ in range(3):
            y = packed_matmul(y, weight, scale, [2048], added, BF16)
        assert torch.equal(y, expected), turn


@pytest.mark.parametrize("rows", [1, 8])
def test_a_graph_of_many_layers_replays_what_eager_gives(rows: int) -> None:
    layers = [weights([4096, 64], 1024) for _ in range(8)]
    x = torch.randn(rows, 1024, device="cuda", dtype=BF16)

    def run() -> Tensor:
        y = x
        for packed, s in layers:
            y = packed_matmul(y[:, :1024].contiguous(), packed, s, [4096, 64], None, BF16)
        return y

    run()
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        found = run()
    for _ in range(20):
        x.copy_(torch.randn_like(x))
        graph.replay()
        y = x
        for packed, s in layers:
            y = packed_matmul.plain(y[:, :1024].contiguous(), packed, s, [4096, 64], None, BF16)
        assert torch.equal(found, y)


@pytest.mark.parametrize("overlap", [False, True])
def test_with_and_without_overlap(overlap: bool) -> None:
    packed, s = weights([512], 2048)
    for rows in (1, 4, 16):
        x = torch.randn(rows, 2048, device="cuda", dtype=BF16)
        found = decode._few_rows(x, packed, s, (512,), None, BF16, overlap=overlap)
        assert torch.equal(found, packed_matmul.plain(x, packed, s, [512], None, BF16))
