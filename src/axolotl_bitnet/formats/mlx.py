"""MLX checkpoints: 2-bit affine quantization, which mlx-lm runs natively, on Macs and on a CPU.

A row is cut into groups of 32, 64 or 128 weights, each ``scale * q + bias`` with q in {0, 1, 2}: here ``q =
code + 1``, ``scale = d`` and ``bias = -d`` with ``d = bf16(1 / s)``, which gives exactly the weights of the
dense revert. A uint32 holds 16 q, the first in its lowest bits. MLX does not quantize activations. Rows that
are no multiple of 32 cannot be cut so: such a matrix is stored as in the dense revert.
"""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from ..storage.atomic import CheckpointError
from ..storage.safetensors_stream import CheckpointReader, Entry
from ..ternary import scale_of
from .checkpoint import TernaryCheckpoint
from .config_json import in_bfloat16, read_config, read_plan, with_rope_theta
from .dense import magnitude_of, read_signs
from .folder_writer import MatrixFormat
from .mlx_model import computed_otherwise, rope_scaling

GROUPS = (128, 64, 32)
"""Weights that share a scale, as MLX's kernels know them; the largest that divides the columns is used."""

_PER_WORD = 16


def group_size(columns: int) -> int | None:
    """Weights of a row that share a scale; None if the row cannot be cut into MLX's groups."""
    return next((size for size in GROUPS if columns % size == 0), None)


def pack_words(codes: Tensor) -> Tensor:
    """int8 codes (rows, columns) to uint32 (rows, columns / 16).

    Raises:
        ValueError: columns is not a multiple of 16.
    """
    if codes.shape[1] % _PER_WORD:
        raise ValueError(f"{codes.shape[1]} columns are not a multiple of {_PER_WORD}")
    q = (codes + 1).view(torch.uint8)
    octets = q[:, 0::4] | q[:, 1::4] << 2 | q[:, 2::4] << 4 | q[:, 3::4] << 6
    return octets.contiguous().view(torch.uint32)


def unpack_words(words: Tensor) -> Tensor:
    """uint32 (rows, columns / 16) to int8 codes (rows, columns). Bits 11 give 2."""
    octets = words.contiguous().view(torch.uint8)
    codes = torch.empty(octets.shape[0], octets.shape[1] * 4, dtype=torch.int8)
    for place in range(4):
        codes[:, place::4] = octets >> 2 * place & 3
    return codes.sub_(1)


