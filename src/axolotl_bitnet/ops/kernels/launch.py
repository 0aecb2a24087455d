"""Launching a kernel with little Python.

``kernel[grid](...)`` finds the compiled kernel anew from every argument, which takes longer than many of our
kernels run. Here the caller gives a short key of what the compiled kernel depends on, and the second launch
with the same key uses that kernel directly.

Uses ``run``, ``function`` and ``packed_metadata`` of Triton's compiled kernels, the nine leading arguments of
its launcher (Triton 3.6 names five of them) and ``driver.active.get_current_stream``; run on Triton 3.6, 3.8
and 3.9. Without one of them kernels are launched as Triton does it, which is slower, and a warning names it.
Test: tests/test_upstream_names.py.
"""

from __future__ import annotations

import inspect
import logging
from collections.abc import Callable
from functools import cache, partial
from typing import Any, cast

import torch
import triton
from torch import Tensor
from triton.runtime import driver
from triton.tools.tensor_descriptor import TensorDescriptor

from .arithmetic import INTERPRET

LOG = logging.getLogger("axolotl.bitnet")

_MOST = 10_000  # launches remembered; shapes of a training run are far fewer
_launches: dict[tuple[Any, ...], Callable[..., None]] = {}


class Tiled(TensorDescriptor):
    """A TMA descriptor of a contiguous matrix, unchecked when it is used a second time."""

    def __post_init__(self) -> None:
        pass

    def checked(self) -> TensorDescriptor:
        return TensorDescriptor(self.base, self.shape, self.strides, self.block_shape)


def launch(
    kernel: Any,
    programs: int,
    device: int,
    key: tuple[Any, ...],
    args: tuple[Any, ...],
    warps: int,
    stages: int = 3,
    overlap: bool = False,
) -> None:
    """Run ``kernel`` on a GPU's current stream.

    Args:
        kernel: a function under ``triton.jit``.
        programs: size of its one-dimensional grid.
        device: index of the GPU, negative in the interpreter.
        key: whatever decides the kernel's compilation: dtypes, integer arguments (or what Triton specializes
            them on), constants, and the alignment of pointers that may lack it (:func:`aligned`).
        args: all of the kernel's arguments in order, its constants too.
        warps: warps per program.
        stages: of software pipelining.
        overlap: whether it may start before the kernel before it has ended (:mod:`.overlap`).
    """
    key = (kernel.__name__, programs, device, key)
    run = _launches.get(key)
    if device >= 0 and not _only_gpu() and device != torch.cuda.current_device():
        with torch.cuda.device(device):
            return _launch(kernel, programs, device, key, run, args, warps, stages, overlap)
    return _launch(kernel, programs, device, key, run, args, warps, stages, overlap)


def _launch(
    kernel: Any, programs: int, device: int, key: tuple[Any, ...], run: Callable[..., None] | None,
    args: tuple[Any, ...], warps: int, stages: int, overlap: bool,
) -> None:  # fmt: skip
    if run is not None:
        run(*args)
        return
    args = tuple(arg.checked() if isinstance(arg, Tiled) else arg for arg in args)
    options: dict[str, Any] = {"launch_pdl": True} if overlap else {}
    options |= {"num_warps": warps, "num_stages": stages, "enable_fp_fusion": False}
    compiled = kernel[(programs,)](*args, **options)
    if not INTERPRET:
        if len(_launches) >= _MOST:
            _launches.clear()
        _launches[key] = _direct(compiled, programs, device)


_LAUNCHER = (
    "gridX", "gridY", "gridZ", "stream", "function",
    "kernel_metadata", "launch_metadata", "launch_enter_hook", "launch_exit_hook",
)  # fmt: skip


def _direct(compiled: Any, programs: int, device: int) -> Callable[..., None]:
    """What ``compiled[grid]`` does, less its lookups and hooks; itself, should Triton change it."""
    try:
        names = tuple(inspect.signature(compiled.run).parameters)[: len(_LAUNCHER)]
        starred = names == (*_LAUNCHER[:5], "args") and triton.__version__.startswith("3.6.")
        if names != _LAUNCHER and not starred:
            raise AttributeError(f"its launcher takes {', '.join(names)}")
        stream_of = driver.active.get_current_stream
        no_hooks = (compiled.function, compiled.packed_metadata, None, None, None)
    except (AttributeError, TypeError, ValueError) as error:
        _say_slower(str(error))
        return cast(Callable[..., None], compiled[(programs, 1, 1)])
    run = partial(compiled.run, programs, 1, 1)
    return lambda *args: run(stream_of(device), *no_hooks, *args)


@cache
def _say_slower(reason: str) -> None:
    LOG.warning("Triton %s launches kernels itself, which is slower: %s", triton.__version__, reason)


@cache
def _only_gpu() -> bool:
    return torch.cuda.device_count() == 1


def aligned(*tensors: Tensor) -> tuple[bool, ...]:
    """Whether each begins at 16 bytes, which Triton's loads depend on; a fresh tensor always does."""
    return tuple(tensor.data_ptr() % 16 == 0 for tensor in tensors)
