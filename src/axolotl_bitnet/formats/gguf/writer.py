"""GGUF files for llama.cpp: written directly from the codes, and read back as codes.

Ternary layers are TQ2_0 (2.06 bits per weight) or TQ1_0 (1.69), with the fp16 reciprocal of the scale that
trained in every block; norms and biases are float32, as llama.cpp requires; everything else is bfloat16,
unless asked otherwise. Nothing is quantized again, so the codes in the file are the trained ones, and so is s
(:mod:`.ternary_type`). The config of the trained model lies in the metadata: files written here are read back
whole.
"""

from __future__ import annotations

import json
import logging
import math
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor

from ...storage.atomic import CheckpointError, disk_errors, require_apart, require_space, whole_file
from ...storage.parallel import one_thread
from ...storage.progress import begin
from ..checkpoint import TernaryCheckpoint
from . import architecture as llama
from .header import MAGIC
from .library import library
from .metadata import metadata_of, rope_factors
from .reader import CONFIG
from .ternary_type import TernaryType, scale_to_fp16
from .tokenizer import Vocabulary, read_vocabulary

LOG = logging.getLogger(__name__)
EMBEDDINGS = ("bf16", "f16", "q8_0")
_ELEMENTS = 1 << 22  # converted at a time


@dataclass(frozen=True)
class _Part:
    """A tensor to write: its name here and there, its type there (ours and GGUF's number), its bytes, and the
    layer if it is ternary."""

    key: str
    name: str
    kind: str
    number: int
    nbytes: int
    shape: tuple[int, ...]
    layer: str | None = None


@dataclass(frozen=True)
class Contents:
    """What a file will hold."""

    architecture: llama.Architecture
    metadata: dict[str, int | float | str]
    parts: list[_Part]
    vocabulary: Vocabulary

    @property
    def nbytes(self) -> int:
        return sum(part.nbytes for part in self.parts)


def write_gguf(
    source: TernaryCheckpoint,
    target: Path,
    type: TernaryType,
    embeddings: str,
    overwrite: bool,
    check: Callable[[Path], None] | None,
) -> None:
    """Write an opened model as one GGUF file; see :func:`axolotl_bitnet.formats.export.export_gguf`."""
    require_apart(source.folder, target)
    contents = contents_of(source, type, embeddings)
    _warn(contents, type, embeddings)
    with one_thread(), disk_errors(target), whole_file(target, overwrite, MAGIC) as work:
        _write(work, source, contents, type)
        if check is not None:
            check(work)


def contents_of(source: TernaryCheckpoint, type: TernaryType, embeddings: str) -> Contents:
    """What to write; no weight is read.

    Raises:
        CheckpointError: llama.cpp cannot run the model as it was trained, or what is stored is damaged.
        ImportError: the gguf package is missing.
    """
    library()
    if embeddings not in EMBEDDINGS:
        raise CheckpointError(f"embeddings '{embeddings}': the types are {', '.join(EMBEDDINGS)}")
    architecture = llama.architecture_of(source.config)
    metadata = metadata_of(architecture, source.config)
    parts = _parts(source, architecture, type, embeddings)
    vocabulary = read_vocabulary(source.companions, llama.shape_of(source.config).vocabulary)
    return Contents(architecture, metadata, parts, vocabulary)


def _parts(
    source: TernaryCheckpoint, architecture: llama.Architecture, type: TernaryType, embeddings: str
) -> list[_Part]:
    """The tensors, in transformers' order.

    Raises:
        CheckpointError: a tensor is missing, has a shape that the config does not give it, or has no place.
    """
    where, tied = source.folder, bool(source.config.get("tie_word_embeddings"))
    known = llama.tensors_of(architecture, llama.shape_of(source.config))
    layers = {key: name for name, key in source.keys.items()}
    parts: list[_Part] = []
    for key, entry in source.entries.items():
        if key.endswith("rotary_emb.inv_freq"):
            continue
        if key not in known:
            raise CheckpointError(
                f"{where}: llama.cpp has no place for '{key}' in a {architecture.ggml} model"
            )
        name, shape = known[key]
        if entry.shape != shape:
            raise CheckpointError(
                f"{where}: '{key}' has shape {list(entry.shape)}, but by its config {list(shape)}"
            )
        kind = "bf16"
        if key in layers:
            kind = type.name if shape[1] % type.block == 0 else "f16"
        elif len(shape) == 1:
            kind = "f32"
        elif key in (llama.EMBEDDING, llama.HEAD):
            kind = embeddings if embeddings != "q8_0" or shape[1] % 32 == 0 else "bf16"
        number, nbytes = _stored_as(kind, shape, type)
        parts.append(_Part(key, name, kind, number, nbytes, shape, layers.get(key)))
    optional = {key for key in known if key.endswith(".bias")} | ({llama.HEAD} if tied else set())
    if missing := sorted(known.keys() - optional - {part.key for part in parts}):
        raise CheckpointError(f"{where} has no '{missing[0]}', which its architecture needs")
    return parts


def _stored_as(kind: str, shape: tuple[int, ...], type: TernaryType) -> tuple[int, int]:
    """The number of a type in the file, and the bytes of a tensor of it."""
    if kind == type.name:  # which the package may not know
        number, elements, size = type.number, type.block, type.nbytes
    else:
        gguf = library()
        number = getattr(gguf.GGMLQuantizationType, kind.upper())
        elements, size = gguf.GGML_QUANT_SIZES[number]
    return number, math.prod(shape) // elements * size


