"""A fingerprint of the trained model: a digest of the codes and the scale of each ternary matrix.

The digest of a matrix is a sum over its elements, modulo 2^64, of the code times an odd weight made from its
row times an odd weight made from its column. A sum may be taken in any order and over any blocks of rows, so
the digest is the same however a model is sharded; and as an odd number times 1 or 2 is never 0 modulo 2^64,
one changed code always changes it. It guards against accidents, not against an adversary.
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from ..ops import ternarize
from ..ternary import DEFINITION
from .whole_weights import whole_weights

_BLOCK = 1 << 22  # elements hashed at a time, to bound the int64 temporaries
_WRAPPERS = {"_orig_mod", "_checkpoint_wrapped_module", "_fsdp_wrapped_module", "module"}


@dataclass(frozen=True)
class TensorFingerprint:
    """Shape (rows, columns), digest of the codes (16 hex digits), scale ``s`` and number of zero codes."""

    shape: tuple[int, int]
    codes: str
    scale: float
    zeros: int


@dataclass(frozen=True)
class Fingerprint:
    """The fingerprints of a model's ternary matrices by layer name (without ``.weight``)."""

    tensors: Mapping[str, TensorFingerprint]
    definition: int = DEFINITION

    @property
    def digest(self) -> str:
        """SHA-256 over all of it: one line to compare two models by."""
        return hashlib.sha256(json.dumps(self._payload(), sort_keys=True).encode()).hexdigest()

    def to_json(self) -> dict[str, Any]:
        return {"digest": self.digest, **self._payload()}

    @classmethod
    def from_json(cls, data: Mapping[str, Any]) -> Fingerprint:
        """Read :meth:`to_json`'s output.

        Raises:
            ValueError: it was edited (the digest does not fit), or made under another version of the
            definition.
        """
        if data["definition"] != DEFINITION:
            raise ValueError(
                f"the fingerprint is of definition {data['definition']}, this package has {DEFINITION}: "
                "use the version that made it"
            )
        tensors = {
            name: TensorFingerprint(tuple(entry["shape"]), entry["codes"], entry["scale"], entry["zeros"])
            for name, entry in data["tensors"].items()
        }
        result = cls(tensors, data["definition"])
        if result.digest != data["digest"]:
            raise ValueError(
                "the fingerprint's digest does not fit its entries: the file was edited or damaged"
            )
        return result

    def _payload(self) -> dict[str, Any]:
        tensors = {
            name: {"shape": list(t.shape), "codes": t.codes, "scale": t.scale, "zeros": t.zeros}
            for name, t in sorted(self.tensors.items())
        }
        return {"definition": self.definition, "tensors": tensors}


def fingerprint_model(model: nn.Module) -> Fingerprint:
    """Fingerprint of a live model's BitLinear layers.

    Under FSDP and ZeRO-3 every rank must call it: sharded weights are gathered, a unit or a matrix at a time.
    Under FSDP1 pass the wrapped model.
    """
    with torch.no_grad():
        tensors = {
            clean_name(name): fingerprint_codes(*ternarize(weight)[:2])
            for name, weight in whole_weights(model)
        }
    return Fingerprint(tensors)


def fingerprint_codes(codes: Tensor, scale: Tensor) -> TensorFingerprint:
    """Fingerprint of one matrix from its int8 codes (rows, columns) and its bfloat16 scale, shape (1,)."""
    rows, columns = codes.shape
    return TensorFingerprint(
        shape=(rows, columns),
        codes=f"{digest_rows(codes):016x}",
        scale=float(scale),
        zeros=codes.numel() - int(codes.count_nonzero()),
    )


def digest_rows(codes: Tensor, first_row: int = 0) -> int:
    """Digest of a block of whole rows, int8 (rows, columns), that starts at ``first_row`` of its matrix.

    The digests of the blocks of a matrix add up, modulo 2^64, to the digest of the matrix.
    """
    columns = codes.shape[1]
    column_weights = _odd_weights(torch.arange(columns, device=codes.device), seed=1)
    step = max(1, _BLOCK // max(1, columns))
    total = torch.zeros((), dtype=torch.int64, device=codes.device)
    for start in range(0, codes.shape[0], step):
        block = codes[start : start + step].to(torch.int64)
        row_sums = (block * column_weights).sum(dim=1)
        rows = torch.arange(first_row + start, first_row + start + block.shape[0], device=codes.device)
        total += (row_sums * _odd_weights(rows, seed=2)).sum()
    return int(total) % 2**64


def merge_digests(digests: Iterable[int]) -> int:
    """Digest of a matrix from the digests of its blocks of rows."""
    return sum(digests) % 2**64


def clean_name(name: str) -> str:
    """A module's name without what DDP, FSDP, activation checkpointing and torch.compile put into it."""
    return ".".join(part for part in name.split(".") if part not in _WRAPPERS)


def _odd_weights(index: Tensor, seed: int) -> Tensor:
    """Odd pseudo-random int64 from indices: the finalizer of splitmix64 (Steele et al. 2014), low bit set."""
    z = (index + 1) * _signed(0x9E3779B97F4A7C15) + _signed((seed * 0xD1342543DE82EF95) % 2**64)
    z = (z ^ _shift(z, 30)) * _signed(0xBF58476D1CE4E5B9)
    z = (z ^ _shift(z, 27)) * _signed(0x94D049BB133111EB)
    return (z ^ _shift(z, 31)) | 1


def _shift(z: Tensor, bits: int) -> Tensor:
    """Logical right shift of int64 (torch's is arithmetic)."""
    return (z >> bits) & ((1 << (64 - bits)) - 1)


def _signed(value: int) -> int:
    return value - 2**64 if value >= 2**63 else value
