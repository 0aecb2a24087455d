"""The MLX export: its bytes, and what mlx and mlx-lm make of it and of the packed folder, on a CPU."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from safetensors.torch import load_file
from torch import Tensor

from axolotl_bitnet.formats.export import export_mlx, open_checkpoint, pack_checkpoint, revert_checkpoint
from axolotl_bitnet.formats.mlx import MLXCheckpoint, group_size, pack_words, unpack_words
from axolotl_bitnet.model.entry import CONFIG_KEY
from axolotl_bitnet.model.fingerprint import fingerprint_model
from axolotl_bitnet.storage.atomic import CheckpointError, read_json
from axolotl_bitnet.storage.safetensors_stream import SINGLE
from support.stored import IDS, Build, by_hand, codes_and_scales, edit, edit_config, same_files, save, trained

UP = "model.layers.1.mlp.up_proj"


def random_codes(rows: int, columns: int) -> Tensor:
    return torch.randint(-1, 2, (rows, columns), dtype=torch.int8)


# Bytes


@pytest.mark.parametrize("shape", [(1, 16), (3, 32), (7, 96), (130, 640)])
def test_words_are_the_layout(shape: tuple[int, int]) -> None:
    codes = random_codes(*shape)
    before = codes.clone()
    words = pack_words(codes)
    q = (codes.numpy().astype(np.int64) + 1).reshape(shape[0], -1, 16)
    expected = (q << (2 * np.arange(16))).sum(axis=-1)
    assert words.dtype == torch.uint32 and words.tolist() == expected.tolist()
    assert torch.equal(unpack_words(words), codes) and torch.equal(codes, before)


@pytest.mark.parametrize("columns", [1, 15, 17, 40])
def test_columns_that_do_not_fill_words(columns: int) -> None:
    with pytest.raises(ValueError, match=f"{columns} columns are not a multiple of 16"):
        pack_words(random_codes(4, columns))


def test_group_sizes() -> None:
    found = {columns: group_size(columns) for columns in (32, 64, 96, 128, 160, 192, 2048, 9216, 16, 48, 33)}
    assert found == {
        32: 32, 64: 64, 96: 32, 128: 128, 160: 32, 192: 64, 2048: 128, 9216: 128, 16: None, 48: None, 33: None
    }  # fmt: skip


def test_files(tiny_model: Build, tmp_path: Path) -> None:
    model = trained(tiny_model, "tied with biases")  # with an intermediate size of 100: no groups
    latents = save(model, tmp_path / "latents")
    mlx = export_mlx(latents, tmp_path / "mlx")
    tensors, dense = load_file(mlx / SINGLE), load_file(revert_checkpoint(mlx, tmp_path / "dense") / SINGLE)
    expected = codes_and_scales(model)
    for name, (codes, s) in expected.items():
        d = s.float().reciprocal().to(torch.bfloat16)
        if name.endswith("down_proj"):
            assert torch.equal(tensors[f"{name}.weight"], codes.to(torch.bfloat16) * d)
            assert f"{name}.scales" not in tensors
            continue
        assert torch.equal(tensors[f"{name}.weight"], pack_words(codes))
        for part, value in (("scales", d), ("biases", -d)):
            found = tensors[f"{name}.{part}"]
            assert found.shape == (codes.shape[0], 1) and found.dtype == torch.bfloat16
            assert bool((found == value).all())
    rest = {key for key in dense if key.removesuffix(".weight") not in expected}
    assert rest and all(torch.equal(tensors[key], dense[key]) for key in rest)
    config = read_json(mlx / "config.json")
    assert config["quantization"] == {"group_size": 64, "bits": 2, "mode": "affine"}
    assert "quantization_config" not in config and config["dtype"] == "bfloat16"
    assert config["rope_theta"] == config["rope_parameters"]["rope_theta"]
    assert config[CONFIG_KEY] == getattr(model.config, CONFIG_KEY)
    assert (mlx / "tokenizer.json").read_text() == "this is tokenizer.json"

    found = open_checkpoint(mlx)
    assert isinstance(found, MLXCheckpoint) and found.fingerprint() == fingerprint_model(model)
    assert {key: entry.shape for key, entry in found.entries.items()} == {
        key: tuple(tensor.shape) for key, tensor in load_file(latents / SINGLE).items()
    }
    same_files(pack_checkpoint(mlx, tmp_path / "packed"), pack_checkpoint(latents, tmp_path / "direct"))
    same_files(export_mlx(tmp_path / "packed", tmp_path / "mlx again"), mlx)


def test_size(tmp_path: Path) -> None:
    latents = by_hand(tmp_path / "latents", {"wide": torch.randn(256, 1024)})
    mlx = export_mlx(latents, tmp_path / "mlx")
    assert (mlx / SINGLE).stat().st_size < 256 * 1024 * 2.25 / 8 + 1000
    assert read_json(mlx / "config.json")["quantization"]["group_size"] == 128


def test_layers_of_other_groups_are_named(tmp_path: Path) -> None:
    matrices = {f"l{i}": torch.randn(8, columns) for i, columns in enumerate([64, 192, 96, 256, 40])}
    mlx = export_mlx(by_hand(tmp_path / "latents", matrices), tmp_path / "mlx")
    assert read_json(mlx / "config.json")["quantization"] == {
        "group_size": 64,
        "bits": 2,
        "mode": "affine",
        "l2": {"group_size": 32, "bits": 2},
        "l3": {"group_size": 128, "bits": 2},
    }
    assert MLXCheckpoint(mlx).fingerprint() == open_checkpoint(tmp_path / "latents").fingerprint()


# Refused


def refused(source: Path, tmp_path: Path, message: str) -> None:
    before = sorted(path.name for path in tmp_path.iterdir())
    with pytest.raises(CheckpointError, match=message):
        export_mlx(source, tmp_path / "mlx")
    assert sorted(path.name for path in tmp_path.iterdir()) == before


def test_refused(tiny_model: Build, tmp_path: Path) -> None:
    narrow = by_hand(tmp_path / "narrow", {"a": torch.randn(4, 40)})
    refused(narrow, tmp_path, "no ternary layer has rows of a multiple of 32")
    bitnet = save(trained(tiny_model, "bitnet"), tmp_path / "bitnet")
    refused(bitnet, tmp_path, "reads the packed layout only: use the packed folder")
    rotten = by_hand(tmp_path / "rotten", {"a": torch.full((4, 64), torch.nan)})
    refused(rotten, tmp_path, r"'a\.weight' holds a NaN")


def one_scale(tensors: dict[str, Tensor]) -> None:
    tensors[f"{UP}.scales"][5] *= 1.25


def one_bias(tensors: dict[str, Tensor]) -> None:
    tensors[f"{UP}.biases"][7] *= 1.25


def no_biases(tensors: dict[str, Tensor]) -> None:
    tensors.pop(f"{UP}.biases")


def no_weight(tensors: dict[str, Tensor]) -> None:
    tensors.pop(f"{UP}.weight")


def bytes_instead(tensors: dict[str, Tensor]) -> None:
    tensors[f"{UP}.weight"] = torch.zeros(128, 16, dtype=torch.uint8)


DAMAGES = [
    (one_scale, "its groups differ in scale"),
    (one_bias, "its groups differ in scale"),
    (no_biases, "lacks scales and biases"),
    (no_weight, "has no matrix"),
    (bytes_instead, r"is torch\.uint8: neither 2-bit nor bfloat16"),
]


@pytest.mark.parametrize(("damage", "message"), DAMAGES, ids=[damage.__name__ for damage, _ in DAMAGES])
def test_damage_is_found(tiny_model: Build, tmp_path: Path, damage: Any, message: str) -> None:
    mlx = export_mlx(save(trained(tiny_model, "llama"), tmp_path / "latents"), tmp_path / "mlx")
    edit(mlx, damage)
    with pytest.raises(CheckpointError, match=message):
        open_checkpoint(mlx).fingerprint()


def test_another_code_is_another_fingerprint(tiny_model: Build, tmp_path: Path) -> None:
    model = trained(tiny_model, "llama")
    mlx = export_mlx(save(model, tmp_path / "latents"), tmp_path / "mlx")

    def change(tensors: dict[str, Tensor]) -> None:
        codes = unpack_words(tensors[f"{UP}.weight"])
        codes[100, 33] = (codes[100, 33] + 2) % 3 - 1
        tensors[f"{UP}.weight"] = pack_words(codes)

    edit(mlx, change)
    found, expected = MLXCheckpoint(mlx).fingerprint().tensors, fingerprint_model(model).tensors
    assert [name for name in expected if found[name] != expected[name]] == [UP]


def test_of_another_origin(tiny_model: Build, tmp_path: Path) -> None:
    mlx = export_mlx(save(trained(tiny_model, "llama"), tmp_path / "latents"), tmp_path / "mlx")
    edit_config(mlx, lambda config: config["quantization"].update(bits=4))
    with pytest.raises(CheckpointError, match="is not that of an MLX model of 2 bits"):
        open_checkpoint(mlx)
    edit_config(mlx, lambda config: (config["quantization"].update(bits=2), config.pop(CONFIG_KEY)))
    with pytest.raises(CheckpointError, match="does not say which layers are ternary"):
        open_checkpoint(mlx)


# In MLX. A process of its own: mlx, like this package's tests, wants one thread and no GPU.

RUN = """
import sys
from pathlib import Path
import numpy as np
import mlx.core as mx
import mlx.nn as nn
mx.set_default_device(mx.cpu)
from mlx_lm.utils import load_model
root = Path(sys.argv[1])
ids = mx.array(np.load(root / "ids.npy"))
results = {}
for family in sorted(path.name for path in root.iterdir() if path.is_dir()):
    model, config = load_model(root / family / "mlx")
    kinds = [name for name, module in model.named_modules() if isinstance(module, nn.QuantizedLinear)]
    results[family + "/quantized"] = np.array(sorted(kinds))
    results[family + "/rope_theta"] = np.array(model.args.rope_theta)
    stored = model.model.layers[1].mlp.up_proj
    weight = mx.dequantize(
        stored.weight, stored.scales, stored.biases, group_size=stored.group_size, bits=stored.bits
    )
    results[family + "/weight"] = np.array(weight.astype(mx.float32))
    results[family + "/bfloat16"] = np.array(model(ids).astype(mx.float32))
    model.set_dtype(mx.float32)
    results[family + "/float32"] = np.array(model(ids))
    packed, _ = load_model(root / family / "packed")
    results[family + "/packed theta"] = np.array(packed.args.rope_theta)
    for name, module in packed.named_modules():
        if type(module).__name__ == "BitLinear":
            assert module.weight_scale.dtype == mx.bfloat16 and module.invert_weight_scales
            results[family + "/packed/" + name] = np.array(module.weight_scale.astype(mx.float32))
    assert not hasattr(packed.model.embed_tokens, "scales")
    assert packed.model.embed_tokens.weight.dtype == mx.bfloat16
