"""The base model before its weights are loaded: what its config alone excludes, and where its files are."""

from __future__ import annotations

from collections.abc import Sequence
from importlib.metadata import version
from pathlib import Path
from typing import Any

import torch
from huggingface_hub import snapshot_download
from huggingface_hub.errors import HfHubHTTPError, LocalEntryNotFoundError
from transformers import MODEL_FOR_CAUSAL_LM_MAPPING, AutoModelForCausalLM

from ..formats.recognize import recognize
from ..formats.tied import repeats_embedding, says_tied
from ..formats.unplaced import unplaced
from ..model.layer_plan import ConversionError, plan_conversion
from ..storage.atomic import CheckpointError, read_json
from ..storage.safetensors_stream import CheckpointReader
from .refusals.base import base_refusals, export_refusals


def check_base(cfg: Any, skip_modules: list[str], export: Sequence[str] = ()) -> None:
    """Refuse a base that cannot be trained ternary, before its weights are read.

    Raises:
        ConversionError: it is quantized already, or one of its layers cannot be converted; the message names
        it. Or one of the exports could not be made of it.
    """
    try:
        from axolotl.loaders.utils import load_model_config
    except ImportError:
        raise ConversionError(
            f"Axolotl {version('axolotl')} has no load_model_config to read the base's config with: this "
            "version "
            "is not supported (pip install 'axolotl<0.22')"
        ) from None
    config = load_model_config(cfg)
    for reason in base_refusals(cfg, config.to_dict()):
        raise ConversionError(reason)
    if type(config) in MODEL_FOR_CAUSAL_LM_MAPPING:
        with torch.device("meta"):
            plan_conversion(AutoModelForCausalLM.from_config(config), skip_modules)
    refuse_exports(cfg, config, local_folder(cfg), export)


def refuse_exports(cfg: Any, config: Any, folder: Path | None, export: Sequence[str]) -> None:
    """Compare what `bitnet.export` asks for with what is known of the model.

    Args:
        cfg: Axolotl's config.
        config: the base's, as transformers loads it.
        folder: where the base's files are, if on this machine.
        export: names of formats.

    Raises:
        ConversionError: one of them would fail after the training; the message names it and the reason.
    """
    told = config.to_dict()
    if cfg.reward_model or cfg.process_reward_model:
        told["architectures"] = ["A reward model (ForSequenceClassification)"]
    elif not told.get("architectures") and type(config) in MODEL_FOR_CAUSAL_LM_MAPPING:
        told["architectures"] = [MODEL_FOR_CAUSAL_LM_MAPPING[type(config)].__name__]
    for reason in export_refusals(cfg, told, folder, export):
        raise ConversionError(reason)


def holds_latents(cfg: Any) -> bool:
    """Whether the base holds the latents of a ternary run, which computed as dense weights are another model.
    False for a dense revert, whose weights are computed as they are."""
    folder = local_folder(cfg)
    try:
        config = read_json(folder / "config.json") if folder is not None else {}
    except CheckpointError:
        return False  # Axolotl reports it better
    return recognize(config).kind == "latents"


def lost_head(cfg: Any) -> str | None:
    """A warning where head and embedding are tied by the base's config and its file holds a head of its own:
    Axolotl ties the loaded weights, and that head is lost."""
    folder = local_folder(cfg)
    try:
        if folder is None or not says_tied(config := read_json(folder / "config.json")):
            return None
        reader = CheckpointReader(folder)
        blocks = lambda key, dtype: (block.to(dtype).reshape(-1) for block in reader.row_blocks(key))  # noqa: E731
        found = repeats_embedding(config, reader.entries, blocks)
    except CheckpointError:
        return None  # no safetensors, or Axolotl reports it better
    if found is None or found[1]:
        return None
    return (
        f"{cfg.base_model} has `tie_word_embeddings: true` and holds '{found[0]}', which differs from its "
        "embedding. Loading ties the two, and that head is lost. To train with it, set tie_word_embeddings "
        "to false in the base's config.json"
    )


def unplaced_tensors(cfg: Any) -> list[str]:
    """Names of the base's tensors that the model which Axolotl builds of it has no place for."""
    folder = local_folder(cfg)
    if folder is None or cfg.reinit_weights:
        return []
    try:
        config, stored = read_json(folder / "config.json"), CheckpointReader(folder).entries
    except CheckpointError:
        return []  # no safetensors, or Axolotl reports it better
    if cfg.trust_remote_code and "auto_map" in config:
        return []  # the model is built by the base's own code
    return unplaced(config, stored)


def local_folder(cfg: Any) -> Path | None:
    """The folder that holds the base's files: a path, or its snapshot in the hub's cache. Never downloads."""
    path = Path(cfg.base_model)
    if path.is_dir():
        return path
    try:
        return Path(snapshot_download(cfg.base_model, revision=cfg.revision_of_model, local_files_only=True))
    except (LocalEntryNotFoundError, HfHubHTTPError, ValueError):
        return None
