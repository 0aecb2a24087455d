"""Latent checkpoints: what training saves. Their names, their codes, and the files that travel with a
model."""

from __future__ import annotations

from collections import deque
from collections.abc import Callable, Iterator, Mapping
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from ..model.entry import CONFIG_KEY
from ..model.layer_plan import unfinished_ramp
from ..run_folder import MERGED
from ..storage.atomic import CheckpointError
from ..storage.parallel import parallel_map, row_ranges
from ..storage.safetensors_stream import CheckpointReader
from ..ternary import abs_sum, absmean, codes_of, scale_of
from .checkpoint import TernaryCheckpoint
from .config_json import read_config, read_plan
from .recognize import recognize


class LatentCheckpoint(TernaryCheckpoint):
    """A folder of latents, read tensor by tensor.

    Axolotl's merge-sharded-fsdp-weights writes nothing but weights, into ``output_dir/merged``: their config
    and tokenizer are those of ``output_dir``, the folder ``self.companions``.

    Raises:
        CheckpointError: no safetensors or no config there, a converted layer has no floating-point matrix, or
            training ended on the way from a dense model (`bitnet.ramp_steps`).
    """

    format = "latents"

    def __init__(self, folder: str | Path, config: Mapping[str, Any] | None = None):
        self.folder = Path(folder)
        merged = self.folder.resolve().name == MERGED and not (self.folder / "config.json").exists()
        self.companions = self.folder.resolve().parent if merged else self.folder
        self.config = read_config(self.companions, config)
        self.names = read_plan(self.config, self.companions / "config.json")
        if recognize(self.config).kind == "dense":  # quantized as latents are, it would lose scale
            raise CheckpointError(f"{self.folder} is a dense revert (codes / s), not latents")
        if problem := unfinished_ramp(self.config.get(CONFIG_KEY)):
            raise CheckpointError(f"{self.folder}: {problem}")
        self.reader = CheckpointReader(self.folder)
        self.entries = self.reader.entries
        self.keys = {name: f"{self.names.stem(name, self.entries)}.weight" for name in self.names.converted}
        for key in self.keys.values():
            entry = self.entries.get(key)
            if entry is None:
                raise CheckpointError(f"{self.folder} has no '{key}', which its config lists as ternary")
            if not entry.dtype.is_floating_point or len(entry.shape) != 2:
                raise CheckpointError(
                    f"{self.folder}: '{entry.name}' is {entry.dtype} {list(entry.shape)}, not latents"
                )
        self.settle_head()

    def code_rows(self, name: str) -> tuple[Callable[[int, int], Tensor], Tensor]:
        key = self.keys[name]
        rows, columns = self.entries[key].shape
        sums = parallel_map(lambda block: abs_sum(self.reader.rows(key, *block)), row_ranges(rows, columns))
        g = absmean(sum(sums, torch.zeros((), dtype=torch.float64)), rows * columns)
        return (lambda start, stop: codes_of(self.reader.rows(key, start, stop), g)), scale_of(g)

    def codes(self, name: str) -> tuple[Tensor, Tensor]:
        rows_of, scale = self.code_rows(name)
        rows, columns = self.entries[self.keys[name]].shape
        codes = torch.empty(rows, columns, dtype=torch.int8)

        def fill(block: tuple[int, int]) -> None:
            codes[slice(*block)] = rows_of(*block)

        deque(parallel_map(fill, row_ranges(rows, columns)), maxlen=0)
        return codes, scale

    def tensor(self, key: str) -> Tensor:
        return self.reader.tensor(key)

    def blocks(self, key: str, dtype: torch.dtype) -> Iterator[Tensor]:
        def block(ends: tuple[int, int]) -> Tensor:
            return self.reader.elements(key, *ends).to(dtype)

        return parallel_map(block, row_ranges(self.entries[key].numel, 1))
