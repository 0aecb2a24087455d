"""What every artifact is written from, and read back as: the ternary layers as codes and scales, all other
tensors as they are."""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from torch import Tensor

from ..convert import CONFIG_KEY, Plan
from ..fingerprint import Fingerprint, fingerprint_codes
from .progress import begin
from .stream import CheckpointError, Entry

FORMAT = "format"
"""Beside the list of ternary layers in config.json: how they are stored, where nothing else says it."""

DENSE = "dense"


class TernaryCheckpoint(ABC):
    """A stored ternary model, whatever its format; one tensor at a time.

    Attributes:
        folder: where the weights are.
        companions: where config.json, tokenizer and the like are.
        config: config.json of the *trained* model: with the list of ternary layers, without what a format
            adds.
        names: that list.
        keys: by layer name, the name of its weight in :attr:`entries`.
        entries: all tensors of the model, sorted by name. Ternary weights have their matrix's shape (rows,
            columns) whatever the format makes of it; scales are not among them.
        whole_config: whether the format keeps all of config.json.
        rounding: what the format does to tensors that are not ternary, in words.
    """

    folder: Path
    companions: Path
    config: dict[str, Any]
    names: Plan
    keys: Mapping[str, str]
    entries: Mapping[str, Entry]
    whole_config: bool = True
    rounding: str = "rounded to the stored dtype"

    @abstractmethod
    def codes(self, name: str) -> tuple[Tensor, Tensor]:
        """``(codes, s)`` of a layer: int8 (rows, columns) and bfloat16 (1,), on the CPU."""

    @abstractmethod
    def tensor(self, key: str) -> Tensor:
        """A tensor that is not ternary, whole, in its stored dtype, on the CPU."""

    def as_stored(self, key: str, tensor: Tensor) -> Tensor:
        """What :meth:`tensor` reads when ``tensor``, which is not ternary, was written in this format."""
        return tensor.to(self.entries[key].dtype)

    def fingerprint(self) -> Fingerprint:
        """Fingerprint of the codes and scales, read from what is stored."""
        advance = begin("reading codes", sum(self.entries[key].nbytes for key in self.keys.values()))
        tensors = {}
        for name in self.names.converted:
            tensors[name] = fingerprint_codes(*self.codes(name))
            advance(self.entries[self.keys[name]].nbytes)
        return Fingerprint(tensors)


def read_plan(config: Mapping[str, Any], where: str | Path) -> Plan:
    """Names of a checkpoint's ternary and dense linear layers, as conversion wrote them into its config.

    Raises:
        CheckpointError: the config has none, so the checkpoint was not trained with BitLinear layers of this
        package.
    """
    entry = config.get(CONFIG_KEY)
    if not isinstance(entry, dict) or not entry.get("converted"):
        raise CheckpointError(
            f"{where} does not say which layers are ternary (no '{CONFIG_KEY}' key): it was not trained by "
            "axolotl-bitnet. Load it, call convert_to_bitlinear(model) and save it again"
        )
    return Plan(list(entry["converted"]), list(entry.get("dense", [])), dict(entry.get("saved_as", {})))


def is_dense(config: Mapping[str, Any]) -> bool:
    """Whether a config.json says that its ternary layers are stored as ``codes / s``."""
    entry = config.get(CONFIG_KEY)
    return isinstance(entry, Mapping) and entry.get(FORMAT) == DENSE
