"""One stored ternary model written as another: what the folder formats share.

A format says what it makes of a ternary weight; everything else is stored as it is or in bfloat16. Tensor by
tensor: memory stays below twice the largest tensor plus 300 MiB. The folder appears when it is complete.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from ..storage.atomic import CheckpointError, whole_folder, write_json
from ..storage.parallel import one_thread
from ..storage.safetensors_stream import SINGLE, Entry, SafetensorsWriter
from .checkpoint import TernaryCheckpoint
from .companions import copy_companions
from .shapes import require_shapes


class Layout(ABC):
    """How a format stores a ternary weight, and the rest.

    Attributes:
        rest: dtype of all other floating-point tensors; None leaves them as they are.
    """

    rest: torch.dtype | None = torch.bfloat16

    @abstractmethod
    def entries(self, weight: Entry) -> list[Entry]:
        """The tensors that a ternary weight (rows, columns) becomes.

        Raises:
            ValueError: the format cannot hold such a weight; says why.
        """

    @abstractmethod
    def write(self, writer: SafetensorsWriter, source: TernaryCheckpoint, name: str, weight: Entry) -> None:
        """Write these tensors of the layer ``name``.

        Raises:
            CheckpointError: what is stored is damaged, or the format cannot hold it.
        """


class WholeMatrices(Layout):
    """A layout that is made of a matrix at a time."""

    @abstractmethod
    def tensors(self, weight: Entry, codes: Tensor, s: Tensor) -> list[Tensor]:
        """Contents of :meth:`entries`, from int8 codes (rows, columns) and bfloat16 s, shape (1,).

        Raises:
            ValueError: the format cannot hold them; says why.
        """

    def write(self, writer: SafetensorsWriter, source: TernaryCheckpoint, name: str, weight: Entry) -> None:
        codes, s = source.codes(name)
        require_scale(source, weight, s)
        if codes.numel() and (int(codes.amax()) > 1 or int(codes.amin()) < -1):
            raise CheckpointError(f"{source.folder}: '{weight.name}' holds codes beside -1, 0 and 1: damaged")
        try:
            tensors = self.tensors(weight, codes, s)
        except ValueError as error:
            raise CheckpointError(f"{source.folder}: '{weight.name}': {error}") from error
        for part, tensor in zip(self.entries(weight), tensors, strict=True):
            writer.write(part.name, tensor)


def rewrite(
    source: TernaryCheckpoint,
    dst: str | Path,
    layout: Layout,
    config: Mapping[str, Any],
    overwrite: bool = False,
    check: Callable[[Path], None] | None = None,
) -> Path:
    """Write a model's folder in another format.

    Args:
        source: the model.
        dst: folder to make.
        layout: the format.
        config: its config.json.
        overwrite: replace ``dst`` if it exists.
        check: called with the finished folder before it gets its name; if it raises, nothing is left behind.

    Returns:
        ``dst``.

    Raises:
        CheckpointError: the source is damaged or does not fit the format, or the target exists.
    """
    origin, target = source.folder.resolve(), Path(dst).resolve()
    if target == origin or target in origin.parents:
        raise CheckpointError(f"{dst} would replace its own source {source.folder}: name another folder")
    layers = {key: name for name, key in source.keys.items()}

    def stored_as(entry: Entry) -> torch.dtype:
        return layout.rest if layout.rest is not None and entry.dtype.is_floating_point else entry.dtype

    announced: list[Entry] = []
    for key, entry in source.entries.items():
        if key not in layers:
            announced.append(Entry(key, stored_as(entry), entry.shape))
            continue
        try:
            announced += layout.entries(entry)
        except ValueError as error:
            raise CheckpointError(f"{source.folder}: '{key}' {error}") from error
    require_shapes(source)

    with whole_folder(dst, overwrite) as work:
        with one_thread(), SafetensorsWriter(work / SINGLE, announced) as writer:
            for key, entry in source.entries.items():
                if key in layers:
                    layout.write(writer, source, layers[key], entry)
                else:
                    writer.write_blocks(key, source.blocks(key, stored_as(entry)))
        write_json(work / "config.json", dict(config))
        copy_companions(source.companions, work)
        if check is not None:
            check(work)
    return Path(dst)


def require_scale(source: TernaryCheckpoint, weight: Entry, s: Tensor) -> None:
    """Raise CheckpointError unless ``s``, bfloat16 (1,), is a number above 0."""
    if not bool(torch.isfinite(s)) or float(s) <= 0:
        raise CheckpointError(
            f"{source.folder}: '{weight.name}' holds a NaN or an Inf, or is damaged: scale {s.tolist()}"
        )