np.savez(root / "results.npz", **results)
assert "axolotl_bitnet" not in sys.modules
"""
MLX_FAMILIES = ["llama", "tied with biases", "partly dense", "qwen3"]


@pytest.fixture(scope="module")
def in_mlx(tiny_model: Build, tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, dict[str, Any]]:
    pytest.importorskip("mlx.core", reason="mlx is not installed")
    pytest.importorskip("mlx_lm", reason="mlx-lm is not installed")
    torch.manual_seed(5)
    root = tmp_path_factory.mktemp("mlx")
    np.save(root / "ids.npy", IDS.numpy())
    models = {}
    for family in MLX_FAMILIES:
        models[family] = trained(tiny_model, family)
        latents = save(models[family], tmp_path_factory.mktemp("latents") / "latents")
        edit_config(
            latents, lambda c: c.update(rope_parameters={"rope_theta": 1000042.0, "rope_type": "default"})
        )
        for write, name in ((export_mlx, "mlx"), (pack_checkpoint, "packed"), (revert_checkpoint, "dense")):
            write(latents, root / family / name)
    done = subprocess.run(
        [sys.executable, "-c", RUN, str(root)],
        env={key: value for key, value in os.environ.items() if key != "PYTHONPATH"} | extra_paths(),
        capture_output=True,
        text=True,
        timeout=300,
    )
    assert done.returncode == 0, done.stderr
    with np.load(root / "results.npz") as results:
        return root, dict(results) | {"models": models}


def extra_paths() -> dict[str, str]:
    """Where mlx is, if that is not the interpreter's own folder; never where this package is."""
    import mlx.core

    return {"PYTHONPATH": str(Path(mlx.core.__file__).parents[1]), "HF_HUB_OFFLINE": "1"}


