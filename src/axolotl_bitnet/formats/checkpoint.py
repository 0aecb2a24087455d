"""A stored ternary model, which every artifact is written from and read back as: the ternary layers as codes
and scales, all other tensors as they are."""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Callable, Iterator, Mapping
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from ..model.fingerprint import Fingerprint, TensorFingerprint, digest_rows, merge_digests
from ..model.layer_plan import Plan
from ..storage.parallel import one_thread, parallel_map, row_ranges
from ..storage.progress import begin
from ..storage.safetensors_stream import Entry
from .tied import repeats_embedding, untied


class TernaryCheckpoint(ABC):
    """A stored ternary model, whatever its format; one tensor at a time.

    Attributes:
        format: "latents", "third-party", or what :data:`~.registry.FORMATS` calls it.
        folder: where the weights are.
        companions: where config.json, tokenizer and the like are.
        config: config.json of the *trained* model: with the list of ternary layers, without what a format
            adds.
        names: that list.
        keys: by layer name, the name of its weight in :attr:`entries`.
        entries: all tensors of the model, sorted by name. Ternary weights have their matrix's shape (rows,
            columns) whatever the format makes of it; scales are not among them.
        whole_config: whether the format keeps all of config.json.
        head_unsaid: whether head and embedding are tied by the stored config, but differ.
        rounding: how the format rounds tensors that are not ternary, in words.
    """

    format: str
    folder: Path
    companions: Path
    config: dict[str, Any]
    names: Plan
    keys: Mapping[str, str]
    entries: Mapping[str, Entry]
    whole_config: bool = True
    head_unsaid: bool = False
    rounding: str = "rounded to the stored dtype"

    @abstractmethod
    def codes(self, name: str) -> tuple[Tensor, Tensor]:
        """``(codes, s)`` of a layer, on the CPU: int8 (rows, columns), and the scales that codes are divided
        by, bfloat16. One number per matrix, (1,), is their only shape today; what writes a checkpoint refuses
        any other (:func:`~.folder_writer.require_scale`)."""

    def code_rows(self, name: str) -> tuple[Callable[[int, int], Tensor], Tensor]:
        """``(rows, s)`` of a layer: ``rows(start, stop)`` are the int8 codes of these rows, on the CPU.

        Several threads may call it at once. What writes a format by blocks of rows needs no memory for
        whole matrices.
        """
        codes, scale = self.codes(name)
        return (lambda start, stop: codes[start:stop]), scale

    @abstractmethod
    def tensor(self, key: str) -> Tensor:
        """A tensor that is not ternary, whole, in its stored dtype, on the CPU."""

    def blocks(self, key: str, dtype: torch.dtype) -> Iterator[Tensor]:
        """A tensor that is not ternary as ``dtype``, flat, in pieces."""
        yield self.tensor(key).to(dtype).reshape(-1)

    def settle_head(self) -> None:
        """Correct in config and entries whether head and embedding are tied, by what is stored
        (:mod:`~.tied`). Readers call it when all else is known."""
        found = repeats_embedding(self.config, self.entries, self.blocks)
        if found is None:
            return
        head, repeated = found
        if repeated:
            self.entries = {key: entry for key, entry in self.entries.items() if key != head}
        else:
            self.config = untied(self.config)
            self.head_unsaid = True

    def as_stored(self, key: str, tensor: Tensor) -> Tensor:
        """What :meth:`tensor` would read if ``tensor``, which is not ternary, was written in this format."""
        return tensor.to(self.entries[key].dtype)

    @one_thread()
    def fingerprint(self) -> Fingerprint:
        """Fingerprint of the codes and scales, read from what is stored."""
        advance = begin("reading codes", sum(self.entries[key].nbytes for key in self.keys.values()))
        tensors = {}
        for name in self.names.converted:
            tensors[name] = self._fingerprint(name)
            advance(self.entries[self.keys[name]].nbytes)
        return Fingerprint(tensors)

    def _fingerprint(self, name: str) -> TensorFingerprint:
        rows, columns = self.entries[self.keys[name]].shape
        rows_of, scale = self.code_rows(name)

        def digest(block: tuple[int, int]) -> tuple[int, int]:
            codes = rows_of(*block)
            return digest_rows(codes, first_row=block[0]), codes.numel() - int(codes.count_nonzero())

        parts = list(parallel_map(digest, row_ranges(rows, columns)))
        digests, zeros = [part[0] for part in parts], sum(part[1] for part in parts)
        return TensorFingerprint((rows, columns), f"{merge_digests(digests):016x}", float(scale), zeros)
