"""GGUF files as a source: codes and scales exactly, all other tensors under transformers' names."""

from __future__ import annotations

import json
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor

from ...model.entry import CONFIG_KEY
from ...model.layer_plan import Plan
from ...storage.atomic import CheckpointError
from ...storage.safetensors_stream import Entry
from ..checkpoint import TernaryCheckpoint
from ..config_json import read_plan
from ..registry import FORMATS
from . import architecture as llama
from .header import Header, read_header
from .library import library
from .metadata import rebuild_config
from .ternary_type import TernaryType, scale_from_fp16

CONFIG = "axolotl_bitnet.config"
"""Metadata key of the trained model's config.json."""
_DTYPES = {"F32": torch.float32, "F16": torch.float16, "BF16": torch.bfloat16}
_ROWS = 1 << 22  # elements decoded at a time


def ternary_types() -> dict[str, TernaryType]:
    """The types of the formats in the registry, by llama.cpp's names of them."""
    found = [row.format.type for row in FORMATS.values() if row.folder == "gguf"]  # type: ignore[attr-defined]
    return {type.name.upper(): type for type in found}


class GGUFCheckpoint(TernaryCheckpoint):
    """A GGUF file of a ternary model, read tensor by tensor.

    Files written here carry the trained model's config. Of others it is rebuilt from the metadata, as far as
    llama.cpp keeps it, and the ternary layers are those stored as a ternary type with one scale per tensor.

    ``folder`` is the file, ``companions`` the folder that it lies in. Others' files have no whole config.

    Raises:
        CheckpointError: no GGUF file, a damaged one, no ternary layers, or an unknown architecture.
        ImportError: the gguf package is missing.
    """

    def __init__(self, file: str | Path):
        gguf = library()
        self._types = ternary_types()
        sizes = {int(kind): size for kind, size in gguf.GGML_QUANT_SIZES.items()}
        sizes |= {type.number: (type.block, type.nbytes) for type in self._types.values()}
        self._kinds = {int(kind): kind.name for kind in gguf.GGMLQuantizationType}
        self._kinds |= {type.number: name for name, type in self._types.items()}
        self.folder = Path(file)
        self.companions = self.folder.parent
        self._header = read_header(self.folder, sizes)
        metadata = self._header.metadata
        if metadata.get("split.count", 1) not in (0, 1):
            raise CheckpointError(f"{file} is one of several parts: merge them (llama-gguf-split --merge)")
        embedded = _embedded_config(self._header)
        self.whole_config = embedded is not None
        self.config = rebuild_config(self._header) if embedded is None else embedded
        self._architecture = llama.architecture_of(self.config)
        self._shape = llama.shape_of(self.config)
        known = llama.tensors_of(self._architecture, self._shape)
        stored = self._header.tensors
        names = {key: name for key, (name, _) in known.items() if name in stored}
        if extra := stored.keys() - set(names.values()) - {llama.ROPE_FREQS}:
            raise CheckpointError(f"{file}: tensor '{min(extra)}' is none of this architecture's")
        for key, name in names.items():
            if stored[name].shape != known[key][1]:
                raise CheckpointError(
                    f"{file}: '{name}' has shape {list(stored[name].shape)}, but by its metadata "
                    f"{list(known[key][1])}"
                )
        self._names = dict(sorted(names.items()))
        if embedded is None:
            self.names = self._plan()
            self.config[CONFIG_KEY] = self.names.to_entry()
        else:
            self.names = read_plan(embedded, file)
        self.keys = {name: f"{self.names.stem(name, self._names)}.weight" for name in self.names.converted}
        for name, key in self.keys.items():
            if key not in self._names or self.kind(key) not in (*self._types, "F16"):
                raise CheckpointError(f"{file}: layer '{name}' is not stored as ternary codes")
        ternary = set(self.keys.values())
        stored_as = {self.kind(key).lower() for key in ternary} - {"f16"}
        self.format = f"gguf-{min(stored_as)}" if stored_as else "gguf"
        self.entries = {
            key: Entry(
                key,
                torch.bfloat16 if key in ternary else _DTYPES.get(self.kind(key), torch.float32),
                stored[name].shape,
            )
            for key, name in self._names.items()
        }
        self.settle_head()

    def codes(self, name: str) -> tuple[Tensor, Tensor]:
        key = self.keys[name]
        decode, shape = self._decoder(key), self.entries[key].shape
        data = torch.from_numpy(self._header.read(self._names[key]))
        codes = torch.empty(shape, dtype=torch.int8)
        order = llama.row_order(self._architecture, self._shape, key)
        order = torch.arange(shape[0]) if order is None else order
        step = max(1, _ROWS // shape[1])
        scales = []
        try:
            for rows, some in zip(order.split(step), data.split(step), strict=True):
                codes[rows], d = decode(some)
                scales.append(d[d != 0])
            return codes, scale_from_fp16(_the_one(torch.cat(scales)))
        except ValueError as error:
            raise CheckpointError(f"{self.folder}: '{self._names[key]}' is not ternary: {error}") from None

    def _decoder(self, key: str) -> Callable[[Tensor], tuple[Tensor, Tensor]]:
        kind = self.kind(key)
        return self._types[kind].decode if kind in self._types else _decode_f16

    @property
    def metadata(self) -> Mapping[str, Any]:
        """The file's metadata."""
        return self._header.metadata

    def rope_factors(self) -> Tensor | None:
        """What llama.cpp divides the frequencies of its positions by, float32; None if by nothing."""
        if llama.ROPE_FREQS not in self._header.tensors:
            return None
        return torch.from_numpy(self._header.read(llama.ROPE_FREQS)).view(torch.float32).reshape(-1)

    def as_stored(self, key: str, tensor: Tensor) -> Tensor:
        kind = self.kind(key)
        if kind in _DTYPES:
            return tensor.to(_DTYPES[kind])
        gguf = library()
        blocks = gguf.quantize(tensor.to(torch.float32).numpy(), gguf.GGMLQuantizationType[kind])
        return torch.from_numpy(_dequantize(blocks, kind))

    def tensor(self, key: str) -> Tensor:
        if key not in self._names:
            raise CheckpointError(f"{self.folder} holds no tensor '{key}'")
        kind, data = self.kind(key), self._header.read(self._names[key])
        if kind in _DTYPES:
            tensor = torch.from_numpy(data).view(_DTYPES[kind])
        else:
            tensor = torch.from_numpy(_dequantize(data, kind))
        tensor = tensor.reshape(self._header.tensors[self._names[key]].shape)
        order = llama.row_order(self._architecture, self._shape, key)
        if order is None:
            return tensor
        back = torch.empty_like(tensor)
        back[order] = tensor
        return back

    def kind(self, key: str) -> str:
        """llama.cpp's name of a tensor's type: "TQ2_0", "F32", ..."""
        return self._kinds[self._header.tensors[self._names[key]].kind]

    def bits(self, key: str) -> float:
        """Stored bits per weight of a ternary tensor."""
        type = self._types.get(self.kind(key))
        return type.nbytes * 8 / type.block if type is not None else 16.0

    def _plan(self) -> Plan:
        """Which layers of a file from elsewhere are ternary: those that are stored so."""
        stems = [key.removesuffix(".weight") for key in self._names if key.endswith("proj.weight")]
        converted = [stem for stem in stems if self.kind(f"{stem}.weight") in self._types]
        if not converted:
            raise CheckpointError(
                f"{self.folder} holds no ternary layers ({' or '.join(sorted(self._types))})"
            )
        return Plan(converted, [stem for stem in stems if stem not in converted] + ["lm_head"])


def _embedded_config(header: Header) -> dict[str, Any] | None:
    text = header.metadata.get(CONFIG)
    if text is None:
        return None
    try:
        config = json.loads(text)
    except (TypeError, ValueError) as error:
        raise CheckpointError(f"{header.path}: its {CONFIG} cannot be read: {error}") from error
    if not isinstance(config, dict):
        raise CheckpointError(f"{header.path}: its {CONFIG} holds no JSON object")
    return config


def _decode_f16(data: Tensor) -> tuple[Tensor, Tensor]:
    """Codes of a matrix stored as ``codes * d`` in F16, and its d's (0 where a row has none)."""
    values = data.view(torch.float16)
    d = values.abs().amax(dim=1)
    codes = torch.where(values == 0, 0, values.sign()).to(torch.int8)
    if not torch.equal(codes * d[:, None], values):
        raise ValueError("it has more than one magnitude")
    return codes, d


def _the_one(scales: Tensor) -> Tensor:
    """The scale of all blocks that have one, float16 (1,)."""
    if scales.numel() == 0:
        raise ValueError("every code is zero and no block has a scale")
    if not bool((scales == scales[0]).all()) or not bool(scales[0] > 0):
        raise ValueError("its blocks have different scales")
    return scales[:1]


def _dequantize(data: np.ndarray[Any, Any], kind: str) -> np.ndarray[Any, Any]:
    gguf = library()
    try:
        values = gguf.dequantize(data, gguf.GGMLQuantizationType[kind])
    except NotImplementedError as error:
        raise CheckpointError(f"tensors of type {kind} cannot be read: {error}") from None
    return np.ascontiguousarray(values, dtype=np.float32)
