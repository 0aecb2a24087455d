"""A type of GGUF tensors that holds ternary codes: blocks of a row's codes, each with an fp16 scale ``d``.

llama.cpp multiplies by ``d = fp16(1 / s)``, the same in every block of a tensor. ``s`` comes back as ``bf16(1
/ d)``: fp16 has three bits more than bfloat16, and where it has fewer (below 2^-14, a mean weight of 6e-5)
the inner rounding of ``s = bf16(1 / bf16(g))`` makes up for it. That holds for every s of the definition
whose g fp16 can hold, that is up to 65504.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

import torch
from torch import Tensor


@dataclass(frozen=True)
class TernaryType:
    """One such type.

    Attributes:
        name: llama.cpp's name of it in lower case.
        number: of the type in a file (``ggml_type``).
        file_type: the number in a file whose weights are mostly of this type (``llama_ftype``).
        block: codes of a block; rows must be multiples of it.
        nbytes: bytes of a block.
        encode: from int8 codes (rows, columns) and float16 d (1,) to uint8 (rows, columns / block * nbytes).
        decode: the way back: int8 codes (rows, columns), and float16 (rows, blocks), the scale of every
            block; ValueError where a code is none of -1, 0, 1.
    """

    name: str
    number: int
    file_type: int
    block: int
    nbytes: int
    encode: Callable[[Tensor, Tensor], Tensor]
    decode: Callable[[Tensor], tuple[Tensor, Tensor]]


def scale_to_fp16(s: Tensor) -> Tensor:
    """``d = fp16(1 / s)``, float16 (1,).

    Args:
        s: bfloat16 (1,), finite and positive.

    Raises:
        ValueError: fp16 cannot hold it, so that ``s`` would not come back.
    """
    d = s.to(torch.float32).reciprocal().to(torch.float16)
    if not 0 < float(d) < float("inf") or not torch.equal(scale_from_fp16(d), s):
        raise ValueError(f"the scale {float(s):g} has no fp16 reciprocal that gives it back")
    return d


def scale_from_fp16(d: Tensor) -> Tensor:
    """``s = bf16(1 / d)``, bfloat16."""
    return d.to(torch.float32).reciprocal().to(torch.bfloat16)
