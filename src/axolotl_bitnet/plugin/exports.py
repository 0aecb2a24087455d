"""Exports that cannot work, found before training: a package that is missing, a model that a format cannot
hold."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any

from transformers import MODEL_FOR_CAUSAL_LM_MAPPING

from ..formats.gguf import architecture as llama
from ..formats.gguf.library import library
from ..formats.gguf.metadata import metadata_of
from ..formats.gguf.tokenizer import read_vocabulary
from ..formats.mlx import refuse_architecture
from ..model.layer_plan import ConversionError
from ..storage.atomic import CheckpointError

_ANY_SIZE = 1 << 20  # of a vocabulary: Axolotl may still add tokens, and resize the embedding


def refuse_exports(cfg: Any, config: Any, folder: Path | None, export: Sequence[str]) -> None:
    """Hold what `bitnet.export` asks for against what is known of the model.

    Args:
        cfg: Axolotl's config.
        config: the base's, as transformers loads it.
        folder: where the base's files are, if on this machine.
        export: names of formats.

    Raises:
        ConversionError: one of them would fail after the training; says which, and why.
    """
    told = config.to_dict()
    if cfg.reward_model or cfg.process_reward_model:
        told["architectures"] = ["A reward model (ForSequenceClassification)"]
    elif not told.get("architectures") and type(config) in MODEL_FOR_CAUSAL_LM_MAPPING:
        told["architectures"] = [MODEL_FOR_CAUSAL_LM_MAPPING[type(config)].__name__]
    tokenizer = folder if (cfg.tokenizer_config or cfg.base_model) == cfg.base_model else None
    for name in export:
        try:
            if name.startswith("gguf"):
                _try_gguf(told, tokenizer)
            elif name == "mlx":
                refuse_architecture(told, cfg.base_model)
        except (CheckpointError, ImportError) as error:
            raise ConversionError(
                f"`bitnet.export: [{name}]` would fail when {cfg.base_model} is trained: {error}. "
                "Take it out of `export`"
            ) from error


def _try_gguf(config: dict[str, Any], tokenizer: Path | None) -> None:
    library()
    architecture = llama.architecture_of(config)
    llama.shape_of(config)
    metadata_of(architecture, config)
    if tokenizer is not None:
        read_vocabulary(tokenizer, _ANY_SIZE)
