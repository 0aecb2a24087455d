"""The definition against formulas written out in numpy, and the properties that the package builds on."""

from __future__ import annotations

import math

import numpy as np
import pytest
import torch
from torch import Tensor

from axolotl_bitnet import ternary

SHAPES = [(1, 1), (4, 1), (1, 5), (3, 7), (16, 16), (33, 65), (128, 64), (101, 257)]


def heavy_tailed(*shape: int) -> Tensor:
    """Magnitudes over some 40 binary orders: what makes a float32 sum depend on its order."""
    return torch.randn(shape) * torch.exp2(torch.randint(-40, 1, shape).float())


def sign_codes(rows: int, columns: int, density: float) -> Tensor:
    codes = torch.where(torch.rand(rows, columns) < 0.5, -1, 1).to(torch.int8)
    return codes * (torch.rand(rows, columns) < density)


# Weights


@pytest.mark.parametrize("shape", SHAPES)
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
@pytest.mark.parametrize("size", [1e-7, 0.02, 1.0, 300.0])
def test_weights_follow_the_formulas(oracle, shape: tuple[int, int], dtype: torch.dtype, size: float) -> None:
    weight = (torch.randn(shape) * size).to(dtype)
    codes, scale = ternary.ternarize(weight)
    expected_codes, expected_scale = oracle.weights(weight)
    assert codes.dtype == torch.int8 and codes.shape == weight.shape
    assert scale.dtype == torch.bfloat16 and scale.shape == (1,)
    np.testing.assert_array_equal(codes.numpy(), expected_codes)
    assert np.float32(scale.item()) == expected_scale


@pytest.mark.parametrize("shape", SHAPES)
def test_absmean_is_the_exact_sum_rounded_once(shape: tuple[int, int]) -> None:
    weight = torch.randn(shape)
    exact = math.fsum(abs(v) for v in weight.to(torch.bfloat16).double().flatten().tolist())
    g = ternary.absmean(ternary.abs_sum(weight), weight.numel())
    assert g.dtype == torch.float32
    assert g.item() == np.float32(exact / weight.numel())


def test_weights_by_hand() -> None:
    # |W| sums to 8 over 8 elements: g = 1, and every tie is visible
    weight = torch.tensor([[0.5, -0.5, 1.5, -1.5], [1.0, -1.0, 2.0, 0.0]])
    codes, scale = ternary.ternarize(weight)
    assert codes.tolist() == [[0, 0, 1, -1], [1, -1, 1, 0]]
    assert scale.item() == 1.0
    above = torch.tensor([[0.50390625, -0.49609375, 1.5, -1.5], [1.0, -1.0, 2.0, 0.0]])  # the sum is the same
    assert ternary.ternarize(above)[0].tolist() == [[1, 0, 1, -1], [1, -1, 1, 0]]


def test_scale_rounds_twice() -> None:
    """The inner rounding of ``s`` is seen: 1 / g alone often rounds elsewhere than 1 / bf16(g)."""
    g = torch.linspace(1, 2, 4097)
    twice = torch.cat([ternary.scale_of(v) for v in g])
    once = g.reciprocal().to(torch.bfloat16)
    assert not torch.equal(twice, once)
    np.testing.assert_allclose(twice.double().numpy(), 1 / g.double().numpy(), rtol=2**-8 + 2**-9 + 2**-16)


@pytest.mark.parametrize("shape", SHAPES)
def test_float32_and_bfloat16_latents_agree(shape: tuple[int, int]) -> None:
    weight = torch.randn(shape) * 0.05
    for kept, again in zip(
        ternary.ternarize(weight), ternary.ternarize(weight.to(torch.bfloat16)), strict=True
    ):
        assert torch.equal(kept, again)


def test_without_the_first_rounding_float32_latents_would_differ() -> None:
    weight = torch.randn(512, 512) * 0.05
    g = weight.abs().double().mean().float()
    unrounded = (weight * g.reciprocal()).round().clamp(-1, 1).to(torch.int8)
    codes, _ = ternary.ternarize(weight)
    assert 0 < (unrounded != codes).float().mean() < 0.01


