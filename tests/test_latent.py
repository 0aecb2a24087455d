"""Latent checkpoints: their names, the codes they stand for, and the files that travel with a model."""

from __future__ import annotations

from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file
from torch import nn

from axolotl_bitnet.formats import checkpoint as source
from axolotl_bitnet.formats import latent
from axolotl_bitnet.formats.companions import copy_companions
from axolotl_bitnet.formats.config_json import read_plan
from axolotl_bitnet.formats.latent import LatentCheckpoint
from axolotl_bitnet.model.convert import convert_to_bitlinear
from axolotl_bitnet.model.entry import CONFIG_KEY
from axolotl_bitnet.model.fingerprint import fingerprint_model
from axolotl_bitnet.model.layer_plan import Plan
from axolotl_bitnet.storage.atomic import CheckpointError, read_json, write_json
from axolotl_bitnet.storage.parallel import row_ranges
from axolotl_bitnet.storage.safetensors_stream import SINGLE
from axolotl_bitnet.ternary import ternarize
from support.marks import slow_but

SKIPPED = ["model.layers.0.self_attn", "model.layers.1.mlp.down_proj"]


@pytest.fixture
def model(tiny_model: Callable[..., nn.Module]) -> nn.Module:
    model = tiny_model("Llama")
    convert_to_bitlinear(model, SKIPPED)
    return model


def saved(model: nn.Module, folder: Path, dtype: torch.dtype = torch.float32, **options: Any) -> Path:
    model.to(dtype).save_pretrained(folder, **options)
    model.to(torch.float32)
    return folder


@pytest.mark.parametrize("options", [{}, {"max_shard_size": "40KB"}], ids=["single", "shards"])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("elements", slow_but(1, [1 << 22, 100]))
def test_codes_scales_and_fingerprint_are_the_model_s(
    model: nn.Module,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    options: dict[str, str],
    dtype: torch.dtype,
    elements: int,
) -> None:
    """From one block of rows or from many, and from either dtype."""
    for module in (latent, source):
        monkeypatch.setattr(module, "row_ranges", partial(row_ranges, elements=elements))
    latents = LatentCheckpoint(saved(model, tmp_path, dtype, **options))
    trained = fingerprint_model(model)
    assert latents.fingerprint() == trained
    assert latents.names.converted == list(trained.tensors)
    for name in latents.names.converted:
        codes, scale = latents.codes(name)
        expected, expected_scale = ternarize(model.get_submodule(name).weight.detach())
        assert codes.dtype == torch.int8 and torch.equal(codes, expected)
        assert scale.dtype == torch.bfloat16 and torch.equal(scale, expected_scale)


def test_fingerprint_sees_one_latent(model: nn.Module, tmp_path: Path) -> None:
    saved(model, tmp_path)
    before = LatentCheckpoint(tmp_path).fingerprint()
    tensors = load_file(tmp_path / SINGLE)
    name = "model.layers.1.mlp.up_proj"
    row, column = int(torch.randint(128, ())), int(torch.randint(64, ()))
    tensors[f"{name}.weight"][row, column] = -tensors[f"{name}.weight"][
        row, column
    ].sign()  # to the other code
    save_file(tensors, tmp_path / SINGLE, {"format": "pt"})
    after = LatentCheckpoint(tmp_path).fingerprint()
    assert {key for key in before.tensors if before.tensors[key] != after.tensors[key]} == {name}


def test_names(model: nn.Module, tmp_path: Path) -> None:
    names = LatentCheckpoint(saved(model, tmp_path)).names
    linear = {name for name, module in model.named_modules() if isinstance(module, nn.Linear)}
    dense = {f"model.layers.0.self_attn.{x}_proj" for x in "qkvo"} | {SKIPPED[1], "lm_head"}
    assert set(names.dense) == dense
    assert set(names.converted) == linear - dense


@pytest.mark.parametrize("entry", [None, {}, [], "yes", {"converted": []}, {"dense": ["lm_head"]}])
def test_names_that_a_config_does_not_say(entry: Any) -> None:
    config = {"model_type": "llama", CONFIG_KEY: {"converted": ["a"]}}
    assert read_plan(config, "here") == Plan(["a"], [])
    config |= {CONFIG_KEY: entry}
    with pytest.raises(CheckpointError, match=r"here does not say which layers.*convert_to_bitlinear"):
        read_plan(config, "here")


