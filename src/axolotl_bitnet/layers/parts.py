"""The parts of a layer, each one call in the code that a compiler writes.

A compiled layer calls every operation from Python, through torch's dispatcher, and a small step waits for it:
a Llama layer's forward, second forward and backward were 59 calls. So what one autograd function computes is
one operation, or two where a tensor can be freed in between. In eager mode these are plain functions.

``weights`` are latents, with ``shards`` empty; or, of gathered weights, as a compiler sees them, ``packed``,
``g`` and ``s`` of each, with their rows in ``shards``. ``means`` are absmeans of weights. Gradients of biases
are not here: a compiler fuses these sums.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from functools import wraps
from typing import Any, ParamSpec, Protocol, TypeVar, cast

import torch
from torch import Tensor

from .. import ops
from ..ops.operation import Operation, register
from .gathered_weight import READS, GatheredWeight, Shards
from .products import Inputs, OutputGradient
from .weight_codes import Weight, inside_compiled, ternarize

P = ParamSpec("P")
R = TypeVar("R")


class Part(Operation[P, R], Protocol[P, R]):
    """A part: call it; ``plain`` is the function, ``opaque`` what a compiler's code calls."""

    opaque: Callable[P, R]


def part(fake: Callable[..., Any]) -> Callable[[Callable[P, R]], Part[P, R]]:
    """Make a part of a function that calls operations.

    Args:
        fake: empty results for these arguments.
    """

    def decorate(typed: Callable[P, R]) -> Part[P, R]:
        body: Callable[..., Any] = typed

        def here(*args: Any) -> Any:
            with inside_compiled():
                return body(*args)

        opaque = register(typed.__name__, body, here, fake)

        @wraps(body)
        def call(*args: Any) -> Any:
            return opaque(*args) if torch.compiler.is_compiling() else body(*args)

        call.plain, call.opaque = typed, opaque  # type: ignore[attr-defined]
        return cast(Part[P, R], call)

    return decorate


def _sources(weights: Sequence[Any], shards: Sequence[int]) -> Sequence[Weight]:
    """The weights as the functions of :mod:`.weight_codes` take them."""
    each = zip(weights[::3], weights[1::3], weights[2::3], shards, strict=True) if shards else ()
    return [Shards(*one) for one in each] if shards else weights


def _rows(weights: Sequence[Tensor], shards: Sequence[int]) -> Sequence[int]:
    return shards or [weight.shape[0] for weight in weights]


def _new_means(like: Tensor, weights: Sequence[Tensor], shards: Sequence[int]) -> list[Tensor]:
    return [] if shards else [like.new_empty((), dtype=torch.float32) for _ in weights]


def _project_fake(weights: Any, shards: Any, codes_x: Tensor, r: Tensor, biases: Any, dtype: Any) -> Any:
    shape = codes_x.shape[:-1]
    outputs = [codes_x.new_empty((*shape, rows), dtype=dtype) for rows in _rows(weights, shards)]
    return outputs + _new_means(codes_x, weights, shards)


@part(_project_fake)
def project(
    weights: list[Tensor],
    shards: list[int],
    codes_x: Tensor,
    r: Tensor,
    biases: list[Tensor | None],
    dtype: torch.dtype,
) -> list[Tensor]:
    """The products of one x with several weights, (..., out_features) each, then the weights' means."""
    coded = [ternarize(weight, r.numel()) for weight in _sources(weights, shards)]
    outputs = [
        ops.matmul(codes_x, r, codes, s, bias, dtype)
        for (codes, s, _), bias in zip(coded, biases, strict=True)
    ]
    return outputs if shards else outputs + [g for _, _, g in coded]


def _project_backward_fake(
    weights: Any, shards: Any, means: Any, dys: Any, peaks: Any, codes_x: Tensor, r: Tensor, precision: str,
    wanted: Any, dtype: Any,
) -> Any:  # fmt: skip
    columns, dy = codes_x.shape[-1], dys[0]
    dx = [dy.new_empty((*dy.shape[:-1], columns))] if wanted[0] else []
    each = zip(_rows(weights, shards), wanted[1:], strict=True)
    return dx + [dy.new_empty((rows, columns), dtype=dtype) for rows, needed in each if needed]