@pytest.mark.parametrize("pieces", [2, 3, 5, 8, 64])
@pytest.mark.parametrize("dim", [0, 1])
@pytest.mark.parametrize("tailed", [False, True])
def test_shards_combine_to_the_whole(pieces: int, dim: int, tailed: bool) -> None:
    weight = heavy_tailed(67, 131) if tailed else torch.randn(67, 131)
    codes, scale = ternary.ternarize(weight)
    shards = weight.chunk(pieces, dim)
    total = sum((ternary.abs_sum(shard) for shard in shards), torch.zeros((), dtype=torch.float64))
    g = ternary.absmean(total, weight.numel())
    assert torch.equal(torch.cat([ternary.codes_of(shard, g) for shard in shards], dim), codes)
    assert torch.equal(ternary.scale_of(g), scale)
    if not tailed:  # beside it: a shard's own absmean is not the whole's
        alone = torch.cat([ternary.ternarize(shard)[0] for shard in shards], dim)
        assert not torch.equal(alone, codes)


def test_empty_shards_add_nothing() -> None:
    weight = torch.randn(3, 8)
    empty = weight[:0]
    total = ternary.abs_sum(weight) + ternary.abs_sum(empty)
    assert torch.equal(total, ternary.abs_sum(weight))
    assert ternary.codes_of(empty, ternary.absmean(total, weight.numel())).shape == (0, 8)


@pytest.mark.parametrize("tailed", [False, True])
def test_order_of_the_sum_does_not_matter(tailed: bool) -> None:
    weight = heavy_tailed(97, 211) if tailed else torch.randn(97, 211)
    flat = weight.flatten()
    count = flat.numel()
    g = ternary.absmean(ternary.abs_sum(weight), count)
    orders = [
        flat,
        flat.flip(0),
        flat[torch.randperm(count)],
        flat[flat.abs().argsort()],
        weight.t().flatten(),
    ]
    for order in orders:
        for chunk in (1, 7, 64, 1000, count):
            if chunk == 1:  # strictly one after another
                magnitudes = order.to(torch.bfloat16).abs().double().numpy()
                total = torch.tensor(np.cumsum(magnitudes)[-1])
            else:
                total = torch.zeros((), dtype=torch.float64)
                for part in order.split(chunk):
                    total = total + ternary.abs_sum(part)
            assert torch.equal(ternary.absmean(total, count), g)


@pytest.mark.parametrize("kind", [np.float32, np.float64])
def test_order_would_matter_without_the_last_rounding(kind: type) -> None:
    flat = heavy_tailed(20467).to(torch.bfloat16).abs().double().numpy().astype(kind)
    assert np.cumsum(flat)[-1] != np.cumsum(np.sort(flat))[-1]


def test_permuted_weight_has_permuted_codes() -> None:
    weight = torch.randn(31, 63)
    rows, columns = torch.randperm(31), torch.randperm(63)
    codes, scale = ternary.ternarize(weight)
    mixed, mixed_scale = ternary.ternarize(weight[rows][:, columns])
    assert torch.equal(mixed, codes[rows][:, columns]) and torch.equal(mixed_scale, scale)
    turned, turned_scale = ternary.ternarize(weight.t())
    assert torch.equal(turned, codes.t()) and torch.equal(turned_scale, scale)


@pytest.mark.parametrize("bad", [math.nan, math.inf, -math.inf])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
def test_nan_and_inf_make_the_scale_nan(bad: float, dtype: torch.dtype) -> None:
    weight = torch.randn(9, 13).to(dtype)
    assert torch.isfinite(ternary.ternarize(weight)[1]).all()
    weight[4, 5] = bad
    codes, scale = ternary.ternarize(weight)
    assert torch.isnan(scale).all() and scale.shape == (1,)
    assert codes.dtype == torch.int8 and not codes.any()  # nothing that could pass for a trained code


def test_both_infinities_make_the_scale_nan() -> None:
    weight = torch.randn(4, 4)
    weight[0, 0], weight[1, 1] = math.inf, -math.inf
    assert torch.isnan(ternary.ternarize(weight)[1]).all()