def edit_tensors(folder: Path, edit: Callable[[dict[str, torch.Tensor]], Any]) -> None:
    tensors = load_file(folder / SINGLE)
    edit(tensors)
    save_file(tensors, folder / SINGLE, {"format": "pt"})


LAYER = "model.layers.1.self_attn.q_proj.weight"


@pytest.mark.parametrize(
    ("edit", "message"),
    [
        (lambda t: t.pop(LAYER), f"has no '{LAYER}', which its config lists"),
        (lambda t: t.update({LAYER: t[LAYER].to(torch.int8)}), r"is torch\.int8 \[64, 64\], not latents"),
        (lambda t: t.update({LAYER: t[LAYER].flatten()}), r"is torch\.float32 \[4096\], not latents"),
    ],
    ids=["missing", "int8", "flat"],
)
def test_refuses_what_are_no_latents(
    model: nn.Module, tmp_path: Path, edit: Callable[[dict[str, torch.Tensor]], Any], message: str
) -> None:
    LatentCheckpoint(saved(model, tmp_path))
    edit_tensors(tmp_path, edit)
    with pytest.raises(CheckpointError, match=message):
        LatentCheckpoint(tmp_path)


def test_refuses_a_dense_model(tiny_model: Callable[..., nn.Module], tmp_path: Path) -> None:
    tiny_model("Llama").save_pretrained(tmp_path)
    with pytest.raises(CheckpointError, match="not trained by axolotl-bitnet"):
        LatentCheckpoint(tmp_path)
    (tmp_path / "config.json").unlink()
    with pytest.raises(CheckpointError, match=r"config\.json does not exist"):
        LatentCheckpoint(tmp_path)


@pytest.mark.parametrize("value", [torch.nan, torch.inf, -torch.inf])
def test_nan_in_latents_shows_in_the_scale(model: nn.Module, tmp_path: Path, value: float) -> None:
    saved(model, tmp_path)
    edit_tensors(tmp_path, lambda tensors: tensors[LAYER][5].fill_(value))
    latents = LatentCheckpoint(tmp_path)
    _, scale = latents.codes(LAYER.removesuffix(".weight"))
    assert scale.isnan().all()
    _, scale = latents.codes("model.layers.1.self_attn.k_proj")
    assert scale.isfinite().all()


def test_config_key_survives_saving_and_loading(model: nn.Module, tmp_path: Path) -> None:
    """The list comes back with the model, so that a second run's checkpoint has it too."""
    saved(model, tmp_path / "a")
    again = type(model).from_pretrained(tmp_path / "a")
    again.save_pretrained(tmp_path / "b")
    entries = [read_json(tmp_path / name / "config.json")[CONFIG_KEY] for name in "ab"]
    assert entries[0] == entries[1] and entries[0]["converted"]
    assert LatentCheckpoint(tmp_path / "b").fingerprint() == fingerprint_model(model)


KEPT = [
    "added_tokens.json",
    "chat_template.jinja",
    "generation_config.json",
    "merges.txt",
    "preprocessor_config.json",
    "special_tokens_map.json",
    "spiece.model",
    "tokenizer.json",
    "tokenizer.model",
    "tokenizer_config.json",
    "vocab.json",
    "vocab.txt",
]
LEFT = [
    "README.md",
    "bitnet.json",
    "config.json",
    "debug.log",
    "optimizer.pt",
    "rng_state.pth",
    "training_args.bin",
]
LEFT += ["trainer_state.json", "model.safetensors", "model.safetensors.index.json", "scheduler.pt"]


def test_companions(tmp_path: Path) -> None:
    source, target = tmp_path / "a", tmp_path / "b"
    source.mkdir()
    target.mkdir()
    for name in KEPT + LEFT:
        (source / name).write_text(f"{name} of a")
    (source / "tokenizer_folder").mkdir()
    assert copy_companions(source, target, {}) == KEPT
    assert sorted(path.name for path in target.iterdir()) == KEPT
    assert all((target / name).read_text() == f"{name} of a" for name in KEPT)
    write_json(source / "tokenizer.json", {"new": 1})
    copy_companions(source, target, {})
    assert read_json(target / "tokenizer.json") == {"new": 1}
