"""The base model before its weights are loaded: what its config alone rules out, and where its files are."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import torch
from axolotl.loaders.utils import load_model_config
from huggingface_hub import snapshot_download
from huggingface_hub.errors import HfHubHTTPError, LocalEntryNotFoundError
from transformers import MODEL_FOR_CAUSAL_LM_MAPPING, AutoModelForCausalLM

from ..formats.config_json import is_dense
from ..model.layer_plan import CONFIG_KEY, ConversionError, plan_conversion
from ..storage.atomic import CheckpointError, read_json
from .exports import refuse_exports


def check_base(cfg: Any, skip_modules: list[str], export: Sequence[str] = ()) -> None:
    """Refuse a base that cannot be trained ternary, before its weights are read.

    Raises:
        ConversionError: it is quantized already, or one of its layers cannot be converted; the message names
        it. Or one of the exports could not be made of it.
    """
    config = load_model_config(cfg)
    if config.model_type == "falcon" and cfg.fsdp_config:
        raise ConversionError(
            "FSDP does not support the Falcon architecture (Falcon-E and Falcon3 are Llamas, and work)"
        )
    quantization = getattr(config, "quantization_config", None)
    if quantization is not None:
        entries = dict(quantization) if isinstance(quantization, Mapping) else quantization.to_dict()
        online = (
            entries.get("linear_class") == "autobitlinear" and entries.get("quantization_mode") == "online"
        )
        if entries.get("quant_method") != "bitnet" or not online:
            raise ConversionError(
                f"{cfg.base_model} is quantized already ({entries.get('quant_method')}): training needs its "
                "latents. Take the bf16 or 'prequantized' variant of the model"
            )
    if type(config) in MODEL_FOR_CAUSAL_LM_MAPPING:
        with torch.device("meta"):
            plan_conversion(AutoModelForCausalLM.from_config(config), skip_modules)
    refuse_exports(cfg, config, local_folder(cfg), export)


def holds_latents(cfg: Any) -> bool:
    """Whether the base is what a ternary run saved: latents, which computed as dense weights are another
    model. Its dense revert is not: that is meant to be computed so."""
    folder = local_folder(cfg)
    try:
        config = read_json(folder / "config.json") if folder is not None else {}
    except CheckpointError:
        return False  # Axolotl reports it better
    return CONFIG_KEY in config and "quantization_config" not in config and not is_dense(config)


def local_folder(cfg: Any) -> Path | None:
    """The folder that holds the base's files: a path, or its snapshot in the hub's cache. Never downloads."""
    path = Path(cfg.base_model)
    if path.is_dir():
        return path
    try:
        return Path(snapshot_download(cfg.base_model, revision=cfg.revision_of_model, local_files_only=True))
    except (LocalEntryNotFoundError, HfHubHTTPError, ValueError):
        return None