def test_zero_and_tiny_matrices_use_epsilon(oracle) -> None:
    codes, scale = ternary.ternarize(torch.zeros(5, 6))
    assert not codes.any()
    assert scale.item() == oracle.scale(np.float32(1e-5))
    weight = torch.full((5, 6), 4e-6)
    weight[0, 0] = 7e-6
    codes, scale = ternary.ternarize(weight)
    assert scale.item() == oracle.scale(np.float32(1e-5))
    assert codes.count_nonzero() == 1 and codes[0, 0] == 1  # 7e-6 rounds up against 1e-5, 4e-6 down


def test_weights_are_multiplied_by_the_reciprocal() -> None:
    """W * (1 / g), not W / g: they part where W is within an ulp or two of g / 2."""
    parted = 0
    for mantissa in range(128, 256):
        weight = np.float32(mantissa / 128)
        for ulps in range(-3, 4):
            g = (np.float32(2 * weight).view(np.int32) + np.int32(ulps)).view(np.float32)
            expected = np.rint(weight * (np.float32(1) / g))
            code = ternary.codes_of(torch.full((1, 1), float(weight)), torch.tensor(float(g)))
            assert code.item() == expected
            parted += expected != np.rint(weight / g)
    assert parted > 20


# Activations


def activation_cases() -> list[tuple[str, Tensor]]:
    torch.manual_seed(1)
    cases = [
        ("rank1", torch.randn(37)),
        ("rank2", torch.randn(5, 64)),
        ("rank3", torch.randn(2, 3, 33)),
        ("rank4", torch.randn(2, 3, 4, 17)),
        ("one feature", torch.randn(7, 1)),
        ("no rows", torch.randn(0, 8)),
        ("transposed", torch.randn(31, 9).t()),
        ("rank3 transposed", torch.randn(3, 21, 5).transpose(0, 1)),
        ("last dimension strided", torch.randn(6, 40)[:, ::3]),
        ("permuted to the last", torch.randn(11, 4, 6).permute(1, 2, 0)),
        ("sliced rows", torch.randn(20, 15)[3::4]),
        ("offset", torch.randn(9, 30)[2:, 5:24]),
        ("expanded rows", torch.randn(1, 19).expand(6, 19)),
        ("expanded features", torch.randn(6, 1).expand(6, 13)),
        ("zero row", torch.randn(4, 12) * torch.tensor([[1.0], [0.0], [1.0], [0.0]])),
        ("below epsilon", torch.randn(3, 12) * 1e-7),
        ("large", torch.randn(3, 12) * 1e4),
        ("wide", torch.randn(2, 5001)),
    ]
    return cases


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
@pytest.mark.parametrize(
    "name, x", activation_cases(), ids=lambda value: value if isinstance(value, str) else ""
)
def test_activations_follow_the_formulas(oracle, name: str, x: Tensor, dtype: torch.dtype) -> None:
    x = x.to(dtype)
    codes, r = ternary.quantize_activations(x)
    expected_codes, expected_r = oracle.activations(x)
    assert codes.dtype == torch.int8 and codes.shape == x.shape
    assert r.dtype == torch.float32 and r.shape == (*x.shape[:-1], 1)
    np.testing.assert_array_equal(codes.numpy(), expected_codes)
    np.testing.assert_array_equal(r.numpy(), expected_r)


def test_reciprocal_first_is_not_a_division() -> None:
    """The trap the module warns of, and the proof that the comparison above would notice it."""
    x = torch.randn(2000, 512)
    codes, r = ternary.quantize_activations(x)
    divided = np.float32(127) / np.abs(x.numpy()).max(axis=-1, keepdims=True)
    assert (divided != r.numpy()).any()
    flipped = np.mean(np.rint(x.numpy() * divided) != codes.numpy())
    assert 0 < flipped < 1e-3
    # and half to even is not half up: a = 127 * 2^k gives r a power of two, so ties are exact
    assert np.float32(1) / np.float32(127) * np.float32(127) == 1
    ties = torch.tensor([127.0, 0.5, 1.5, 2.5, -0.5, -1.5, -2.5, 126.5])
    assert ternary.quantize_activations(ties)[0].tolist() == [127, 0, 2, 2, 0, -2, -2, 126]


