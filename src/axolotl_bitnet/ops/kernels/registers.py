"""``y = x W`` for two to sixteen rows on int8 tensor cores, fed from registers.

``tl.dot`` brings its operands through shared memory, which takes longer than a product of a few rows. Here a
thread's 16 bytes of weights and its 16 codes of x are its part of the operands as they are loaded: the order
of columns within a product is free, as long as both have the same. The 16 rows of an operand are 8 rows of
bytes, two of their quarters at a time (or 4 rows, all four). A quarter of a word is taken by an ``and`` and
stays where it is in the byte; its sums are shifted at the end, which is exact.

Warps of a tile have the same rows of bytes and columns of their own; they add up through shared memory, once.
Tensors have a number a thread, (threads,), so that their layout is the hardware's: thread 4 g + t of a warp
holds row g of either operand.
"""

from __future__ import annotations

from typing import Any, NamedTuple

import torch
import triton
import triton.language as tl
from torch import Tensor

from .arithmetic import INTERPRET, cast, ceil_div
from .launch import aligned, launch
from .matvec import _bits, _words
from .overlap import LINE, fetch_some, release, wait


@triton.jit
def _half(a, a_next, b, b_next):
    """Two registers of a product's result, computed from their definition: for the interpreter."""
    shift = 8 * tl.arange(0, 4)[None, None, :]
    w = tl.join(a, a_next)[:, :, None] >> shift & 255
    x = (tl.join(b, b_next)[:, :, None] << (24 - shift)) >> 24
    w = tl.reshape(w, (a.shape[0] // 32, 8, 1, 32))
    x = tl.reshape(x, (a.shape[0] // 32, 1, 8, 32))
    return tl.split(tl.reshape(tl.sum(w * x, axis=3), (a.shape[0], 2)))


@triton.jit
def _product(c0, c1, c2, c3, a0, a1, a2, a3, b0, b1):
    """A warp's (16 x 32) (32 x 8) added to c: unsigned bytes of a, signed ones of b. A number a thread."""
    if INTERPRET:
        d0, d1 = _half(a0, a2, b0, b1)
        d2, d3 = _half(a1, a3, b0, b1)
        return c0 + d0, c1 + d1, c2 + d2, c3 + d3
    return tl.inline_asm_elementwise(
        "mma.sync.aligned.m16n8k32.row.col.s32.u8.s8.s32 {$0, $1, $2, $3}, {$4, $5, $6, $7}, {$8, $9}, "
        "{$10, $11, $12, $13};",
        "=r,=r,=r,=r,r,r,r,r,r,r,r,r,r,r",
        [a0, a1, a2, a3, b0, b1, c0, c1, c2, c3],
        dtype=(tl.int32, tl.int32, tl.int32, tl.int32), is_pure=True, pack=1,
    )  # fmt: skip


@triton.jit
def _fourths(words):
    even, odd = tl.split(tl.reshape(words, (words.shape[0], 2, 2)))
    first, third = tl.split(even)
    second, fourth = tl.split(odd)
    return first, second, third, fourth


@triton.jit
def _add_products(c, w, x, LANES: tl.constexpr, SETS: tl.constexpr, EIGHTS: tl.constexpr, HALF: tl.constexpr):
    """Half of a step: words ``2 HALF`` and the next."""
    added = ()
    for eight in tl.static_range(EIGHTS):
        b0, b1 = x[4 * eight + 2 * HALF], x[4 * eight + 2 * HALF + 1]
        for part in tl.static_range(SETS):
            if LANES == 8:
                a0, a2 = w[2 * HALF] & _bits(2 * part), w[2 * HALF + 1] & _bits(2 * part)
                a1, a3 = w[2 * HALF] & _bits(2 * part + 1), w[2 * HALF + 1] & _bits(2 * part + 1)
            else:
                a0, a2 = w[2 * HALF] & _bits(0), w[2 * HALF + 1] & _bits(0)
                a1, a3 = w[2 * HALF] & _bits(2), w[2 * HALF + 1] & _bits(2)
            added = added + _product(
                c[4 * (eight * SETS + part)], c[4 * (eight * SETS + part) + 1],
                c[4 * (eight * SETS + part) + 2], c[4 * (eight * SETS + part) + 3], a0, a1, a2, a3, b0, b1,
            )  # fmt: skip
    return added


@triton.jit
def _four(a0, a1, a2, a3, b0, b1, b2, b3):
    return a0 + b0, a1 + b1, a2 + b2, a3 + b3


@triton.jit
def _eight(a0, a1, a2, a3, a4, a5, a6, a7, b0, b1, b2, b3, b4, b5, b6, b7):
    return a0 + b0, a1 + b1, a2 + b2, a3 + b3, a4 + b4, a5 + b5, a6 + b6, a7 + b7


@triton.jit
def _of_warps(c, BEGIN: tl.constexpr, COUNT: tl.constexpr, TILES: tl.constexpr, SHARE: tl.constexpr):
    """Sums of 4 or 8 numbers of each thread over the warps of a tile. One tensor of all numbers would be
    written to shared memory with threads a multiple of 128 bytes apart: by one bank."""
    by_warp = ()
    for i in tl.static_range(COUNT):
        by_warp = by_warp + (tl.reshape(c[BEGIN + i], (TILES, SHARE, 32)),)  # noqa: RUF005
    if INTERPRET:
        sums = ()
        for i in tl.static_range(COUNT):
            sums = sums + (tl.sum(by_warp[i], axis=1),)  # noqa: RUF005
        return sums
    elif COUNT == 4:
        return tl.reduce(by_warp, 1, _four)
    else:
        return tl.reduce(by_warp, 1, _eight)


@triton.jit
def _paired(c, HALF: tl.constexpr):
    pairs = ()
    for i in tl.static_range(HALF):
        pairs = pairs + (tl.join(c[i], c[i + HALF]),)  # noqa: RUF005
    return pairs


@triton.jit
def _joined(c, COUNT: tl.constexpr, THREADS: tl.constexpr):
    """4 to 16 tensors as columns of one."""
    if COUNT == 16:
        c = _paired(c, 8)
    if COUNT >= 8:
        c = _paired(c, 4)
    both = tl.join(tl.join(c[0], c[2]), tl.join(c[1], c[3]))
    return tl.reshape(both, (THREADS, COUNT))


@triton.jit
def _few_rows(
    x_ptr, r_ptr, sum_ptr, zero_ptr, w_ptr, table_ptr, s_ptr, bias_ptr, y_ptr, out_features, byte_rows, words,
    ROWS: tl.constexpr, LANES: tl.constexpr, WARPS: tl.constexpr, TILES: tl.constexpr, HELD: tl.constexpr,
    TURNS: tl.constexpr, LINES: tl.constexpr, EVEN: tl.constexpr, HAS_BIAS: tl.constexpr,
    OVERLAP: tl.constexpr,
):  # fmt: skip
    EIGHTS: tl.constexpr = 2 if ROWS > 8 else 1
    SETS: tl.constexpr = LANES // 4
    COUNT: tl.constexpr = 4 * SETS * EIGHTS
    SHARE: tl.constexpr = WARPS // TILES  # warps of a tile
    begin = tl.program_id(0) * (LANES * TILES)
    # One number a thread: no other order of these is a layout of Triton's.
    thread = tl.arange(0, 32 * WARPS)[:, None]
    g = thread % 32 // 4
    own = begin + thread // (32 * SHARE) * LANES + g % LANES
    k = thread // 32 % SHARE * 16 + 4 * (thread % 4) + tl.arange(0, 4)[None, :]
    w_rows = w_ptr + tl.minimum(own, byte_rows - 1).to(tl.int64) * words
    release(OVERLAP)
    if OVERLAP:
        index = tl.arange(0, 32 * WARPS)
        for step in tl.static_range((LANES * TILES * LINES + 32 * WARPS - 1) // (32 * WARPS)):
            line = step * 32 * WARPS + index
            w_row = begin + line // LINES
            asked = (line < LANES * TILES * LINES) & (w_row < byte_rows)
            first = tl.minimum(w_row, byte_rows - 1).to(tl.int64) * words + line % LINES * (LINE // 4)
            fetch_some(w_ptr + first, asked.to(tl.int32))
    wait(OVERLAP)
    x_rows = x_ptr + tl.minimum(g, ROWS - 1) * words
    x_below = x_ptr + tl.minimum(8 + g, ROWS - 1) * words
    by_lane = 2 * (tl.arange(0, 32 * WARPS) % 32 // 4 // LANES)  # of 4 lanes, the upper take the odd quarters
    c = ()
    for _ in tl.static_range(COUNT):
        c = c + (tl.zeros((32 * WARPS,), tl.int32),)  # noqa: RUF005
    for turn in range(TURNS):
        held, held_x = (), ()
        for step in tl.static_range(HELD):
            place = (turn * HELD + step) * SHARE * 16 + k
            held = held + (_words(w_rows + place, place, words, EVEN),)  # noqa: RUF005
            held_x = held_x + (_words(x_rows + place, place, words, EVEN),)  # noqa: RUF005
            if EIGHTS == 2:
                held_x = held_x + (_words(x_below + place, place, words, EVEN),)  # noqa: RUF005
        # No product comes before this zero is there: or the compiler moves each load to where it is used.
        tl.debug_barrier()
        zero = tl.load(zero_ptr)
        for step in tl.static_range(HELD):
            w = _fourths(held[step])
            if LANES == 4:
                w = w[0] >> by_lane, w[1] >> by_lane, w[2] >> by_lane, w[3] >> by_lane
            x = _fourths(held_x[step * EIGHTS] + zero)
            if EIGHTS == 2:
                x = x + _fourths(held_x[step * EIGHTS + 1] + zero)
            c = _add_products(c, w, x, LANES, SETS, EIGHTS, 0)
            c = _add_products(c, w, x, LANES, SETS, EIGHTS, 1)

    if SHARE > 1:
        if COUNT == 16:
            c = _of_warps(c, 0, 8, TILES, SHARE) + _of_warps(c, 8, 8, TILES, SHARE)
        else:
            c = _of_warps(c, 0, COUNT, TILES, SHARE)
    total = _joined(c, COUNT, 32 * TILES)
    thread = tl.arange(0, 32 * TILES)[:, None]
    v = tl.arange(0, COUNT)[None, :]
    lane = thread % 32 // 4
    own = begin + thread // 32 * LANES
    row = 8 * (v // (4 * SETS)) + 2 * (thread % 4) + v % 2
    half, part = v // 2 % 2, v // 4 % SETS
    if LANES == 8:
        b, quarter, shift = own + lane, 2 * part + half, 4 * part + 2 * half
    else:
        b, quarter, shift = own + lane % 4, 2 * half + lane // 4, 4 * half
    used = (b < byte_rows) & (row < ROWS)
    b, row = tl.minimum(b, byte_rows - 1), tl.minimum(row, ROWS - 1)
    dtype: tl.constexpr = y_ptr.dtype.element_ty
    place = tl.load(table_ptr + b) + quarter * tl.load(table_ptr + byte_rows + b)
    scale = tl.load(r_ptr + row) * tl.load(s_ptr + tl.load(table_ptr + 2 * byte_rows + b))
    product = (total >> shift) - tl.load(sum_ptr + row)
    y = cast(tl.div_rn(product.to(tl.float32), scale), dtype)
    if HAS_BIAS:
        bias = cast(tl.load(bias_ptr + place).to(tl.float32), dtype).to(tl.float32)
        y = cast(y.to(tl.float32) + bias, dtype)
    tl.store(y_ptr + row * out_features + place, y, mask=used)


class Rows(NamedTuple):
    """How a product is cut: rows of bytes of a tile (4 or 8), warps of a program, how many tiles they have,
    and steps of 64 columns that a thread holds."""

    lanes: int
    warps: int
    tiles: int
    held: int


def cut(byte_rows: int, columns: int, rows: int) -> Rows:
    """As measured on an H200 (benchmarks/results/decode.csv)."""
    if columns > 4096:
        return Rows(8 if rows > 8 else 4, 8, 1, 13)
    return Rows(8, 4, 2 if rows > 8 and byte_rows > 2048 else 1, 8)


def few_rows(
    codes: Tensor, scales: tuple[Tensor, Tensor], packed: Tensor, table: Tensor, s: Tensor,
    bias: Tensor | None, y: Tensor, how: Rows, overlap: bool,
) -> None:  # fmt: skip
    """Write y (rows, out_features) from codes; arguments as of :func:`~.matvec.matvec`."""
    (count, columns), byte_rows = codes.shape, packed.shape[0]
    share = how.warps // how.tiles
    words, steps = columns // 4, ceil_div(columns // 64, share)
    turns = ceil_div(steps, how.held)
    held = ceil_div(steps, turns)
    even = turns * held * share * 64 == columns
    lines = ceil_div(words, 32)
    key: tuple[Any, ...] = (y.dtype, count, byte_rows, columns, s.shape, how, overlap)
    key += (None if bias is None else (bias.dtype, *aligned(bias)),)
    args = (
        codes.view(torch.int32), *scales, scales[1][count:], packed.view(torch.int32), table, s,
        s if bias is None else bias, y, byte_rows * 4, byte_rows, words,
        count, how.lanes, how.warps, how.tiles, held, turns, lines, even, bias is not None, overlap,
    )  # fmt: skip
    programs, index = ceil_div(byte_rows, how.lanes * how.tiles), codes.get_device()
    launch(_few_rows, programs, index, key, args, how.warps, overlap=overlap)
