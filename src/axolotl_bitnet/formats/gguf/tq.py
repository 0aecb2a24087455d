"""Ternary codes as llama.cpp's TQ2_0 and TQ1_0 blocks, and back: the ternary types that are quick on CPUs.

A block holds 256 codes of a row, plus one (0, 1, 2), and last the fp16 scale ``d`` of
:mod:`.ternary_type`.

TQ2_0 (66 bytes): two groups of 128 codes; byte m of a group holds codes m, m + 32, m + 64 and m + 96 at bits
0, 2, 4 and 6.
TQ1_0 (54 bytes): byte m holds five codes as digits to base 3, the first the highest; codes lie 32 apart in
the first 160, 16 apart in the next 80, and the last 16 fill four bytes of four digits, 4 apart. The number is
stored as ``ceil(number * 256 / 243)``, so that a multiplication by 3 shifts the next digit into bit 8.
"""

from __future__ import annotations

from functools import partial

import torch
from torch import Tensor

from .format import GGUFFormat
from .ternary_type import TernaryType

BLOCK = 256
BLOCK_BYTES = {"tq2_0": 66, "tq1_0": 54}
_SPANS = ((0, 160, 5, 32), (160, 240, 5, 16), (240, 256, 4, 4))  # of TQ1_0: codes from, to; digits; bytes


def encode_blocks(codes: Tensor, d: Tensor, kind: str) -> Tensor:
    """Blocks of a matrix, or of rows of it.

    Args:
        codes: int8 (rows, columns) in {-1, 0, 1}; columns a multiple of 256.
        d: float16 (1,).
        kind: tq2_0 or tq1_0.

    Returns:
        uint8 (rows, columns / 256 * bytes per block).
    """
    rows, columns = codes.shape
    digits = (codes + 1).view(torch.uint8).reshape(rows, columns // BLOCK, BLOCK)
    packed = torch.empty(rows, columns // BLOCK, BLOCK_BYTES[kind], dtype=torch.uint8)
    packed[..., -2:] = d.view(torch.uint8)
    if kind == "tq2_0":
        bits = digits.reshape(rows, -1, 2, 4, 32)
        low, high = bits[..., 0, :] | bits[..., 1, :] << 2, bits[..., 2, :] << 4 | bits[..., 3, :] << 6
        packed[..., :-2] = (low | high).reshape(rows, -1, 64)
        return packed.reshape(rows, -1)
    at = 0
    for start, end, count, width in _SPANS:
        group = digits[..., start:end].reshape(rows, -1, count, width).to(torch.int16)
        number = torch.zeros_like(group[..., 0, :])
        for digit in range(count):
            number = number * 3 + group[..., digit, :]
        number *= 3 ** (5 - count)
        number += (number * 13 + 242).div(243, rounding_mode="floor")  # ceil(number * 256 / 243) in 16 bits
        packed[..., at : at + width] = number.to(torch.uint8)
        at += width
    return packed.reshape(rows, -1)


def decode_blocks(packed: Tensor, kind: str) -> tuple[Tensor, Tensor]:
    """The way back from :func:`encode_blocks`.

    Args:
        packed: uint8 (rows, blocks * bytes per block).
        kind: tq2_0 or tq1_0.

    Returns:
        ``(codes, d)``: int8 (rows, columns), and float16 (rows, blocks), the scale of every block.

    Raises:
        ValueError: a code is none of -1, 0, 1.
    """
    rows = packed.shape[0]
    blocks = packed.reshape(rows, -1, BLOCK_BYTES[kind])
    d = blocks[..., -2:].contiguous().view(torch.float16).squeeze(-1)
    if kind == "tq2_0":
        bits = blocks[..., :-2].reshape(rows, -1, 2, 1, 32)
        digits = torch.cat([bits >> shift & 3 for shift in (0, 2, 4, 6)], dim=-2)
        if bool((digits == 3).any()):
            raise ValueError("a code of 2, which no ternary weight has")
        return digits.view(torch.int8).reshape(rows, -1) - 1, d
    parts, at = [], 0
    for _, _, count, width in _SPANS:
        part = blocks[..., at : at + width]  # uint8: a multiplication drops what it shifts out
        shifted = torch.stack([part * 3**digit for digit in range(count)], dim=-2)
        parts.append((shifted.to(torch.int16) * 3 >> 8).to(torch.int8).flatten(-2))
        at += width
    return torch.cat(parts, dim=-1).reshape(rows, -1) - 1, d


TQ2_0, TQ1_0 = (
    GGUFFormat(
        TernaryType(
            name,
            number,
            file_type,
            BLOCK,
            BLOCK_BYTES[name],
            partial(encode_blocks, kind=name),
            partial(decode_blocks, kind=name),
        )
    )
    for name, number, file_type in (("tq2_0", 35, 37), ("tq1_0", 34, 36))
)
