"""Stored ternary models for the tests of formats: tiny models of several shapes, their latents on disk."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import load_file, save_file
from torch import Tensor, nn

from axolotl_bitnet.model.convert import convert_to_bitlinear
from axolotl_bitnet.model.entry import CONFIG_KEY
from axolotl_bitnet.storage.atomic import read_json, write_json
from axolotl_bitnet.storage.safetensors_stream import SINGLE
from axolotl_bitnet.ternary import ternarize

Build = Callable[..., nn.Module]
IDS = torch.arange(48).reshape(2, 24) * 7 % 128

FAMILIES: dict[str, tuple[str, dict[str, Any], list[str]]] = {
    "llama": ("Llama", {}, []),
    "tied with biases": (
        "Llama",
        {"tie_word_embeddings": True, "attention_bias": True, "mlp_bias": True, "intermediate_size": 100},
        [],
    ),
    "qwen3": ("Qwen3", {}, []),
    "bitnet": ("BitNet", {}, []),
    "partly dense": ("Llama", {}, ["model.layers.0.self_attn", "down_proj"]),
}
SAVINGS: dict[str, tuple[torch.dtype, dict[str, str]]] = {
    "float32": (torch.float32, {}),
    "float32 shards": (torch.float32, {"max_shard_size": "40KB"}),
    "bfloat16 shards": (torch.bfloat16, {"max_shard_size": "20KB"}),
}


def trained(build: Build, family: str) -> nn.Module:
    """A model with BitLinear layers, norms that are not 1 and biases that are not 0; float32."""
    kind, options, skip = FAMILIES[family]
    model = build(kind, **options).eval()
    convert_to_bitlinear(model, skip)
    with torch.no_grad():
        for parameter in model.parameters():
            if parameter.dim() == 1:
                parameter += torch.randn_like(parameter) * 0.3
    return model


def save(model: nn.Module, folder: Path, saving: str = "float32") -> Path:
    dtype, options = SAVINGS[saving]
    model.to(dtype).save_pretrained(folder, **options)  # type: ignore[operator]
    model.to(torch.float32)
    for name in ("tokenizer.json", "chat_template.jinja"):
        (folder / name).write_text(f"this is {name}")
    return folder


def contents(folder: Path) -> dict[str, bytes]:
    """Every file below the folder, by its path in it."""
    return {str(path.relative_to(folder)): path.read_bytes() for path in folder.rglob("*") if path.is_file()}


def codes_and_scales(model: nn.Module) -> dict[str, tuple[Tensor, Tensor]]:
    names = getattr(model.config, CONFIG_KEY)["converted"]  # type: ignore[union-attr, arg-type]
    return {name: ternarize(model.get_submodule(name).weight.detach()) for name in names}  # type: ignore[arg-type]


def edit(folder: Path, change: Callable[[dict[str, Tensor]], Any]) -> Path:
    tensors = load_file(folder / SINGLE)
    change(tensors)
    save_file(tensors, folder / SINGLE, {"format": "pt"})
    return folder


def edit_config(folder: Path, change: Callable[[dict[str, Any]], Any]) -> Path:
    config = read_json(folder / "config.json")
    change(config)
    write_json(folder / "config.json", config)
    return folder


def by_hand(folder: Path, matrices: dict[str, Tensor], **config: Any) -> Path:
    """A checkpoint of nothing but these ternary layers, for shapes that no model has."""
    folder.mkdir(parents=True)
    save_file({f"{name}.weight": tensor for name, tensor in matrices.items()}, folder / SINGLE)
    entry = {"definition": 1, "converted": list(matrices), "dense": []} | config
    write_json(folder / "config.json", {"model_type": "llama", "dtype": "bfloat16", CONFIG_KEY: entry})
    return folder


def same_files(one: Path, other: Path) -> None:
    """The same weights byte for byte, the same config, the same other files."""
    assert sorted(p.name for p in one.iterdir()) == sorted(p.name for p in other.iterdir())
    for path in one.iterdir():
        if path.name == "config.json":
            assert read_json(path) == read_json(other / path.name)
        else:
            assert path.read_bytes() == (other / path.name).read_bytes(), path.name
