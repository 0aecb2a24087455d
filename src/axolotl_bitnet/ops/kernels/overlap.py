"""A kernel that starts while the one before it still runs: programmatic dependent launch, Hopper and later.

Where a kernel takes three microseconds, its start takes another. Launched with ``overlap``, its programs
start as soon as all programs of the kernel before have started, and wait where they first read or write
memory. Until then they ask for weights to be fetched into the L2 cache. A fetch changes nothing that anybody
reads: memory written by the kernel before is read after the wait.
"""

from __future__ import annotations

from functools import cache

import torch
import triton
import triton.language as tl
from triton.language.extra import cuda

LINE = tl.constexpr(128)  # bytes that a fetch brings


@triton.jit
def release(OVERLAP: tl.constexpr):
    """The next kernel may start."""
    if OVERLAP:
        cuda.gdc_launch_dependents()


@triton.jit
def wait(OVERLAP: tl.constexpr):
    """Until all kernels before this one are done and what they wrote is seen. Every program must call it."""
    if OVERLAP:
        cuda.gdc_wait()


@triton.jit
def fetch(pointers):
    """Ask for the 128 bytes around each address to be brought into the L2 cache."""
    tl.inline_asm_elementwise(
        "prefetch.global.L2 [$1]; mov.b32 $0, 0;", "=r,l", [pointers], dtype=tl.int32, is_pure=False, pack=1
    )


@triton.jit
def fetch_some(pointers, asked):
    """The same where ``asked`` is not 0."""
    tl.inline_asm_elementwise(
        "{ .reg .pred p; setp.ne.b32 p, $2, 0; @p prefetch.global.L2 [$1]; mov.b32 $0, 0; }", "=r,l,r",
        [pointers, asked], dtype=tl.int32, is_pure=False, pack=1,
    )  # fmt: skip


@cache
def overlaps(index: int) -> bool:
    """Whether kernels on this GPU can overlap; negative in the interpreter."""
    return index >= 0 and hasattr(cuda, "gdc_wait") and torch.cuda.get_device_capability(index) >= (9, 0)
