"""Latent checkpoints: what training saves. Their names, their codes, and the files that travel with a
model."""

from __future__ import annotations

import shutil
from pathlib import Path

import torch
from torch import Tensor

from ..convert import CONFIG_KEY, unfinished_ramp
from ..fingerprint import Fingerprint, TensorFingerprint, digest_rows, merge_digests
from ..ternary import abs_sum, absmean, codes_of, scale_of
from .source import TernaryCheckpoint, read_plan
from .stream import CheckpointError, CheckpointReader, read_json

COMPANIONS = (
    "tokenizer*",
    "special_tokens_map.json",
    "added_tokens.json",
    "vocab.*",
    "merges.txt",
    "*.tiktoken",
    "*.model",
    "tekken.json",
    "chat_template*",
    "generation_config.json",
    "*processor_config.json",
)
"""Files beside the weights that make a folder a usable model (glob patterns, files only)."""


MORE_TEMPLATES = "additional_chat_templates"
"""Folder beside them, where a tokenizer has several chat templates."""


MERGED = "merged"
"""Where Axolotl merges sharded weights, below the output folder."""


class LatentCheckpoint(TernaryCheckpoint):
    """A folder of latents, read tensor by tensor.

    Axolotl's merge-sharded-fsdp-weights writes nothing but weights, into ``output_dir/merged``: their config
    and tokenizer are those of ``output_dir``, the folder ``self.companions``.

    Raises:
        CheckpointError: no safetensors or no config there, a converted layer has no floating-point matrix, or
            training ended on the way from a dense model (`bitnet.ramp_steps`).
    """

    def __init__(self, folder: str | Path):
        self.folder = Path(folder)
        merged = self.folder.resolve().name == MERGED and not (self.folder / "config.json").exists()
        self.companions = self.folder.resolve().parent if merged else self.folder
        self.config = read_json(self.companions / "config.json")
        self.names = read_plan(self.config, self.companions / "config.json")
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

    def absmean(self, name: str) -> Tensor:
        """``g`` of a layer, summed over row blocks."""
        key = self.keys[name]
        total = sum(
            (abs_sum(block) for block in self.reader.row_blocks(key)), torch.zeros((), dtype=torch.float64)
        )
        rows, columns = self.entries[key].shape
        return absmean(total, rows * columns)

    def codes(self, name: str) -> tuple[Tensor, Tensor]:
        key = self.keys[name]
        g = self.absmean(name)
        codes = torch.empty(self.entries[key].shape, dtype=torch.int8)
        row = 0
        for block in self.reader.row_blocks(key):
            codes[row : row + block.shape[0]] = codes_of(block, g)
            row += block.shape[0]
        return codes, scale_of(g)

    def tensor(self, key: str) -> Tensor:
        return self.reader.tensor(key)

    def fingerprint(self) -> Fingerprint:
        """Fingerprint of what these latents quantize to, by blocks of rows."""
        tensors = {}
        for name in self.names.converted:
            key, g = self.keys[name], self.absmean(name)
            digests, zeros, row = [], 0, 0
            for block in self.reader.row_blocks(key):
                codes = codes_of(block, g)
                digests.append(digest_rows(codes, first_row=row))
                zeros += codes.numel() - int(codes.count_nonzero())
                row += block.shape[0]
            rows, columns = self.entries[key].shape
            digest = f"{merge_digests(digests):016x}"
            tensors[name] = TensorFingerprint((rows, columns), digest, float(scale_of(g)), zeros)
        return Fingerprint(tensors)


def copy_companions(source: Path, target: Path) -> list[str]:
    """Copy tokenizer, chat template, generation config and the like; returns the names copied."""
    names = sorted({path.name for pattern in COMPANIONS for path in source.glob(pattern) if path.is_file()})
    for name in names:
        shutil.copyfile(source / name, target / name)
    if (source / MORE_TEMPLATES).is_dir():
        shutil.copytree(source / MORE_TEMPLATES, target / MORE_TEMPLATES)
    return names
