"""Ternary codes as llama.cpp's Q2_0 blocks, and back: the ternary type that runs on GPUs (CUDA, Metal,
Vulkan).

A block (18 bytes) holds 64 codes of a row: first the fp16 scale ``d`` of :mod:`.ternary_type`, then 16 bytes
of four codes, plus one (0, 1, 2), in their order, the first at the lowest bits.

Type 42 had blocks of 128 codes before llama.cpp adopted it (:func:`..header.read_header` distinguishes them
by the place of the next tensor); in one fork these are now types 142 and 143. None of the three is read.
"""

from __future__ import annotations

import torch
from torch import Tensor

from .format import GGUFFormat
from .ternary_type import TernaryType

BLOCK, BLOCK_BYTES = 64, 18


def encode(codes: Tensor, d: Tensor) -> Tensor:
    """Blocks of a matrix, or of rows of it.

    Args:
        codes: int8 (rows, columns) in {-1, 0, 1}; columns a multiple of 64.
        d: float16 (1,).

    Returns:
        uint8 (rows, columns / 64 * 18).
    """
    rows, columns = codes.shape
    digits = (codes + 1).view(torch.uint8).reshape(rows, columns // BLOCK, 16, 4)
    first, second, third, fourth = digits.unbind(-1)
    packed = torch.empty(rows, columns // BLOCK, BLOCK_BYTES, dtype=torch.uint8)
    packed[..., :2] = d.view(torch.uint8)
    packed[..., 2:] = first | second << 2 | third << 4 | fourth << 6
    return packed.reshape(rows, -1)


def decode(packed: Tensor) -> tuple[Tensor, Tensor]:
    """The way back from :func:`encode`.

    Args:
        packed: uint8 (rows, blocks * 18).

    Returns:
        ``(codes, d)``: int8 (rows, columns), and float16 (rows, blocks), the scale of every block.

    Raises:
        ValueError: a code is none of -1, 0, 1.
    """
    rows = packed.shape[0]
    blocks = packed.reshape(rows, -1, BLOCK_BYTES)
    d = blocks[..., :2].contiguous().view(torch.float16).squeeze(-1)
    digits = torch.stack([blocks[..., 2:] >> shift & 3 for shift in (0, 2, 4, 6)], dim=-1)
    if bool((digits == 3).any()):
        raise ValueError("a code of 2, which no ternary weight has")
    return digits.view(torch.int8).reshape(rows, -1) - 1, d


Q2_0 = GGUFFormat(TernaryType("q2_0", 42, 41, BLOCK, BLOCK_BYTES, encode, decode))
