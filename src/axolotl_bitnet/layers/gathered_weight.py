"""A gathered weight that holds codes, and acts as a float tensor where only shape and dtype matter."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, NamedTuple

import torch
from torch import Tensor

from .. import ops


class GatheredLayer:
    """The weights that were gathered together. One launch makes the codes of all, when the first is read;
    once each has been read, only their readers hold them.

    Args:
        packed: uint8 (shards, ``layout.packed_size``), filled anew by each gather.
        layout: where each weight's bytes and codes are.
    """

    def __init__(self, packed: Tensor, layout: ops.ShardLayout) -> None:
        self.packed, self.layout = packed, layout
        self.views = [self._view(part) for part in layout.parts]
        self._codes: Tensor | None = None
        self._unread = 0  # a bit per weight

    def _view(self, part: Any) -> Tensor:
        size = (self.layout.shards, part.bytes, part.columns)
        strides = (self.layout.packed_size, part.columns, 1)
        return self.packed.as_strided(size, strides, part.packed_at)

    def codes(self, place: int) -> Tensor:
        """int8 (rows, columns) of the place-th weight."""
        if self._codes is None:
            self._codes = ops.unpack_layer(self.packed, self.layout)
            self._unread = (1 << len(self.views)) - 1
        part = self.layout.parts[place]
        codes = self._codes.as_strided((part.rows, part.columns), (part.columns, 1), part.codes_at)
        self._unread &= ~(1 << place)
        if not self._unread:
            self._codes = None
        return codes

    def forget(self) -> None:
        """The bytes have changed, or are no more."""
        self._codes = None


class GatheredWeight(Tensor):
    """A whole weight as the codes of its shards: what a BitLinear's ``weight`` is while it is gathered.

    The layers read the codes; the operations of :mod:`axolotl_bitnet.ops` do too, and any other sees ``codes
    / s``. Nothing can write to it.
    """

    packed: Tensor
    g: Tensor
    s: Tensor
    layer: GatheredLayer | None
    place: int

    @staticmethod
    def __new__(
        cls,
        packed: Tensor,
        g: Tensor,
        s: Tensor,
        rows: int,
        dtype: torch.dtype,
        layer: GatheredLayer | None = None,
        place: int = 0,
    ) -> GatheredWeight:
        """
        Args:
            packed: uint8 (shards, bytes, columns), of :func:`axolotl_bitnet.ops.pack_shard`.
            g, s: float32 () and bfloat16 (1,), read anew whenever the weight is.
            rows, dtype: of the weight that it represents.
            layer, place: what it was gathered with, if it was, and which it is there.
        """
        shape = (rows, packed.shape[2])
        weight = Tensor._make_wrapper_subclass(cls, shape, dtype=dtype, device=packed.device)
        weight.packed, weight.g, weight.s, weight.layer, weight.place = packed, g, s, layer, place
        return weight

    def __tensor_flatten__(self) -> tuple[list[str], Any]:
        return ["packed", "g", "s"], (self.shape[0], self.dtype)

    @staticmethod
    def __tensor_unflatten__(
        inner: dict[str, Tensor], context: Any, size: Any, stride: Any
    ) -> GatheredWeight:
        return GatheredWeight(inner["packed"], inner["g"], inner["s"], *context)

    # torch documents this private name; a torch without it fails the gather's own check, before training
    __torch_function__ = getattr(torch._C, "_disabled_torch_function_impl", None)  # type: ignore[assignment]

    @classmethod
    def __torch_dispatch__(  # type: ignore[override]
        cls, function: Any, types: Any, args: tuple[Any, ...] = (), kwargs: dict[str, Any] | None = None
    ) -> Any:
        kwargs = kwargs or {}
        if read := READS.get(function):
            return read(*args)
        if function is torch.ops.aten.detach.default:
            weight = args[0]
            whole = weight.shape[0], weight.dtype, weight.layer, weight.place
            return cls(weight.packed, weight.g, weight.s, *whole)
        if function._schema.is_mutable:
            raise RuntimeError(f"{function} would write to gathered ternary weights, which are only read")
        return function(*_dense(args), **_dense(kwargs))

    def __repr__(self) -> str:  # type: ignore[override]
        # Tensor's own reads elements, which a compiler that logs its inputs has none of
        shards = self.packed.shape[0]
        return f"GatheredWeight({tuple(self.shape)}, {self.dtype}, {shards} shards on {self.device})"

    def codes(self) -> Tensor:
        """int8 of the weight's shape."""
        if self.layer is not None:
            return self.layer.codes(self.place)
        return ops.unpack_shards(self.packed, self.shape[0])

    def transposed_codes(self) -> Tensor:
        """int8 (columns, rows)."""
        return ops.transposed_shards(self.packed, self.shape[0])

    def dense(self, dtype: torch.dtype | None = None) -> Tensor:
        """``codes / s``."""
        return ops.dequantize_shards(self.packed, self.g, self.shape[0], dtype or self.dtype)


class Shards(NamedTuple):
    """A gathered weight inside an operation, where a tensor that acts as another only takes time."""

    packed: Tensor
    g: Tensor
    s: Tensor
    rows: int

    def codes(self) -> Tensor:
        """int8 of the weight's shape."""
        return ops.unpack_shards(self.packed, self.rows)

    def transposed_codes(self) -> Tensor:
        """int8 (columns, rows)."""
        return ops.transposed_shards(self.packed, self.rows)

    def dense(self, dtype: torch.dtype) -> Tensor:
        """``codes / s``."""
        return ops.dequantize_shards(self.packed, self.g, self.rows, dtype)


def _dense(value: Any) -> Any:
    """An operator's arguments, with the gathered weights in them as ``codes / s``."""
    if isinstance(value, GatheredWeight):
        return value.dense()
    if isinstance(value, tuple | list):
        return type(value)(map(_dense, value))
    return {key: _dense(each) for key, each in value.items()} if isinstance(value, dict) else value


_OPS = torch.ops.axolotl_bitnet
READS: dict[Any, Callable[..., Any]] = {  # :mod:`.parts` adds its own
    _OPS.ternarize.default: lambda weight: (weight.codes(), weight.s, weight.g),
    _OPS.dequantized_weight.default: lambda weight, g, dtype: weight.dense(dtype),
    _OPS.transposed_codes.default: lambda weight, g: (weight.transposed_codes(), weight.s),
}