@part(_project_backward_fake)
def project_backward(
    weights: list[Tensor],
    shards: list[int],
    means: list[Tensor],
    dys: list[Tensor],
    peaks: list[Tensor],
    codes_x: Tensor,
    r: Tensor,
    precision: str,
    wanted: list[bool],
    dtype: torch.dtype,
) -> list[Tensor]:
    """Gradients of x, summed over the weights, and of each weight as ``dtype``; those that are ``wanted``, of
    x and of each weight. ``peaks`` are :func:`axolotl_bitnet.ops.gradient_peaks` of each of ``dys``, or
    empty."""
    dx, dws, inputs = None, [], Inputs(codes_x, r)
    pairs = [peaks[place : place + 2] for place in range(0, 2 * len(dys), 2)]
    each = zip(_sources(weights, shards), means, dys, pairs, wanted[1:], strict=True)
    for weight, g, dy, pair, needed in each:
        gradient = OutputGradient(dy, r, precision, pair)
        if wanted[0]:
            dx = gradient.of_input(weight, g, onto=dx)
        if needed:
            dws.append(gradient.of_weight(inputs, dtype))
        del gradient  # before as much is allocated for the next
    return dws if dx is None else [dx, *dws]


def _gate_and_up_fake(weights: Any, shards: Any, codes_x: Tensor, r: Tensor, dtype: Any) -> Any:
    shape = *codes_x.shape[:-1], _rows(weights, shards)[0]
    gate, up = codes_x.new_empty(shape, dtype=dtype), codes_x.new_empty(shape, dtype=dtype)
    codes_h, r_h = codes_x.new_empty(shape), r.new_empty(r.shape)
    return [gate, up, codes_h, r_h, *_new_means(codes_x, weights, shards)]


@part(_gate_and_up_fake)
def gate_and_up(
    weights: list[Tensor], shards: list[int], codes_x: Tensor, r: Tensor, dtype: torch.dtype
) -> list[Tensor]:
    """A SwiGLU MLP up to ``down_proj``: gate, up, codes and scales of their product, the weights' means."""
    gate, up, *means = project.plain(weights, shards, codes_x, r, [None, None], dtype)
    return [gate, up, *ops.swiglu_quantize(gate, up), *means]


def _down_backward_fake(
    weights: Any, shards: Any, means: Any, dy: Tensor, gate: Tensor, up: Tensor, r_h: Tensor, r: Tensor,
    precision: str, wanted: bool, dtype: Any,
) -> Any:  # fmt: skip
    shape = _rows(weights, shards)[0], gate.shape[-1]
    sizes = [r.numel(), gate.shape[-1]] * 2 if precision == "int8" else []
    peaks = [r.new_empty(size) for size in sizes]
    dw = [gate.new_empty(shape, dtype=dtype)] if wanted else []
    return [gate.new_empty(gate.shape), up.new_empty(up.shape), *peaks, *dw]


@part(_down_backward_fake)
def down_backward(
    weights: list[Tensor],
    shards: list[int],
    means: list[Tensor],
    dy: Tensor,
    gate: Tensor,
    up: Tensor,
    r_h: Tensor,
    r: Tensor,
    precision: str,
    wanted: bool,
    dtype: torch.dtype,
) -> list[Tensor]:
    """Gradients of gate and up; with ``int8`` two peaks of each, as :func:`project_backward` takes them, for
    which ``r`` are the scales of the x that gate and up read; and the gradient of ``down_proj``'s weight as
    ``dtype``, if it is wanted."""
    (weight,) = _sources(weights, shards)
    dy = dy.contiguous()
    gradient = OutputGradient(dy, r_h, precision)
    dh = gradient.of_input(weight, means[0])
    if precision == "int8":
        dgate, dup, h, *peaks = ops.swiglu_gradients(dh, gate, up, r_h, r)
        inputs = Inputs(h, r_h)
    else:
        (dgate, dup, h), peaks = ops.swiglu_backward(dh, gate, up, r_h), []
        inputs = Inputs(dense=h)
    del dh, h
    return [dgate, dup, *peaks, *([gradient.of_weight(inputs, dtype)] if wanted else [])]


def _of_gathered(whole: Part[..., list[Tensor]], gives_means: bool) -> Any:
    """The part on gathered weights, by their inner tensors. Their means are inputs, so it gives none."""

    def read(weights: list[Tensor], shards: list[int], *rest: Any) -> list[Tensor]:
        gathered = [weight for weight in weights if isinstance(weight, GatheredWeight)]
        if len(gathered) < len(weights):
            return whole.plain(weights, shards, *rest)
        inner = [tensor for weight in gathered for tensor in (weight.packed, weight.g, weight.s)]
        results: list[Tensor] = whole.opaque(inner, [weight.shape[0] for weight in gathered], *rest)
        return results + [weight.g for weight in gathered] if gives_means else results

    return read


for _part, _gives_means in (
    (project, True),
    (project_backward, False),
    (gate_and_up, True),
    (down_backward, False),
):
    READS[_part.opaque] = _of_gathered(_part, _gives_means)
