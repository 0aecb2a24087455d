"""The interface of a format that ternary models are exported to.

A format is one file that defines one :class:`Format`, and one row of :mod:`.registry`. Config, command line,
model card, report, hub and resuming take the rest from these two. How a format is *run* for comparison is in
:mod:`axolotl_bitnet.verify.logits`.
"""

from __future__ import annotations

import json
from abc import ABC, abstractmethod
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from .checkpoint import TernaryCheckpoint

Proof = Callable[[Path], None]
"""Called with what is written before it gets its name; if it raises, nothing is left behind."""

PROMPT = "The capital of France is"

_SCRIPT = """\
from transformers import AutoModelForCausalLM, AutoTokenizer

model = AutoModelForCausalLM.from_pretrained({path}, dtype="auto")
tokenizer = AutoTokenizer.from_pretrained({path})
inputs = tokenizer("{prompt}", return_tensors="pt")
print(tokenizer.decode(model.generate(**inputs, max_new_tokens=64)[0]))"""


@dataclass(frozen=True)
class WayToRun:
    """One way to run an artifact. The tables of README and docs/run-it.md, model card and report say this.

    Attributes:
        engine: what runs it.
        device: what that is for.
        language: of ``text``: python or bash.
        text: what to type.
        ran: the versions, dtypes and devices that it was run with.
        result: what came out then.
        note: what else to know about it.
    """

    engine: str
    device: str
    language: str
    text: str
    ran: str
    result: str
    note: str = ""


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

    @abstractmethod
    def ways_to_run(self, path: str) -> list[WayToRun]:
        """Ways to run an artifact at ``path`` (written into the commands as it is); the usual way first."""

    def refusals(self, config: Mapping[str, Any], tokenizer: Path | None) -> list[str]:
        """Why a model cannot be written in this format, as far as is known before training.

        Args:
            config: the base's config.json.
            tokenizer: a folder with its tokenizer, if it is on this machine.
        """
        return []


def in_transformers(path: str, ran: str, result: str, note: str = "") -> WayToRun:
    """A script that generates with transformers."""
    script = _SCRIPT.format(path=json.dumps(path, ensure_ascii=False), prompt=PROMPT)
    return WayToRun("transformers", "CPU, GPU", "python", script, ran, result, note)
