"""The interface of a format that ternary models are exported to.

A format is one file that defines one :class:`Format`, and one row of :mod:`.registry` (with a function of
:mod:`.ways_to_run`). Config, command line, model card, report, hub and resuming take the rest from these. How
a format is *run* for comparison is in :mod:`axolotl_bitnet.verify.logits`.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

from .checkpoint import TernaryCheckpoint

Proof = Callable[[Path], None]
"""Called with what is written before it gets its name; if it raises, nothing is left behind."""


class Format(ABC):
    """A format that ternary models are exported to."""

    @abstractmethod
    def require_writable(self, source: TernaryCheckpoint, dst: str | Path, overwrite: bool = False) -> int:
        """Make sure, without reading a weight, that :meth:`write` can write an opened model.

        Returns:
            The bytes that its tensors will take.

        Raises:
            CheckpointError: what is stored does not fit the format, or the target exists.
            ImportError: a package that writes the format is missing.
        """

    @abstractmethod
    def write(
        self,
        source: TernaryCheckpoint,
        dst: str | Path,
        overwrite: bool = False,
        check: Proof | None = None,
    ) -> Path:
        """Write an opened model.

        Works tensor by tensor: memory stays below twice the largest tensor plus 300 MiB. What is written
        appears when it is complete, or not at all.

        Args:
            source: the model.
            dst: folder or file to make.
            overwrite: replace ``dst`` if it exists.
            check: called with what is written before it gets its name; if it raises, nothing is left behind.

        Returns:
            ``dst``.

        Raises:
            CheckpointError: the source is damaged or does not fit the format, or the target exists.
        """

    @abstractmethod
    def open(self, path: str | Path, config: Mapping[str, Any] | None = None) -> TernaryCheckpoint:
        """Read what :meth:`write` wrote.

        Args:
            path: folder or file.
            config: what its config.json holds, if it was read already.

        Raises:
            CheckpointError: it is not of this format.
        """

    def refusals(self, config: Mapping[str, Any], tokenizer: Path | None) -> list[str]:
        """Why a model cannot be written in this format, as far as is known before training.

        Args:
            config: the base's config.json.
            tokenizer: a folder with its tokenizer, if it is on this machine.
        """
        return []
