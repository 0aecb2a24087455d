"""Small packed models as this package, onebitllms and Microsoft store them."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import torch
from safetensors.torch import load_file, save_file

from axolotl_bitnet import pack_checkpoint
from axolotl_bitnet.storage.atomic import read_json, write_json
from axolotl_bitnet.storage.safetensors_stream import SINGLE
from support.llamas import build, save


def pack(folder: Path, family: str = "Llama", **options: Any) -> Path:
    """A random ternary model with the tiny recipe's tokenizer, packed into ``folder / "packed"``."""
    torch.manual_seed(7)
    pack_checkpoint(save(build(family, **options), folder / "latents"), folder / "packed")
    return folder / "packed"


def configured(folder: Path, **entries: Any) -> Path:
    """Change keys of the ``quantization_config``."""
    config = read_json(folder / "config.json")
    config["quantization_config"] |= entries
    write_json(folder / "config.json", config)
    return folder


def multiplying(folder: Path) -> Path:
    """The same model by Microsoft's convention: a scale that multiplies."""
    tensors = load_file(folder / SINGLE)
    for key in [key for key in tensors if key.endswith("weight_scale")]:
        tensors[key] = tensors[key].float().reciprocal()  # float32, so that it comes back nearly whole
    save_file(tensors, folder / SINGLE, {"format": "pt"})
    return configured(folder, linear_class="autobitlinear", quantization_mode="offline")


def by_onebitllms(folder: Path) -> Path:
    """As onebitllms writes it: nothing of this package in the config, and the head alone left out."""
    config = read_json(folder / "config.json")
    config = {key: value for key, value in config.items() if "axolotl" not in key}
    config["quantization_config"] = {"quant_method": "bitnet", "modules_to_not_convert": ["lm_head"]}
    write_json(folder / "config.json", config)
    return folder