@pytest.mark.once
@pytest.mark.slow
@pytest.mark.parametrize("family", MLX_FAMILIES)
def test_mlx_lm_computes_the_weight_only_model(in_mlx: tuple[Path, dict[str, Any]], family: str) -> None:
    from transformers import AutoModelForCausalLM

    root, results = in_mlx
    codes = codes_and_scales(results["models"][family])
    expected = {name for name in codes if not (family == "tied with biases" and name.endswith("down_proj"))}
    assert set(results[f"{family}/quantized"].tolist()) == expected and len(expected) > 3
    assert results[f"{family}/rope_theta"] == 1000042
    dense = AutoModelForCausalLM.from_pretrained(root / family / "dense", dtype=torch.float32).eval()
    weight = dense.get_submodule(UP).weight.detach()
    assert torch.equal(torch.from_numpy(results[f"{family}/weight"]), weight)
    with torch.no_grad():
        logits = dense(IDS).logits
        half = dense.to(torch.bfloat16)(IDS).logits.float()
    found = torch.from_numpy(results[f"{family}/float32"])
    assert float((found - logits).abs().max()) < 4e-6 * float(logits.abs().max())
    assert torch.equal(found.argmax(-1), logits.argmax(-1))
    rounding = float((half - logits).norm() / logits.norm())
    error = float((torch.from_numpy(results[f"{family}/bfloat16"]) - logits).norm() / logits.norm())
    assert error < 1.5 * rounding + 1e-3
    # one code's worth of difference would show
    with torch.no_grad():
        other = dense.float()
        other.get_submodule(UP).weight[99, 33] += weight.abs().max()
        assert float((other(IDS).logits - logits).abs().max()) > 1e-5 * float(logits.abs().max())


@pytest.mark.once
@pytest.mark.slow
@pytest.mark.parametrize("family", MLX_FAMILIES)
def test_mlx_lm_loads_the_packed_folder(in_mlx: tuple[Path, dict[str, Any]], family: str) -> None:
    """Its kernel is Metal's, so a CPU cannot run it; loading finds every tensor, dtype and the rope."""
    _, results = in_mlx
    codes = codes_and_scales(results["models"][family])
    start = f"{family}/packed/"
    found = {key.removeprefix(start): value for key, value in results.items() if key.startswith(start)}
    assert found.keys() == codes.keys()
    for name, (_, s) in codes.items():
        assert found[name].tolist() == s.float().tolist()
    assert results[f"{family}/packed theta"] == 1000042
