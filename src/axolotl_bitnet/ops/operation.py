"""How an operation is written: its body in plain torch, its kernel, and its fake for a compiler.

The body is the definition's arithmetic (:mod:`axolotl_bitnet.ternary`). The Triton kernel of the same name
(:mod:`axolotl_bitnet.ops.kernels`) gives the same results; it runs on NVIDIA GPUs of compute capability 8.0
and later, and everything else takes the body.

A compiler fuses the operations that it can trace, and drops the roundings to bfloat16 in between: the codes
would no longer be the definition's. So under torch.compile an operation is opaque
(``torch.ops.axolotl_bitnet.*``), and there is no graph break; in eager mode it is a plain call, without the
cost of the dispatcher.
"""

from __future__ import annotations

import importlib.util
from collections.abc import Callable
from functools import cache, wraps
from importlib import import_module
from typing import Any, ParamSpec, Protocol, TypeVar, cast

import torch
from torch import Tensor
from torch.nn import Parameter

P = ParamSpec("P")
R = TypeVar("R")

MAX_COLUMNS = 32768
"""Longest row that a kernel holds in registers; beyond it, rows are quantized in plain torch."""

_KERNEL_DTYPES = {torch.float32, torch.bfloat16, torch.float16}
_library = torch.library.Library("axolotl_bitnet", "DEF")


class Operation(Protocol[P, R]):
    """An operation: call it; ``plain`` is its body in plain torch."""

    plain: Callable[P, R]

    def __call__(self, *args: P.args, **kwargs: P.kwargs) -> R: ...


def operation(
    kernels: str, fits: Callable[..., Any], fake: Callable[..., Any] | None
) -> Callable[[Callable[P, R]], Operation[P, R]]:
    """Make an operation of its body in plain torch. The first argument is a tensor.

    Args:
        kernels: the file of :mod:`axolotl_bitnet.ops.kernels` that has the kernel, a function of the same
            name and signature.
        fits: whether the kernel takes these arguments.
        fake: empty results for these arguments, for a compiler; None where no compiler sees the operation.
    """

    def decorate(typed: Callable[P, R]) -> Operation[P, R]:
        body: Callable[..., Any] = typed
        name = typed.__name__

        @cache
        def kernel() -> Callable[..., Any]:
            module = import_module(f"{__package__}.kernels.{kernels}")
            return cast(Callable[..., Any], getattr(module, name))

        def here(*args: Any) -> Any:
            return kernel()(*args) if fits(*args) else body(*args)

        opaque = None if fake is None else register(name, body, here, fake)

        @wraps(body)
        def call(x: Any, *rest: Any) -> Any:
            if opaque is not None and (
                torch.compiler.is_compiling() or not (type(x) is Tensor or type(x) is Parameter)
            ):
                return opaque(x, *rest)
            return kernel()(x, *rest) if fits(x, *rest) else body(x, *rest)

        call.plain = typed  # type: ignore[attr-defined]
        return cast(Operation[P, R], call)

    return decorate


def register(
    name: str, body: Callable[..., Any], here: Callable[..., Any], fake: Callable[..., Any]
) -> Callable[..., Any]:
    """Make ``here`` an opaque operation, ``torch.ops.axolotl_bitnet.<name>``, of ``body``'s signature.

    The lower level of ``torch.library.custom_op``: a call costs a quarter of what it does there.
    """
    _library.define(name + torch.library.infer_schema(body, mutates_args=()))
    _library.impl(name, here, "CompositeExplicitAutograd")
    torch.library.register_fake(f"axolotl_bitnet::{name}", fake, lib=_library)
    return cast(Callable[..., Any], getattr(torch.ops.axolotl_bitnet, name).default)


def has_kernels(x: Tensor, dtype: torch.dtype = torch.bfloat16) -> bool:
    """Whether the kernels run on x's device and compute in ``dtype``."""
    return x.is_cuda and dtype in _KERNEL_DTYPES and _gpu_has_kernels(x.get_device())


@cache
def _gpu_has_kernels(index: int) -> bool:
    return (
        torch.version.hip is None
        and torch.cuda.get_device_capability(index) >= (8, 0)
        and importlib.util.find_spec("triton") is not None
    )
