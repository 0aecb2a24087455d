"""A gathered weight that is its codes, and passes for a float tensor where only shape and dtype matter."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

from .. import ops


class GatheredWeight(Tensor):
    """A whole weight as the codes of its shards: what a BitLinear's ``weight`` is while it is gathered.

    The operations of :mod:`axolotl_bitnet.ops` read the codes; any other sees ``codes / s``. Nothing can
    write to it.
    """

    packed: Tensor
    g: Tensor
    s: Tensor
    shards: int

    @staticmethod
    def __new__(
        cls, packed: Tensor, g: Tensor, s: Tensor, shards: int, rows: int, dtype: torch.dtype
    ) -> GatheredWeight:
        """
        Args:
            packed: uint8 (shards * bytes, columns), of :func:`axolotl_bitnet.ops.ops.pack_shard`.
            g, s: float32 () and bfloat16 (1,), read anew whenever the weight is.
            shards, rows, dtype: how many shards; rows and dtype of the weight that it stands for.
        """
        shape = (rows, packed.shape[1])
        weight = Tensor._make_wrapper_subclass(cls, shape, dtype=dtype, device=packed.device)
        weight.packed, weight.g, weight.s, weight.shards = packed, g, s, shards
        return weight

    def __tensor_flatten__(self) -> tuple[list[str], Any]:
        return ["packed", "g", "s"], (self.shards, self.shape[0], self.dtype)

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
        if read := _READS.get(function):
            return read(*args)
        if function is torch.ops.aten.detach.default:
            weight = args[0]
            return cls(weight.packed, weight.g, weight.s, weight.shards, weight.shape[0], weight.dtype)
        if function._schema.is_mutable:
            raise RuntimeError(f"{function} would write to gathered ternary weights, which are only read")
        return function(*_dense(args), **_dense(kwargs))

    def __repr__(self) -> str:  # type: ignore[override]
        # Tensor's own reads elements, which a compiler that logs its inputs has none of
        return f"GatheredWeight({tuple(self.shape)}, {self.dtype}, {self.shards} shards on {self.device})"

    def codes(self) -> Tensor:
        """int8 of the weight's shape."""
        return ops.unpack_shards(self.packed, self.shards, self.shape[0])

    def dense(self, dtype: torch.dtype | None = None) -> Tensor:
        """``codes / s``."""
        dtype = dtype or self.dtype
        return ops.dequantize_shards(self.packed, self.g, self.shards, self.shape[0], dtype)


def _dense(value: Any) -> Any:
    """An operator's arguments, with the gathered weights in them as ``codes / s``."""
    if isinstance(value, GatheredWeight):
        return value.dense()
    if isinstance(value, tuple | list):
        return type(value)(map(_dense, value))
    return {key: _dense(each) for key, each in value.items()} if isinstance(value, dict) else value


_OPS = torch.ops.axolotl_bitnet
_READS: dict[Any, Callable[..., Any]] = {
    _OPS.ternarize.default: lambda weight: (weight.codes(), weight.s, weight.g),
    _OPS.dequantized_weight.default: lambda weight, g, dtype: weight.dense(dtype),
    _OPS.transposed_codes.default: lambda weight, g: (weight.codes().t().contiguous(), weight.s),
}