class MLXFormat(MatrixFormat):
    def open(self, path: str | Path, config: Mapping[str, Any] | None = None) -> TernaryCheckpoint:
        return MLXCheckpoint(path, config)

    def refusals(self, config: Mapping[str, Any], tokenizer: Path | None) -> list[str]:
        return computed_otherwise(config)

    def config_of(self, source: TernaryCheckpoint) -> dict[str, Any]:
        return mlx_config(source)

    def entries(self, weight: Entry) -> list[Entry]:
        rows, columns = weight.shape
        size = group_size(columns)
        if size is None:
            return [Entry(weight.name, torch.bfloat16, weight.shape)]
        stem = weight.name.removesuffix(".weight")
        return [
            Entry(weight.name, torch.uint32, (rows, columns // _PER_WORD)),
            Entry(f"{stem}.scales", torch.bfloat16, (rows, columns // size)),
            Entry(f"{stem}.biases", torch.bfloat16, (rows, columns // size)),
        ]

    def tensors(self, weight: Entry, codes: Tensor, s: Tensor) -> list[Tensor]:
        rows, columns = weight.shape
        size, magnitude = group_size(columns), magnitude_of(codes, s)
        if size is None:
            return [codes.to(torch.bfloat16).mul_(magnitude)]
        scales = magnitude.expand(rows, columns // size)
        return [pack_words(codes), scales, -scales]


def mlx_config(source: TernaryCheckpoint) -> dict[str, Any]:
    """With MLX's ``quantization``: a group size for most layers, and one each for those that differ."""
    sizes = {
        key.removesuffix(".weight"): size
        for key in source.keys.values()
        if (size := group_size(source.entries[key].shape[1])) is not None
    }
    if not sizes:
        raise CheckpointError(f"{source.folder}: no ternary layer has rows of a multiple of 32, MLX's groups")
    common = max(sizes.values(), key=list(sizes.values()).count)
    quantization: dict[str, Any] = {"group_size": common, "bits": 2, "mode": "affine"}
    quantization |= {stem: {"group_size": size, "bits": 2} for stem, size in sizes.items() if size != common}
    config = with_rope_theta(in_bfloat16(source.config)) | {"quantization": quantization}
    scaling = rope_scaling(config)
    return config if scaling is None else config | {"rope_scaling": scaling}


class MLXCheckpoint(TernaryCheckpoint):
    """A folder that :func:`export_mlx` wrote, read back.

    Raises:
        CheckpointError: it is not such a folder; later, at :meth:`codes`: the scales and biases of a layer
            are not those of one ternary matrix.
    """

    format = "mlx"

    def __init__(self, folder: str | Path, config: Mapping[str, Any] | None = None):
        self.folder = self.companions = Path(folder)
        path = self.folder / "config.json"
        self.config = read_config(self.folder, config)
        quantization = self.config.pop("quantization", None)
        if not isinstance(quantization, dict) or quantization.get("bits") != 2:
            raise CheckpointError(f"{path} is not that of an MLX model of 2 bits")
        if "rope_parameters" in self.config:  # what mlx_config added
            scaling = self.config.pop("rope_scaling", None)
            if scaling != rope_scaling(self.config):
                self.config["rope_scaling"] = scaling
        self.names = read_plan(self.config, path)
        self._reader = CheckpointReader(self.folder)
        stored = self._reader.entries
        self.keys = {name: f"{self.names.stem(name, stored)}.weight" for name in self.names.converted}
        self.entries = dict(stored)
        for key in self.keys.values():
            stem, weight = key.removesuffix(".weight"), stored.get(key)
            parts = [self.entries.pop(f"{stem}.{part}", None) for part in ("scales", "biases")]
            if weight is None or len(weight.shape) != 2:
                raise CheckpointError(f"{self.folder} has no matrix '{key}', a ternary layer")
            if weight.dtype == torch.uint32:
                columns = weight.shape[1] * _PER_WORD
                groups = (weight.shape[0], columns // (group_size(columns) or columns))
                if any(
                    part is None or (part.dtype, part.shape) != (torch.bfloat16, groups) for part in parts
                ):
                    raise CheckpointError(f"{self.folder}: '{stem}' lacks scales and biases of its groups")
                self.entries[key] = Entry(key, torch.bfloat16, (weight.shape[0], columns))
            elif weight.dtype != torch.bfloat16:
                raise CheckpointError(f"{self.folder}: '{key}' is {weight.dtype}: neither 2-bit nor bfloat16")
        self.settle_head()

    def codes(self, name: str) -> tuple[Tensor, Tensor]:
        key = self.keys[name]
        if self._reader.entries[key].dtype != torch.uint32:
            found = read_signs(self._reader, key)
            if found is None:
                raise CheckpointError(f"{self.folder}: '{key}' has more than one magnitude, or a NaN")
            return found
        stem = key.removesuffix(".weight")
        scales, biases = (self._reader.tensor(f"{stem}.{part}") for part in ("scales", "biases"))
        magnitude = scales[0, :1]
        if not bool((scales == magnitude).all()) or not bool((biases == -magnitude).all()):
            raise CheckpointError(f"{self.folder}: '{stem}': its groups differ in scale: not ternary")
        return unpack_words(self._reader.tensor(key)), scale_of(magnitude)

    def tensor(self, key: str) -> Tensor:
        return self._reader.tensor(key)


MLX = MLXFormat()
