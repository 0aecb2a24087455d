"""int8 x ternary matrix product, scaled in the epilogue. Twin: ``matmul_codes`` and ``dequantize_output`` of
:mod:`axolotl_bitnet.ternary`. And int8 x int8, for the weight's gradient; twin: ``weight_product`` of
:mod:`axolotl_bitnet.ops.gradients`.

``y = float32(codes_x . codes_w^T) / (r s)``, then the output dtype, then the bias. The integers are exact
(int32 holds 2**31 / 128 of columns, of two int8 codes 2**31 / 127**2), and the division is correctly rounded:
the row's ``1 / (r s)`` and one correction by fused multiply-add (Markstein 1990), which costs a fraction of a
division per element.

On Hopper and later, persistent programs read and write tiles by TMA; elsewhere, and for shapes whose rows
do not begin at 16 bytes, one program per tile reads through pointers.
"""

from __future__ import annotations

from functools import cache
from typing import Any, NamedTuple

import torch
import triton
import triton.language as tl
from torch import Tensor

from .arithmetic import INTERPRET, cast, ceil_div, reciprocal
from .launch import Tiled, aligned, launch

_GROUP = 8  # rows of tiles that are walked together


@triton.jit
def _tile(tile, tiles_m, tiles_n, GROUP: tl.constexpr):
    """Coordinates of the tile-th tile, in bands of GROUP rows of tiles, so that neighbours share L2 lines."""
    band = tile // (GROUP * tiles_n)
    rows = tl.minimum(tiles_m - band * GROUP, GROUP)
    inside = tile % (GROUP * tiles_n)
    return band * GROUP + inside % rows, inside // rows


@triton.jit
def _scaled(
    product, scale, inverse, bias_ptr, column, out_features, dtype: tl.constexpr, HAS_BIAS: tl.constexpr
):
    """float32(product) / scale, correctly rounded, as ``dtype``, plus the bias from ``column`` on."""
    product = product.to(tl.float32)
    if INTERPRET:
        y = tl.div_rn(product, tl.broadcast_to(scale, product.shape))
    else:
        y = product * inverse
        y = tl.fma(tl.fma(-y, tl.broadcast_to(scale, product.shape), product), inverse, y)
    y = cast(y, dtype)
    if HAS_BIAS:
        n = column + tl.arange(0, product.shape[1])
        bias = tl.load(bias_ptr + n, mask=n < out_features, other=0.0)
        y = cast(y.to(tl.float32) + cast(bias.to(tl.float32), dtype).to(tl.float32)[None, :], dtype)
    return y


@triton.jit
def _sum(y, onto_ptr, place, column, rows, out_features, HAS_ONTO: tl.constexpr):
    """y and, if there is one, the part of ``onto`` from ``column`` on in the rows ``place``, of y's dtype."""
    if HAS_ONTO:
        n = column + tl.arange(0, y.shape[1])
        inside = (place < rows)[:, None] & (n < out_features)[None, :]
        onto = tl.load(onto_ptr + place.to(tl.int64)[:, None] * out_features + n[None, :], inside, other=0.0)
        y = cast(onto.to(tl.float32) + y.to(tl.float32), y.dtype)
    return y


@triton.jit
def _matmul_tma(
    x_desc, w_desc, y_desc, r_ptr, s_ptr, bias_ptr, onto_ptr, rows, out_features, columns,
    BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr, BLOCK_K: tl.constexpr, GROUP: tl.constexpr,
    PROGRAMS: tl.constexpr, HAS_S: tl.constexpr, HAS_BIAS: tl.constexpr, HAS_ONTO: tl.constexpr,
    SPLIT: tl.constexpr,
):  # fmt: skip
    dtype: tl.constexpr = y_desc.dtype
    tiles_m = tl.cdiv(rows, BLOCK_M)
    tiles_n = tl.cdiv(out_features, BLOCK_N)
    steps = tl.cdiv(columns, BLOCK_K)
    s = tl.load(s_ptr).to(tl.float32) if HAS_S else 1.0
    for tile in tl.range(tl.program_id(0), tiles_m * tiles_n, PROGRAMS, flatten=True):
        tile_m, tile_n = _tile(tile, tiles_m, tiles_n, GROUP)
        row = tile_m * BLOCK_M
        column = tile_n * BLOCK_N
        product = tl.zeros((BLOCK_M, BLOCK_N), tl.int32)
        for step in range(steps):
            x = x_desc.load([row, step * BLOCK_K])
            w = w_desc.load([column, step * BLOCK_K])
            product = tl.dot(x, w.T, product, out_dtype=tl.int32)

        place = row + tl.arange(0, BLOCK_M)
        scale = (tl.load(r_ptr + place, mask=place < rows, other=1.0) * s)[:, None]
        inverse = reciprocal(scale)
        # By parts of the tile: the staging buffers of the store then leave room for one more stage of loads.
        part: tl.constexpr = BLOCK_N // SPLIT
        if SPLIT == 1:
            parts = (product,)
        elif SPLIT == 2:
            parts = _halves(product)
        else:
            left, right = _halves(product)
            parts = _halves(left) + _halves(right)
        for index in tl.static_range(SPLIT):
            n = column + index * part
            y = _scaled(parts[index], scale, inverse, bias_ptr, n, out_features, dtype, HAS_BIAS)
            y_desc.store([row, n], _sum(y, onto_ptr, place, n, rows, out_features, HAS_ONTO))