def test_the_largest_element_has_code_127() -> None:
    x = torch.randn(500, 31)
    codes, r = ternary.quantize_activations(x)
    assert torch.equal(codes.abs().amax(dim=-1), torch.full((500,), 127, dtype=torch.int8))
    # half a code, plus the roundings of 1 / a, of r and of the product: 127 * 3 * 2^-24 of a code
    assert ((codes / r - x).abs() * r <= 0.5 + 127 * 3 * 2**-24 + 1e-6).all()


def test_extreme_rows_do_not_overflow() -> None:
    x = torch.tensor([[3.38e38, -3.38e38, 1e38], [1e-45, 0.0, -1e-45]])
    codes, r = ternary.quantize_activations(x)
    assert torch.isfinite(r).all()
    assert codes[0].tolist() == [127, -127, 38] and not codes[1].any()


@pytest.mark.parametrize("bad", [math.nan, math.inf, -math.inf])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
@pytest.mark.parametrize("shape", [(6, 11), (2, 3, 11), (1, 2, 3, 11)])
def test_a_bad_row_is_poisoned_and_no_other(bad: float, dtype: torch.dtype, shape: tuple[int, ...]) -> None:
    x = torch.randn(shape).to(dtype)
    clean_codes, clean_r = ternary.quantize_activations(x)
    x.view(-1, 11)[4, 7] = bad
    codes, r = ternary.quantize_activations(x)
    codes, r, clean_codes, clean_r = (
        codes.view(-1, 11),
        r.view(-1),
        clean_codes.view(-1, 11),
        clean_r.view(-1),
    )
    assert torch.isnan(r).tolist() == [False, False, False, False, True, False]
    assert not codes[4].any()
    others = torch.arange(6) != 4
    assert torch.equal(codes[others], clean_codes[others]) and torch.equal(r[others], clean_r[others])


# The product


@pytest.mark.parametrize("columns", [1, 7, 64, 333, 5000])
@pytest.mark.parametrize("lead", [(), (1,), (5,), (2, 3), (2, 1, 3), (0,)])
def test_product_is_exact(columns: int, lead: tuple[int, ...]) -> None:
    codes_x = torch.randint(-128, 128, (*lead, columns), dtype=torch.int8)
    codes_w = torch.randint(-1, 2, (9, columns), dtype=torch.int8)
    product = ternary.matmul_codes(codes_x, codes_w)
    assert product.dtype == torch.float32
    np.testing.assert_array_equal(
        product.numpy(), codes_x.numpy().astype(np.int64) @ codes_w.numpy().T.astype(int)
    )


@pytest.mark.parametrize(
    "columns, dtype", [(131071, torch.float32), (131072, torch.float64), (140001, torch.float64)]
)
def test_product_is_exact_where_float32_ends(columns: int, dtype: torch.dtype) -> None:
    largest = torch.tensor([[-128], [127]], dtype=torch.int8).expand(2, columns)
    random = torch.randint(-128, 128, (2, columns), dtype=torch.int8)
    codes_x = torch.cat([largest, random])
    codes_w = torch.cat([torch.ones(1, columns), -torch.ones(1, columns), torch.randint(-1, 2, (2, columns))])
    codes_w = codes_w.to(torch.int8)
    product = ternary.matmul_codes(codes_x, codes_w)
    exact = codes_x.numpy().astype(np.int64) @ codes_w.numpy().T.astype(np.int64)
    assert product.dtype == dtype
    np.testing.assert_array_equal(product.numpy().astype(np.int64), exact)
    if columns == 140001:  # the failure that the switch avoids
        rounded = torch.nn.functional.linear(codes_x.float(), codes_w.float()).double().numpy()
        assert (rounded != exact).any()


def test_product_of_strided_codes() -> None:
    codes_x = torch.randint(-128, 128, (40, 6), dtype=torch.int8).t()
    codes_w = torch.randint(-1, 2, (40, 8), dtype=torch.int8).t()
    exact = codes_x.numpy().astype(np.int64) @ codes_w.numpy().T.astype(np.int64)
    np.testing.assert_array_equal(ternary.matmul_codes(codes_x, codes_w).numpy(), exact)


