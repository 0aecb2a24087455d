"""GGUF files of a ternary type, for llama.cpp."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from ...storage.atomic import CheckpointError, require_apart, require_free_file
from ..checkpoint import TernaryCheckpoint
from ..format import Format, Proof
from . import architecture as llama
from .header import MAGIC
from .library import library
from .metadata import metadata_of
from .reader import GGUFCheckpoint
from .ternary_type import TernaryType
from .tokenizer import read_vocabulary
from .writer import contents_of, write_gguf

_ANY_SIZE = 1 << 20  # of a vocabulary: Axolotl may still add tokens, and resize the embedding


@dataclass(frozen=True)
class GGUFFormat(Format):
    """One GGUF file.

    Attributes:
        type: of the ternary layers.
        embeddings: type of embedding and head: bf16, f16 or q8_0.
    """

    type: TernaryType
    embeddings: str = "bf16"

    def require_writable(self, source: TernaryCheckpoint, dst: str | Path, overwrite: bool = False) -> int:
        require_apart(source.folder, Path(dst))
        contents = contents_of(source, self.type, self.embeddings)
        require_free_file(Path(dst), overwrite, MAGIC)
        return contents.nbytes

    def write(
        self,
        source: TernaryCheckpoint,
        dst: str | Path,
        overwrite: bool = False,
        check: Proof | None = None,
    ) -> Path:
        target = Path(dst)
        write_gguf(source, target, self.type, self.embeddings, overwrite, check)
        return target

    def open(self, path: str | Path, config: Mapping[str, Any] | None = None) -> TernaryCheckpoint:
        return GGUFCheckpoint(path)

    def refusals(self, config: Mapping[str, Any], tokenizer: Path | None) -> list[str]:
        try:
            library()
            architecture = llama.architecture_of(config)
            llama.shape_of(config)
            metadata_of(architecture, config)
            if tokenizer is not None:
                read_vocabulary(tokenizer, _ANY_SIZE)
        except (CheckpointError, ImportError) as error:
            return [str(error)]
        return []
