"""``y = x W`` for one row or two, by dot products of four bytes: no tensor cores, no shared memory.

Tensor cores want 16 rows of bytes a tile, so a narrow matrix has too few tiles, programs must share one, and
adding their parts up takes as long as reading the weights. Here a warp has rows of its own and walks over all
of their columns: what it adds up stays in its registers. A word of four bytes is 16 weights: an ``and`` takes
a quarter of them, ``dp4a`` multiplies it by four codes of x and adds. The quarters stay where they are in the
byte; their sums are shifted, which is exact.

All loads of a step are issued before the first is used, so that a multiprocessor has tens of KiB under way.

Where x is short enough every program quantizes all of it (:func:`_matvec_of_x`): that takes a microsecond a
row, less than a kernel of its own.
"""

from __future__ import annotations

from typing import Any, NamedTuple

import torch
import triton
import triton.language as tl
from torch import Tensor

from .arithmetic import (
    EPSILON,
    INTERPRET,
    cast,
    ceil_div,
    magnitude,
    power_of_2,
    row_codes,
    row_scale,
    triton_dtype,
)
from .launch import aligned, launch
from .overlap import LINE, fetch, release, wait


@triton.constexpr_function
def _bits(quarter):
    """The two bits of a quarter in each byte of a word, int32."""
    return (0x03030303 << (2 * quarter)) - (quarter == 3) * 2**32


@triton.jit
def _dot(total, w, x):
    """``total`` plus four products: unsigned bytes of w, signed bytes of x."""
    if INTERPRET:
        for byte in tl.static_range(4):
            total += ((w >> (8 * byte)) & 255) * ((x << (24 - 8 * byte)) >> 24)
        return total
    return tl.inline_asm_elementwise(
        "dp4a.u32.s32 $0, $1, $2, $3;", "=r,r,r,r", [w, x, total], dtype=tl.int32, is_pure=True, pack=1
    )


@triton.jit
def _fourths(words, FIRST: tl.constexpr, SECOND: tl.constexpr, FOURTHS: tl.constexpr):
    """Four tensors of the words that a thread has loaded together: all first ones, second, third, fourth."""
    even, odd = tl.split(tl.reshape(words, (FIRST, SECOND, FOURTHS, 2, 2)))
    first, third = tl.split(even)
    second, fourth = tl.split(odd)
    return first, second, third, fourth


@triton.jit
def _add_products(
    sums, held, x, ROWS: tl.constexpr, BESIDE: tl.constexpr, EACH: tl.constexpr, X_BESIDE: tl.constexpr,
    FOURTHS: tl.constexpr,
):  # fmt: skip
    """Sums of one step: x is a tuple, words of each row, that all rows of bytes share."""
    w_parts = _fourths(held, BESIDE, EACH, FOURTHS)
    added = ()
    for row in tl.static_range(ROWS):
        x_parts = _fourths(x[row], X_BESIDE, 1, FOURTHS)
        for quarter in tl.static_range(4):
            total = sums[4 * row + quarter]
            for part in tl.static_range(4):
                w = w_parts[part] & _bits(quarter)
                total = _dot(total, w, tl.broadcast_to(x_parts[part], (BESIDE, EACH, FOURTHS)))
            added = added + (total,)  # noqa: RUF005 (Triton knows no star)
    return added


@triton.jit
def _words(pointers, place, words, EVEN: tl.constexpr):
    if EVEN:
        return tl.load(pointers)
    return tl.load(pointers, mask=place < words, other=0)


