"""One stored ternary model written as another: what the folder formats share.

A format defines how a ternary weight is stored; everything else is stored as it is or in bfloat16. Before
anything is written, the tensors are compared with the model that config.json describes, which transformers
builds without memory, on the meta device. A checkpoint whose architecture it does not know, or whose tensors
it renames on loading, is compared as far as the names agree.
"""

from __future__ import annotations

from abc import abstractmethod
from collections.abc import Collection, Mapping
from pathlib import Path
from typing import Any, cast

import torch
from torch import Tensor, nn

from ..storage.atomic import CheckpointError, require_apart, require_free_folder, whole_folder, write_json
from ..storage.parallel import one_thread
from ..storage.safetensors_stream import SINGLE, Entry, SafetensorsWriter
from .checkpoint import TernaryCheckpoint
from .companions import copy_companions, token_count, written_here
from .config_json import architecture_name
from .format import Format, Proof
from .tied import EMBEDDINGS


class FolderFormat(Format):
    """A format that is a folder: config.json, safetensors, tokenizer.

    Attributes:
        rest: dtype of all floating-point tensors that are not ternary; None leaves them as they are.
    """

    rest: torch.dtype | None = torch.bfloat16

    @abstractmethod
    def entries(self, weight: Entry) -> list[Entry]:
        """The tensors that a ternary weight (rows, columns) becomes.

        Raises:
            ValueError: the format cannot hold such a weight; the message has the reason.
        """

    @abstractmethod
    def write_layer(
        self, writer: SafetensorsWriter, source: TernaryCheckpoint, name: str, weight: Entry
    ) -> None:
        """Write these tensors of the layer ``name``.

        Raises:
            CheckpointError: what is stored is damaged, or the format cannot hold it.
        """

    @abstractmethod
    def config_of(self, source: TernaryCheckpoint) -> Mapping[str, Any]:
        """The config.json to write.

        Raises:
            CheckpointError: the format has no such models.
        """

    def require_writable(self, source: TernaryCheckpoint, dst: str | Path, overwrite: bool = False) -> int:
        require_apart(source.folder, Path(dst))
        for reason in self.refusals(source.config, source.companions):
            raise CheckpointError(f"{source.folder}: {reason}")
        require_embeddings(source)
        self.config_of(source)
        announced = self._announced(source)
        require_shapes(source)
        require_free_folder(Path(dst), written_here if overwrite else None)
        return sum(entry.nbytes for entry in announced)

    def write(
        self,
        source: TernaryCheckpoint,
        dst: str | Path,
        overwrite: bool = False,
        check: Proof | None = None,
    ) -> Path:
        self.require_writable(source, dst, overwrite)
        layers = {key: name for name, key in source.keys.items()}
        with whole_folder(dst, written_here if overwrite else None) as work:
            with one_thread(), SafetensorsWriter(work / SINGLE, self._announced(source)) as writer:
                for key, entry in source.entries.items():
                    if key in layers:
                        self.write_layer(writer, source, layers[key], entry)
                    else:
                        writer.write_blocks(key, source.blocks(key, self._stored_as(entry)))
            write_json(work / "config.json", dict(self.config_of(source)))
            copy_companions(source.companions, work, source.config)
            if check is not None:
                check(work)
        return Path(dst)

    def _stored_as(self, entry: Entry) -> torch.dtype:
        return self.rest if self.rest is not None and entry.dtype.is_floating_point else entry.dtype

    def _announced(self, source: TernaryCheckpoint) -> list[Entry]:
        ternary = set(source.keys.values())
        announced: list[Entry] = []
        for key, entry in source.entries.items():
            if key not in ternary:
                announced.append(Entry(key, self._stored_as(entry), entry.shape))
                continue
            try:
                announced += self.entries(entry)
            except ValueError as error:
                raise CheckpointError(f"{source.folder}: '{key}' {error}") from error
        return announced