def _warn(contents: Contents, type: TernaryType, embeddings: str) -> None:
    """Say which tensors are not stored as was asked."""
    for part in contents.parts:
        if embeddings == "q8_0" and part.kind == "bf16" and part.key in (llama.EMBEDDING, llama.HEAD):
            LOG.warning("%s: rows of %d are no multiple of 32: bf16, not q8_0", part.key, part.shape[1])
    as_f16 = [part.key for part in contents.parts if part.layer is not None and part.kind == "f16"]
    if as_f16:
        LOG.warning(
            "%d ternary layers have rows that are no multiple of %d and are written as F16, exact but not "
            "small: %s",
            *(len(as_f16), type.block, ", ".join(as_f16[:4]) + (", ..." if len(as_f16) > 4 else "")),
        )


def _write(path: Path, source: TernaryCheckpoint, contents: Contents, type: TernaryType) -> None:
    gguf = library()
    writer = gguf.GGUFWriter(path, contents.architecture.ggml)
    writer.add_type("model")
    writer.add_name(source.companions.resolve().name)  # of the path no more, for the file travels
    writer.add_file_type(type.file_type)
    writer.add_quantization_version(gguf.GGML_QUANT_VERSION)
    for key, value in contents.metadata.items():
        _add(writer, key, value)
    _add(writer, CONFIG, json.dumps(source.config, ensure_ascii=False, separators=(",", ":")))
    _add_vocabulary(writer, contents.vocabulary)
    factors = rope_factors(source.config)
    if factors is not None:
        shape = (factors.numel(),)
        writer.add_tensor_info(llama.ROPE_FREQS, shape, np.dtype(np.float32), factors.nbytes)
    for part in contents.parts:
        writer.add_tensor_info(
            part.name, part.shape, np.dtype(np.float32), part.nbytes, raw_dtype=part.number
        )
    require_space(path.parent, contents.nbytes)
    advance = begin(f"writing {type.name.upper()}", contents.nbytes)
    try:
        writer.write_header_to_file()
        writer.write_kv_data_to_file()
        writer.write_ti_data_to_file()
        if factors is not None:
            writer.write_tensor_data(factors.numpy())
        for part in contents.parts:
            stored = _stored(source, contents.architecture, part, type)
            writer.write_tensor_data(stored)
            advance(stored.nbytes)
    finally:
        writer.close()


def _stored(
    source: TernaryCheckpoint, architecture: llama.Architecture, part: _Part, type: TernaryType
) -> np.ndarray[Any, Any]:
    """A tensor as bytes, uint8, in the order of rows that llama.cpp expects."""
    order = llama.row_order(architecture, llama.shape_of(source.config), part.key)
    if part.layer is None:
        tensor = source.tensor(part.key)
        return _dense(tensor if order is None else tensor[order], part, source.folder)
    codes, s = source.codes(part.layer)
    if not bool(torch.isfinite(s)):
        raise CheckpointError(f"{source.folder}: '{part.key}' holds a NaN or an Inf and has no codes")
    try:
        d = scale_to_fp16(s)
    except ValueError as error:
        raise CheckpointError(f"{source.folder}: '{part.key}': {error}") from None
    if part.kind == "f16" and not bool(codes.any()):
        raise CheckpointError(
            f"{source.folder}: every code of '{part.key}' is zero, and F16 would lose its scale"
        )
    rows = codes.shape[0]
    order = torch.arange(rows) if order is None else order
    blocks = []
    for some in order.split(max(1, _ELEMENTS // codes.shape[1])):
        block = codes[some]
        stored = block * d if part.kind == "f16" else type.encode(block, d)
        blocks.append(stored.view(torch.uint8))
    return torch.cat(blocks).numpy()


def _dense(tensor: Tensor, part: _Part, where: Path) -> np.ndarray[Any, Any]:
    if part.kind == "q8_0":
        gguf = library()
        kind = gguf.GGMLQuantizationType.Q8_0
        blocks = tensor.split(max(1, _ELEMENTS // part.shape[1]))
        return np.concatenate([gguf.quantize(block.to(torch.float32).numpy(), kind) for block in blocks])
    dtype = {"f32": torch.float32, "bf16": torch.bfloat16, "f16": torch.float16}[part.kind]
    stored = tensor.to(dtype)
    if part.kind == "f16" and not bool(torch.isfinite(stored).all()):
        raise CheckpointError(
            f"{where}: '{part.key}' holds values beyond fp16's range: write it as bf16 (--embeddings bf16)"
        )
    return stored.contiguous().view(torch.uint8).numpy()


def _add(writer: Any, key: str, value: int | float | str | bool) -> None:
    if isinstance(value, bool):
        writer.add_bool(key, value)
    elif isinstance(value, int):
        writer.add_uint32(key, value)
    elif isinstance(value, float):
        writer.add_float32(key, value)
    else:
        writer.add_string(key, value)


def _add_vocabulary(writer: Any, vocabulary: Vocabulary) -> None:
    writer.add_tokenizer_model(vocabulary.model)
    writer.add_tokenizer_pre(vocabulary.pre)
    writer.add_token_list(vocabulary.tokens)
    writer.add_token_types(vocabulary.types)
    if vocabulary.scores:
        writer.add_token_scores(vocabulary.scores)
    if vocabulary.merges:
        writer.add_token_merges(vocabulary.merges)
    for key, value in vocabulary.numbers.items():
        _add(writer, f"tokenizer.ggml.{key}", value)
    templates = [{"name": name, "template": text} for name, text in vocabulary.templates.items()]
    if templates:
        writer.add_chat_template(templates)
