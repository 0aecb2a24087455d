"""Dense checkpoints: ``bf16(codes / s)``, a plain bfloat16 model that anything can load.

vLLM, SGLang and converters take it. Each ternary matrix has one magnitude, ``m = bf16(1 / s)``. So its codes
are the signs, and its scale is ``s = bf16(1 / m)``: true of every ``s`` that the definition makes. Quantizing
such a matrix again would shrink its scale to the share of its non-zeros; reading it back here does not. All
other tensors are stored in bfloat16, so bfloat16 ones are unchanged.
"""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from ..model.entry import CONFIG_KEY, FORMAT_KEY
from ..model.layer_plan import Plan
from ..storage.atomic import CheckpointError
from ..storage.safetensors_stream import CheckpointReader, Entry
from ..ternary import EPSILON, scale_of
from .checkpoint import TernaryCheckpoint
from .config_json import in_bfloat16, read_config, read_plan, with_rope_theta
from .folder_writer import MatrixFormat
from .recognize import recognize


def magnitude_of(codes: Tensor, s: Tensor) -> Tensor:
    """``bf16(1 / s)``, shape (1,): the magnitude that keeps ``s`` where only weights are stored.

    Raises:
        ValueError: ``s`` could not be read back from it.
    """
    magnitude = s.to(torch.float32).reciprocal().to(torch.bfloat16)
    if not torch.equal(scale_of(magnitude), s):
        raise ValueError(
            f"its scale {float(s):g} is not bf16(1 / bf16(g)) of any g, so bfloat16 weights cannot carry it; "
            "restored latents can, with the nearest scale that trains (`axolotl-bitnet restore`)"
        )
    if not bool(codes.any()) and not torch.equal(s, _ZERO_SCALE):
        raise ValueError(f"all its codes are zero, which leaves no trace of its scale {float(s):g}")
    return magnitude


_ZERO_SCALE = scale_of(torch.tensor(EPSILON))
"""The scale of a matrix whose codes are all zero: the definition has no other for it."""


class DenseFormat(MatrixFormat):
    def open(self, path: str | Path, config: Mapping[str, Any] | None = None) -> TernaryCheckpoint:
        return DenseCheckpoint(path, config=config)

    def config_of(self, source: TernaryCheckpoint) -> dict[str, Any]:
        config = with_rope_theta(in_bfloat16(source.config))
        return config | {CONFIG_KEY: {**config[CONFIG_KEY], FORMAT_KEY: DenseCheckpoint.format}}

    def entries(self, weight: Entry) -> list[Entry]:
        return [Entry(weight.name, torch.bfloat16, weight.shape)]

    def tensors(self, weight: Entry, codes: Tensor, s: Tensor) -> list[Tensor]:
        return [codes.to(torch.bfloat16).mul_(magnitude_of(codes, s))]


class DenseCheckpoint(TernaryCheckpoint):
    """A dense ternary folder, its codes and scales read from the weights.

    Args:
        folder: where it is.
        names: its ternary layers, if its config does not list them.
        config, reader: its config.json and its tensors, if they were read already.

    Raises:
        CheckpointError: the folder is not what :func:`revert_checkpoint` writes; later, at
            :meth:`codes`: a layer has more than one magnitude, or a NaN.
    """

    format = "dense"

    def __init__(
        self,
        folder: str | Path,
        names: Plan | None = None,
        config: Mapping[str, Any] | None = None,
        reader: CheckpointReader | None = None,
    ):
        self.folder = self.companions = Path(folder)
        path = self.folder / "config.json"
        self.config = read_config(self.folder, config)
        if names is None:
            names = read_plan(self.config, path)
            if recognize(self.config).kind != "dense":
                raise CheckpointError(f"{path} is not a dense revert's ('{CONFIG_KEY}': format 'dense')")
            entry = self.config[CONFIG_KEY]
            self.config[CONFIG_KEY] = {key: value for key, value in entry.items() if key != FORMAT_KEY}
        self.names = names
        self._reader = reader or CheckpointReader(self.folder)
        self.entries = self._reader.entries
        self.keys = {name: f"{names.stem(name, self.entries)}.weight" for name in names.converted}
        for key in self.keys.values():
            found = self.entries.get(key)
            if found is None or not found.dtype.is_floating_point or len(found.shape) != 2:
                raise CheckpointError(f"{self.folder} has no floating-point matrix '{key}', a ternary layer")
        self.settle_head()

    def codes(self, name: str) -> tuple[Tensor, Tensor]:
        key = self.keys[name]
        found = read_signs(self._reader, key)
        if found is None:
            raise CheckpointError(
                f"{self.folder}: '{key}' is not ternary any more: it has more than one magnitude, or a NaN. "
                "Write it again"
            )
        return found

    def tensor(self, key: str) -> Tensor:
        return self._reader.tensor(key)


def read_signs(reader: CheckpointReader, key: str) -> tuple[Tensor, Tensor] | None:
    """Codes and ``s`` of a dense ternary matrix, read by blocks of rows; None if it is not one."""
    codes = torch.empty(reader.entries[key].shape, dtype=torch.int8)
    magnitude, row = torch.zeros(()), 0
    for block in reader.row_blocks(key):
        size = block.abs().to(torch.float32)
        largest = size.amax() if size.numel() else magnitude
        magnitude = largest if not bool(magnitude) else magnitude
        if not bool(torch.isfinite(magnitude)) or not bool(((size == 0) | (size == magnitude)).all()):
            return None
        codes[row : row + block.shape[0]] = torch.sign(block)
        row += block.shape[0]
    return codes, scale_of(magnitude) if bool(magnitude) else _ZERO_SCALE.clone()


DENSE = DenseFormat()