def test_output_is_one_float32_division() -> None:
    product = torch.randint(-(2**23), 2**23, (50, 20)).float()
    r, s = torch.rand(50, 1) * 100 + 1, torch.tensor([37.25], dtype=torch.bfloat16)
    expected = product.numpy() / (r.numpy() * np.float32(37.25))
    np.testing.assert_array_equal(ternary.dequantize_output(product, r, s).numpy(), expected)
    np.testing.assert_array_equal(ternary.dequantize_output(product.double(), r, s).numpy(), expected)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
def test_dequantize_is_one_division_and_one_rounding(dtype: torch.dtype) -> None:
    codes = torch.tensor([[-1, 0, 1], [1, 1, 0]], dtype=torch.int8)
    s = torch.tensor([3.015625], dtype=torch.bfloat16)
    dense = ternary.dequantize(codes, s, dtype)
    expected = torch.from_numpy(codes.numpy() / np.float32(3.015625)).to(dtype)
    assert dense.dtype == dtype and torch.equal(dense, expected)


# The scale that can be recovered


def all_mantissas() -> Tensor:
    """All 128 bfloat16 mantissas, in [1, 2)."""
    return torch.arange(128).float() / 128 + 1


def image_of_scales() -> Tensor:
    """The scales s in [1, 2) that some g has; written out, not asked of the package."""
    exponents = torch.exp2(torch.arange(-2, 2).float())[:, None]
    scales = (1 / (all_mantissas() * exponents).double()).to(torch.bfloat16).float().flatten()
    return scales[(scales >= 1) & (scales < 2)].unique()


@pytest.mark.parametrize("exponent", [-14, -9, -3, 0, 5, 14])
def test_scale_is_recovered_from_dense_and_from_float16(exponent: int) -> None:
    for mantissa in all_mantissas():
        s = ternary.scale_of(mantissa * 2.0**exponent)
        dense = ternary.dequantize(torch.ones(1, dtype=torch.int8), s, torch.bfloat16)
        assert torch.equal(ternary.scale_of(dense.float()), s)
        half = np.float16(np.float32(1) / np.float32(s.item()))
        assert torch.equal(ternary.scale_of(torch.tensor(float(half))), s)


def test_a_scale_rounded_once_is_not_recoverable() -> None:
    """Why g is rounded first: bf16(1 / g) alone comes back wrong from a dense bf16 model, now and then."""
    once = (1 / torch.linspace(1, 2, 4097)).to(torch.bfloat16).unique()
    back = torch.cat([ternary.scale_of((1 / s.float()).to(torch.bfloat16).float()) for s in once])
    assert 0 < (back != once).sum() < len(once)


# Latents from codes


def assert_round_trip(codes: Tensor, s: Tensor, oracle) -> None:
    latents = ternary.latents_of(codes, s)
    assert latents.dtype == torch.bfloat16 and latents.shape == codes.shape
    back, scale = oracle.weights(latents)
    np.testing.assert_array_equal(back, codes.numpy())
    assert scale == np.float32(s.item())


def test_latents_round_trip(oracle) -> None:
    generator = np.random.default_rng(5)
    smallest = 0
    for _ in range(400):
        rows, columns = (int(v) for v in generator.integers(1, 70, 2))
        codes = sign_codes(rows, columns, float(generator.uniform(0.02, 1)))
        smallest = max(smallest, int(codes.count_nonzero() < 20))
        if codes.count_nonzero() < min(5, codes.numel()):  # fewer: the test of sparse matrices
            codes.view(-1)[:5] = 1
        g = math.exp(generator.uniform(math.log(1.01e-5), math.log(1e3)))
        assert_round_trip(codes, ternary.scale_of(torch.tensor(g)), oracle)
    assert smallest  # small cases were among them


def test_latents_of_every_mantissa(oracle) -> None:
    codes = sign_codes(24, 40, 0.6)
    for mantissa in all_mantissas():
        assert_round_trip(codes, ternary.scale_of(mantissa * 2.0**-6), oracle)