class MatrixFormat(FolderFormat):
    """A folder format that is made of a matrix at a time."""

    @abstractmethod
    def tensors(self, weight: Entry, codes: Tensor, s: Tensor) -> list[Tensor]:
        """Contents of :meth:`entries`, from int8 codes (rows, columns) and bfloat16 s, shape (1,).

        Raises:
            ValueError: the format cannot hold them; the message has the reason.
        """

    def write_layer(
        self, writer: SafetensorsWriter, source: TernaryCheckpoint, name: str, weight: Entry
    ) -> None:
        codes, s = source.codes(name)
        require_scale(source, weight, s)
        if codes.numel() and (int(codes.amax()) > 1 or int(codes.amin()) < -1):
            raise CheckpointError(
                f"{source.folder}: '{weight.name}' holds codes beside -1, 0 and 1: it is damaged. Get "
                "it again"
            )
        try:
            tensors = self.tensors(weight, codes, s)
        except ValueError as error:
            raise CheckpointError(f"{source.folder}: '{weight.name}': {error}") from error
        for part, tensor in zip(self.entries(weight), tensors, strict=True):
            writer.write(part.name, tensor)


def require_scale(source: TernaryCheckpoint, weight: Entry, s: Tensor) -> None:
    """Raise CheckpointError unless ``s`` is one scale, (1,), and a number above 0."""
    if s.shape != (1,):
        raise CheckpointError(
            f"{source.folder}: '{weight.name}' has scales of shape {list(s.shape)}; only one scale per "
            "matrix can be written"
        )
    if not bool(torch.isfinite(s)) or float(s) <= 0:
        raise CheckpointError(
            f"{source.folder}: '{weight.name}' holds a NaN or an Inf, or is damaged: scale {s.tolist()}"
        )


def require_embeddings(source: TernaryCheckpoint) -> None:
    """Raise CheckpointError if the tokenizer has more tokens than the model has embeddings: the first such
    token would end in an index error."""
    embeddings = [entry for key, entry in source.entries.items() if key.endswith(EMBEDDINGS)]
    tokens = token_count(source.companions)
    if len(embeddings) == 1 and tokens is not None and tokens > (rows := embeddings[0].shape[0]):
        raise CheckpointError(
            f"{source.companions}: its tokenizer has {tokens} tokens, the model only {rows} embeddings. "
            "Put the model's own tokenizer there, or resize the embeddings and save the model again"
        )


def require_shapes(source: TernaryCheckpoint) -> None:
    """Compare names and shapes of all tensors with config.json.

    Raises:
        CheckpointError: a tensor has another shape, or is missing.
    """
    model = model_of(source.config)
    if model is None:
        return
    config = source.companions / "config.json"
    parameters = dict(model.named_parameters(remove_duplicate=False))
    for key, entry in source.entries.items():
        if key in parameters and entry.shape != (shape := tuple(parameters[key].shape)):
            raise CheckpointError(
                f"{source.folder}: '{key}' has shape {list(entry.shape)}, but by {config} it has "
                f"{list(shape)}: weights and config are not of one model. Put the config there that the "
                "weights were saved with"
            )
    if not source.entries.keys() <= model.state_dict().keys():
        return  # saved under other names
    if missing := absent_parameters(model, source.entries):
        raise CheckpointError(
            f"{source.folder} has no '{missing[0]}', which a model of {config} has: save the model again"
        )


def absent_parameters(model: nn.Module, stored: Collection[str]) -> list[str]:
    """Names of a model's parameters that are not stored, nor tied to one that is."""
    parameters = dict(model.named_parameters(remove_duplicate=False))
    there = {id(parameters[key]) for key in stored if key in parameters}  # tied ones are one object
    return [key for key, parameter in parameters.items() if id(parameter) not in there]


def model_of(config: dict[str, Any]) -> nn.Module | None:
    """The model on the meta device; None if transformers has no such class, or the config is not enough."""
    import transformers

    kind = getattr(transformers, architecture_name(config), None)
    if not isinstance(kind, type) or not issubclass(kind, transformers.PreTrainedModel):
        return None
    described: Any = getattr(kind, "config_class", None)
    try:
        with torch.device("meta"):
            return cast(nn.Module, kind(described.from_dict(config)))
    except Exception:  # an incomplete config may raise anything
        return None