@triton.jit
def _halves(tile):
    """The left and the right columns of a tile."""
    return tl.split(tl.permute(tl.reshape(tile, (tile.shape[0], 2, tile.shape[1] // 2)), (0, 2, 1)))


@triton.jit
def _matmul_pointers(
    x_ptr, w_ptr, y_ptr, r_ptr, s_ptr, bias_ptr, rows, out_features, columns,
    BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr, BLOCK_K: tl.constexpr, GROUP: tl.constexpr,
    HAS_S: tl.constexpr, HAS_BIAS: tl.constexpr,
):  # fmt: skip
    tile_m, tile_n = _tile(tl.program_id(0), tl.cdiv(rows, BLOCK_M), tl.cdiv(out_features, BLOCK_N), GROUP)
    m = tile_m * BLOCK_M + tl.arange(0, BLOCK_M)
    n = tile_n * BLOCK_N + tl.arange(0, BLOCK_N)
    k = tl.arange(0, BLOCK_K)
    x_rows = x_ptr + tl.minimum(m, rows - 1).to(tl.int64)[:, None] * columns
    w_rows = w_ptr + tl.minimum(n, out_features - 1).to(tl.int64)[:, None] * columns
    product = tl.zeros((BLOCK_M, BLOCK_N), tl.int32)
    for start in range(0, columns, BLOCK_K):
        inside = (start + k < columns)[None, :]
        x = tl.load(x_rows + (start + k)[None, :], mask=inside, other=0)
        w = tl.load(w_rows + (start + k)[None, :], mask=inside, other=0)
        product = tl.dot(x, w.T, product, out_dtype=tl.int32)

    s = tl.load(s_ptr).to(tl.float32) if HAS_S else 1.0
    scale = (tl.load(r_ptr + m, mask=m < rows, other=1.0) * s)[:, None]
    dtype: tl.constexpr = y_ptr.dtype.element_ty
    column = tile_n * BLOCK_N
    y = _scaled(product, scale, reciprocal(scale), bias_ptr, column, out_features, dtype, HAS_BIAS)
    place = y_ptr + m.to(tl.int64)[:, None] * out_features + n[None, :]
    tl.store(place, y, mask=(m < rows)[:, None] & (n < out_features)[None, :])


class Tiles(NamedTuple):
    """How a product is cut: tile sizes, stages of loads, warps, into how many parts a tile is stored, and
    programs that share a multiprocessor (one multiplies while another stores)."""

    m: int
    n: int
    k: int
    stages: int
    warps: int
    split: int = 1
    residents: int = 1


def tma_tiles(rows: int, out_features: int, itemsize: int, onto: bool = False) -> Tiles:
    """For Hopper, as measured on an H200 (benchmarks/results/each_kernel.csv)."""
    if rows <= 64:
        return Tiles(64, 64, 128, 4, 4)
    if out_features <= 512:
        return Tiles(128, 64, 128, 3, 4, 1, 2)
    split = 4 if onto else 2  # what is added onto is read through shared memory too
    if itemsize > 2:
        return Tiles(128, 128, 128, 2, 8, split, 2)
    if onto:
        return Tiles(128, 128, 128, 3, 8, split, 2)
    return Tiles(128, 128, 128, 3, 8 if out_features <= 4096 else 4, 2, 2)


def pointer_tiles(rows: int) -> Tiles:
    """For Ampere and Ada, within the 99 KiB of shared memory that the smaller GPUs have."""
    return Tiles(32, 64, 64, 4, 4) if rows <= 64 else Tiles(128, 128, 64, 3, 8)


def sum_tiles(out_features: int, in_features: int, itemsize: int, roomy: bool) -> Tiles:
    """For a sum over many tokens: in float32, larger tiles, of which one fits a multiprocessor. Its store is
    rare, so nothing need run beside it (benchmarks/results/weight_product.csv, an H200)."""
    if roomy and itemsize > 2 and out_features > 64 and in_features > 512:
        return Tiles(128, 256, 128, 3, 8, 2)
    return tma_tiles(out_features, in_features, itemsize)


@cache
def _gpu(index: int) -> tuple[int, bool, bool]:
    """Multiprocessors, whether there is TMA, and whether a program may have 227 KiB of shared memory."""
    if index < 0:
        return 2, True, True  # the interpreter
    properties = torch.cuda.get_device_properties(index)
    return properties.multi_processor_count, properties.major >= 9, properties.major in (9, 10)


def matmul(
    codes_x: Tensor, r: Tensor, codes_w: Tensor, s: Tensor, bias: Tensor | None, dtype: torch.dtype
) -> Tensor:
    """``(codes_x . codes_w^T) / (r s)`` as ``dtype``, plus the bias: (..., out_features).

    Args:
        codes_x: int8 (..., K), contiguous, not empty.
        r: float32 (..., 1).
        codes_w: int8 (out_features, K), contiguous, not empty.
        s: bfloat16 or float32 (1,).
        bias: (out_features,) or None.
        dtype: float32, bfloat16 or float16.
    """
    return _matmul(codes_x, r, codes_w, s, bias, dtype)


def matmul_onto(codes_x: Tensor, r: Tensor, codes_w: Tensor, s: Tensor, onto: Tensor) -> Tensor:
    """``onto`` plus :func:`matmul` in its dtype, without a bias.

    Args:
        codes_x, r, codes_w, s: as in :func:`matmul`.
        onto: (..., out_features), contiguous.
    """
    return _matmul(codes_x, r, codes_w, s, None, onto.dtype, onto=onto)


def _matmul(
    codes_x: Tensor, r: Tensor, codes_w: Tensor, s: Tensor | None, bias: Tensor | None, dtype: torch.dtype,
    tiles: Tiles | None = None, onto: Tensor | None = None,
) -> Tensor:  # fmt: skip
    out_features, columns = codes_w.shape
    rows = r.numel()
    y = torch.empty(*codes_x.shape[:-1], out_features, dtype=dtype, device=codes_x.device)
    multiprocessors, has_tma, _ = _gpu(codes_x.get_device())
    of_s, of_bias = None if s is None else s.dtype, bias is not None and (bias.dtype, *aligned(bias))
    of_onto = onto is not None and aligned(onto)
    key = (dtype, of_s, rows, out_features, columns, of_bias, of_onto)
    if has_tma and columns % 16 == 0 and out_features * dtype.itemsize % 16 == 0:
        tiles = tiles or tma_tiles(rows, out_features, dtype.itemsize, onto is not None)
        key = (*key, tiles)
        launch_tma(codes_x, r, codes_w, s, bias, onto, y, rows, key, multiprocessors, tiles)
        return y
    launch_pointers(codes_x, r, codes_w, s, bias, y, rows, key, pointer_tiles(rows))
    return y if onto is None else y.add_(onto)  # in the kernel, some tiles would not fit the registers


def weight_product(codes_z: Tensor, c: Tensor, codes_x: Tensor, dtype: torch.dtype) -> Tensor:
    """``(codes_z . codes_x^T) / c`` as ``dtype``: (out_features, in_features).

    Args:
        codes_z, codes_x: int8 (..., tokens), contiguous, not empty, at most 133,136 tokens.
        c: float32 (out_features, 1).
        dtype: float32, bfloat16 or float16.
    """
    roomy = _gpu(codes_z.get_device())[2]
    tiles = sum_tiles(codes_z.shape[0], codes_x.shape[0], dtype.itemsize, roomy)
    return _matmul(codes_z, c, codes_x, None, None, dtype, tiles)


def launch_tma(
    codes_x: Tensor, r: Tensor, codes_w: Tensor, s: Tensor | None, bias: Tensor | None, onto: Tensor | None,
    y: Tensor, rows: int, key: tuple[Any, ...], multiprocessors: int, tiles: Tiles,
) -> None:  # fmt: skip
    out_features, columns = codes_w.shape
    persistent = multiprocessors * tiles.residents
    programs = min(persistent, ceil_div(rows, tiles.m) * ceil_div(out_features, tiles.n))
    args = (
        Tiled(codes_x, [rows, columns], [columns, 1], [tiles.m, tiles.k]),
        Tiled(codes_w, [out_features, columns], [columns, 1], [tiles.n, tiles.k]),
        Tiled(y, [rows, out_features], [out_features, 1], [tiles.m, tiles.n // tiles.split]),
        r, r if s is None else s, r if bias is None else bias,
        y if onto is None else onto, rows, out_features, columns,
        tiles.m, tiles.n, tiles.k, _GROUP, programs, s is not None, bias is not None, onto is not None,
        tiles.split,
    )  # fmt: skip
    launch(_matmul_tma, programs, y.get_device(), key, args, tiles.warps, tiles.stages)


def launch_pointers(
    codes_x: Tensor, r: Tensor, codes_w: Tensor, s: Tensor | None, bias: Tensor | None, y: Tensor, rows: int,
    key: tuple[Any, ...], tiles: Tiles,
) -> None:  # fmt: skip
    out_features, columns = codes_w.shape
    programs = ceil_div(rows, tiles.m) * ceil_div(out_features, tiles.n)
    args = (
        codes_x, codes_w, y, r, r if s is None else s, r if bias is None else bias,
        rows, out_features, columns,
        tiles.m, tiles.n, tiles.k, _GROUP, s is not None, bias is not None,
    )  # fmt: skip
    launch(_matmul_pointers, programs, y.get_device(), key, args, tiles.warps, tiles.stages)