def test_one_magnitude_alone_misses_the_scale() -> None:
    """Why two magnitudes: bf16(target * N / non-zeros) everywhere gives another scale in some cases."""
    codes = sign_codes(24, 40, 0.6)
    missed = 0
    for mantissa in all_mantissas():
        s = ternary.scale_of(mantissa)
        magnitude = (1 / s.float()).to(torch.bfloat16).double() * codes.numel() / codes.count_nonzero()
        missed += not torch.equal(
            ternary.ternarize(codes.to(torch.bfloat16) * magnitude.to(torch.bfloat16))[1], s
        )
    assert 0 < missed < 64


def test_quantizing_dense_ternary_again_shrinks_the_scale() -> None:
    codes, s = sign_codes(64, 64, 0.66), ternary.scale_of(torch.tensor(0.02))
    again, shrunk = ternary.ternarize(ternary.dequantize(codes, s, torch.bfloat16))
    assert torch.equal(again, codes)
    share = codes.count_nonzero().item() / codes.numel()
    assert float(s) / float(shrunk) == pytest.approx(share, rel=0.02)
    assert torch.equal(ternary.ternarize(ternary.latents_of(codes, s))[1], s)


def test_latents_of_edge_shapes(oracle) -> None:
    s = ternary.scale_of(torch.tensor(0.0173))
    for codes in (
        torch.ones(1, 1, dtype=torch.int8),
        torch.full((8, 8), -1, dtype=torch.int8),
        sign_codes(1, 300, 0.5),
        sign_codes(300, 1, 0.5),
        torch.cat(
            [torch.zeros(7, 9, dtype=torch.int8), sign_codes(3, 9, 0.9), torch.zeros(2, 9, dtype=torch.int8)]
        ),
        sign_codes(40, 12, 0.5).t(),
    ):
        assert_round_trip(codes, s, oracle)


@pytest.mark.parametrize("nonzero", [2, 3, 4])
def test_latents_of_very_sparse_codes(oracle, nonzero: int) -> None:
    """Promised by the docstring: a single non-zero code cannot meet every scale, two can."""
    codes = torch.zeros(16, 24, dtype=torch.int8)
    codes.view(-1)[torch.randperm(codes.numel())[:nonzero]] = 1
    failed = []
    for mantissa in all_mantissas():
        s = ternary.scale_of(mantissa / 64)
        try:
            assert_round_trip(codes, s, oracle)
        except ValueError:
            failed.append(float(s))
    assert not failed, (
        f"{len(failed)} of 128 scales refused with {nonzero} non-zero code(s), e.g. {failed[:3]}"
    )


def test_latents_at_the_smallest_absmean(oracle) -> None:
    codes = sign_codes(20, 30, 0.5)
    smallest = ternary.scale_of(torch.tensor(1e-5))
    assert smallest.item() == oracle.scale(np.float32(1e-5))
    assert_round_trip(codes, smallest, oracle)
    with pytest.raises(ValueError, match="no latents give the scale"):
        ternary.latents_of(codes, smallest * 2)  # would need an absmean below 1e-5


def test_latents_of_scales_outside_the_image(oracle) -> None:
    codes = sign_codes(16, 16, 0.6)
    image = set(image_of_scales().tolist())
    outside = [float(s) for s in all_mantissas() if float(s) not in image]
    assert len(outside) + len(image) == 128 and len(outside) > 20
    for s in image:
        assert_round_trip(codes, torch.tensor([s], dtype=torch.bfloat16), oracle)
    for s in outside:
        with pytest.raises(ValueError, match=f"no latents give the scale {s:g}"):
            ternary.latents_of(codes, torch.tensor([s], dtype=torch.bfloat16))


def test_latents_of_zero_codes() -> None:
    with pytest.raises(ValueError, match="every code of the matrix is zero"):
        ternary.latents_of(torch.zeros(4, 4, dtype=torch.int8), torch.ones(1, dtype=torch.bfloat16))


def test_latents_of_a_nan_scale() -> None:
    with pytest.raises(ValueError):
        ternary.latents_of(torch.ones(4, 4, dtype=torch.int8), torch.tensor([math.nan], dtype=torch.bfloat16))