@triton.jit
def _rows_of_bytes(w_ptr, byte_rows, words, EACH: tl.constexpr, BESIDE: tl.constexpr,
                   LINES: tl.constexpr, OVERLAP: tl.constexpr):  # fmt: skip
    """A program's rows of bytes: (warps, rows of a warp), and where each begins. Waits for its turn."""
    b = tl.program_id(0) * BESIDE * EACH + tl.arange(0, BESIDE)[:, None] * EACH + tl.arange(0, EACH)[None, :]
    w_rows = w_ptr + (tl.minimum(b, byte_rows - 1).to(tl.int64) * words)[:, :, None]
    release(OVERLAP)
    if OVERLAP:
        fetch(w_rows + tl.minimum(tl.arange(0, LINES) * (LINE // 4), words - 1)[None, None, :])
    wait(OVERLAP)
    return b, w_rows


@triton.jit
def _store(
    sums, r, codes, b, table_ptr, s_ptr, bias_ptr, y_ptr, byte_rows, out_features,
    ROWS: tl.constexpr, HAS_BIAS: tl.constexpr,
):  # fmt: skip
    """``product / (r s)``, correctly rounded, as y's dtype, plus the bias. r and codes are tuples."""
    dtype: tl.constexpr = y_ptr.dtype.element_ty
    used = b < byte_rows
    b = tl.minimum(b, byte_rows - 1)
    n = tl.load(table_ptr + b)
    between = tl.load(table_ptr + byte_rows + b)
    s = tl.load(s_ptr + tl.load(table_ptr + 2 * byte_rows + b))
    for row in tl.static_range(ROWS):
        for quarter in tl.static_range(4):
            product = (tl.sum(sums[4 * row + quarter], axis=2) >> (2 * quarter)) - codes[row]
            y = cast(tl.div_rn(product.to(tl.float32), r[row] * s), dtype)
            place = n + quarter * between
            if HAS_BIAS:
                bias = cast(tl.load(bias_ptr + place).to(tl.float32), dtype).to(tl.float32)
                y = cast(y.to(tl.float32) + bias, dtype)
            tl.store(y_ptr + row * out_features + place, y, mask=used)


@triton.jit
def _matvec(
    x_ptr, r_ptr, sum_ptr, zero_ptr, w_ptr, table_ptr, s_ptr, bias_ptr, y_ptr, out_features, byte_rows, words,
    ROWS: tl.constexpr, EACH: tl.constexpr, BESIDE: tl.constexpr, WIDE: tl.constexpr,
    HELD: tl.constexpr, TURNS: tl.constexpr, LINES: tl.constexpr,
    EVEN: tl.constexpr, HAS_BIAS: tl.constexpr, OVERLAP: tl.constexpr,
):  # fmt: skip
    """From codes of x, as words."""
    b, w_rows = _rows_of_bytes(w_ptr, byte_rows, words, EACH, BESIDE, LINES, OVERLAP)
    r, codes = (), ()
    for row in tl.static_range(ROWS):
        r = r + (tl.load(r_ptr + row),)  # noqa: RUF005 (Triton knows no star)
        codes = codes + (tl.load(sum_ptr + row),)  # noqa: RUF005
    k = tl.arange(0, WIDE)[None, None, :]
    x_places = x_ptr + tl.zeros((BESIDE, 1, 1), tl.int32)  # every warp loads x for itself
    sums = ()
    for _ in tl.static_range(4 * ROWS):
        sums = sums + (tl.zeros((BESIDE, EACH, WIDE // 4), tl.int32),)  # noqa: RUF005
    for turn in range(TURNS):
        held, held_x = (), ()
        for step in tl.static_range(HELD):
            place = (turn * HELD + step) * WIDE + k
            held = held + (_words(w_rows + place, place, words, EVEN),)  # noqa: RUF005
            if ROWS == 1:
                held_x = held_x + (_words(x_places + place, place, words, EVEN),)  # noqa: RUF005
        # No product comes before this zero is there: or the compiler moves each load to where it is used.
        tl.debug_barrier()
        zero = tl.load(zero_ptr)
        for step in tl.static_range(HELD):
            place = (turn * HELD + step) * WIDE + k
            x = ()
            for row in tl.static_range(ROWS):
                if ROWS == 1:
                    x = x + (held_x[step] + zero,)  # noqa: RUF005
                else:
                    words_of_row = _words(x_places + (row * words + place), place, words, EVEN)
                    x = x + (words_of_row + zero,)  # noqa: RUF005
            sums = _add_products(sums, held[step], x, ROWS, BESIDE, EACH, BESIDE, WIDE // 4)
    _store(sums, r, codes, b, table_ptr, s_ptr, bias_ptr, y_ptr, byte_rows, out_features, ROWS, HAS_BIAS)


@triton.jit
def _matvec_of_x(
    x_ptr, w_ptr, table_ptr, s_ptr, bias_ptr, y_ptr, out_features, byte_rows, words, x_row,
    ROWS: tl.constexpr, EACH: tl.constexpr, BESIDE: tl.constexpr, WIDE: tl.constexpr,
    HELD: tl.constexpr, LINES: tl.constexpr, DTYPE: tl.constexpr,
    EVEN: tl.constexpr, HAS_BIAS: tl.constexpr, OVERLAP: tl.constexpr,
):  # fmt: skip
    """From x itself: every program quantizes all of it, which takes less time than a kernel's start."""
    b, w_rows = _rows_of_bytes(w_ptr, byte_rows, words, EACH, BESIDE, LINES, OVERLAP)
    k = tl.arange(0, WIDE)[None, None, :]
    held = ()
    for step in tl.static_range(HELD):
        place = step * WIDE + k
        held = held + (_words(w_rows + place, place, words, EVEN),)  # noqa: RUF005 (Triton knows no star)
    x, r, codes = (), (), ()
    for row in tl.static_range(ROWS):
        words_of_row, r_of_row, sum_of_row = _quantized(x_ptr + row * x_row, words, WIDE, HELD, EVEN, DTYPE)
        x = x + (words_of_row,)  # noqa: RUF005
        r = r + (r_of_row,)  # noqa: RUF005
        codes = codes + (sum_of_row,)  # noqa: RUF005
    sums = ()
    for _ in tl.static_range(4 * ROWS):
        sums = sums + (tl.zeros((BESIDE, EACH, WIDE // 4), tl.int32),)  # noqa: RUF005
    for step in tl.static_range(HELD):
        of_step = ()
        for row in tl.static_range(ROWS):
            of_step = of_step + (x[row][step][None, None, :],)  # noqa: RUF005
        sums = _add_products(sums, held[step], of_step, ROWS, BESIDE, EACH, 1, WIDE // 4)
    _store(sums, r, codes, b, table_ptr, s_ptr, bias_ptr, y_ptr, byte_rows, out_features, ROWS, HAS_BIAS)


@triton.jit
def _quantized(
    x_ptr, words, WIDE: tl.constexpr, STEPS: tl.constexpr, EVEN: tl.constexpr, DTYPE: tl.constexpr
):
    """A row's codes (a tuple of steps, each of WIDE words), its scale and the sum of its codes."""
    k, byte = tl.arange(0, WIDE)[:, None], tl.arange(0, 4)[None, :]
    held = ()
    largest = tl.zeros((WIDE, 4), tl.int32)
    for step in tl.static_range(STEPS):
        place = step * WIDE + k
        x = _words(x_ptr + (4 * place + byte), place, words, EVEN)
        x = cast(x.to(tl.float32), DTYPE).to(tl.float32)
        largest = tl.maximum(largest, magnitude(x))
        held = held + (x,)  # noqa: RUF005 (Triton knows no star)
    r = row_scale(tl.max(tl.max(largest, axis=1), axis=0), EPSILON)
    found = ()
    total = tl.zeros((WIDE,), tl.int32)
    for step in tl.static_range(STEPS):
        codes = row_codes(held[step], r).to(tl.int32)
        total += tl.sum(codes, axis=1)
        found = found + (tl.sum((codes & 255) << (8 * byte), axis=1),)  # noqa: RUF005
    return found, r, tl.sum(total, axis=0)


class Tile(NamedTuple):
    """How a product is cut: rows of bytes that a thread has, rows beside each other in a program, words of a
    row that its warps take at once, how many such steps a thread holds, warps, and whether programs quantize
    x themselves."""

    each: int
    beside: int
    wide: int
    held: int
    warps: int
    whole: bool


def tile(byte_rows: int, columns: int, rows: int) -> Tile:
    """As measured on an H200 (benchmarks/results/decode.csv)."""
    each, warps = 1, 8 if columns > 4096 else 4
    if rows == 1:
        whole = columns <= 16384  # else a thread's part of x does not fit its registers
        if (byte_rows > 4096 and columns <= 8192) or (byte_rows >= 1024 and 2048 < columns <= 4096):
            each = 2
    else:
        whole = columns <= 4096 and byte_rows >= 1024  # quantizing a row takes each program 1 us
    return cut_in_words(columns, rows, each, 4, 32 * warps, warps, whole)


def cut_in_words(columns: int, rows: int, each: int, beside: int, wide: int, warps: int, whole: bool) -> Tile:
    """A tile that holds as many steps as registers allow, the same number in each turn of the loop; with
    ``whole``, all of them."""
    steps = ceil_div(columns // 4, wide)
    turns = 1 if whole else ceil_div(steps, max(1, 16 // (each * rows)))
    return Tile(each, beside, wide, ceil_div(steps, turns), warps, whole)


def matvec(
    x: Tensor, scales: tuple[Tensor, Tensor] | None, packed: Tensor, table: Tensor, s: Tensor,
    bias: Tensor | None, y: Tensor, how: Tile, overlap: bool,
) -> None:  # fmt: skip
    """Write y (rows, out_features); columns are a multiple of 64, and packed is aligned.

    Args:
        x: (rows, columns), int8 codes; or with ``how.whole`` floating point, whose rows may lie apart.
        scales: of codes: r float32 (rows,), and int32: the sum of each row's codes, then a 0.
        packed: uint8 (out_features / 4, columns).
        table: of :func:`~.decode.row_table`.
        s: float32 (matrices,).
    """
    (count, columns), byte_rows, words = x.shape, packed.shape[0], x.shape[1] // 4
    turns = ceil_div(words, how.wide * how.held)
    even = turns * how.wide * how.held == words
    lines = power_of_2(ceil_div(words, 32))
    key: tuple[Any, ...] = (x.dtype, y.dtype, count, byte_rows, columns, s.shape, how, overlap)
    key += (x.stride(0), *aligned(x)) if how.whole else ()
    key += (None if bias is None else (bias.dtype, *aligned(bias)),)
    bytes_as_words, bias_or_any = packed.view(torch.int32), s if bias is None else bias
    weights = bytes_as_words, table, s, bias_or_any, y, byte_rows * 4, byte_rows, words
    programs, index = ceil_div(byte_rows, how.each * how.beside), x.get_device()
    cuts = count, how.each, how.beside, how.wide, how.held
    if scales is None:
        args: tuple[Any, ...] = (
            x, *weights, x.stride(0), *cuts, lines, triton_dtype(y.dtype), even, bias is not None, overlap
        )  # fmt: skip
        launch(_matvec_of_x, programs, index, key, args, how.warps, overlap=overlap)
    else:
        args = (
            x.view(torch.int32), *scales, scales[1][count:], *weights, *cuts, turns, lines, even,
            bias is not None, overlap,
        )  # fmt: skip
        launch(_matvec, programs, index, key, args, how.warps, overlap=overlap)
