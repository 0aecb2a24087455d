"""What a stored model is said to be: ours, others', and what is none."""

from __future__ import annotations

import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file
from torch import nn

from axolotl_bitnet.formats.registry import FORMATS
from axolotl_bitnet.model.entry import CONFIG_KEY
from axolotl_bitnet.model.fingerprint import Fingerprint
from axolotl_bitnet.run_folder import RUN_FILE
from axolotl_bitnet.storage.atomic import CheckpointError, read_json, write_json
from axolotl_bitnet.storage.safetensors_stream import SINGLE
from axolotl_bitnet.verify.inspect import inspect
from support.zoo import HAS_GGUF, Q, edit_tensors, make_run


@pytest.fixture(scope="module")
def run(tiny_model: Callable[..., nn.Module], tmp_path_factory: pytest.TempPathFactory) -> Path:
    return make_run(tiny_model, tmp_path_factory.mktemp("run"))


@pytest.fixture
def trained(run: Path) -> Fingerprint:
    return Fingerprint.from_json(read_json(run / RUN_FILE)["fingerprint"])


def stripped(source: Path, target: Path, **config: Any) -> Path:
    """A copy as others would have saved it: no list of ours, no tokenizer."""
    target.mkdir()
    shutil.copy(source / SINGLE, target)
    kept = {key: value for key, value in read_json(source / "config.json").items() if key != CONFIG_KEY}
    write_json(target / "config.json", kept | config)
    return target


EXPECTED = {
    "latents": ("latents", "trained by axolotl-bitnet", 32.0),
    "packed": ("packed", "divides by weight_scale, by axolotl-bitnet", 2.0),
    "gguf-tq2_0": ("GGUF", "TQ2_0, by axolotl-bitnet", 2.0625),
    "gguf-tq1_0": ("GGUF", "TQ1_0, by axolotl-bitnet", 1.6875),
    "gguf-q2_0": ("GGUF", "Q2_0, by axolotl-bitnet", 2.25),
    "dense": ("dense ternary", "layers by its config", 16.0),
    "mlx": ("mlx", "MLX", 2.25),
}


@pytest.mark.parametrize("name", EXPECTED)
def test_our_own(run: Path, trained: Fingerprint, name: str) -> None:
    if name.startswith("gguf") and not HAS_GGUF:
        pytest.skip("needs the gguf package")
    kind, detail, bits = EXPECTED[name]
    found = inspect(run if name == "latents" else run / FORMATS[name].path)
    assert found.kind == kind and detail in found.detail and found.unplaced == []
    assert {layer.name: (layer.shape, layer.scale) for layer in found.layers} == {
        layer: (entry.shape, entry.scale) for layer, entry in trained.tensors.items()
    }
    for layer in found.layers:
        rows, columns = layer.shape
        assert layer.zeros == pytest.approx(trained.tensors[layer.name].zeros / (rows * columns))
        assert layer.bits == pytest.approx(bits, rel=0.02)
    packed = sum(tensor.nbytes for tensor in load_file(run / "packed" / SINGLE).values())
    assert found.packed_bytes == packed
    trainable = name in ("latents", "dense")
    assert bool(found.refused) != trainable and all("restore" in line for line in found.refused)
    assert (
        found.to_json()["weights"] == found.weights == sum(a * b for a, b in [x.shape for x in found.layers])
    )


def test_a_model_that_was_never_ternary(run: Path, tmp_path: Path) -> None:
    found = inspect(stripped(run, tmp_path / "plain"))
    assert found.kind == "never ternary" and "51%" in found.detail and "by its architecture" in found.detail
    assert len(found.layers) == 7 and found.refused == []


def test_others_latents(run: Path, tmp_path: Path) -> None:
    """What quantization hardly moves looks trained to be quantized."""
    folder = stripped(run, tmp_path / "latents")

    def trained(tensors: dict[str, torch.Tensor]) -> None:
        for key, tensor in tensors.items():
            if key.endswith("_proj.weight"):
                tensors[key] = tensor.sign() * 0.02 * (1 + 0.1 * torch.rand_like(tensor))

    edit_tensors(folder, trained)
    found = inspect(folder)
    assert found.kind == "latents" and "by its matrices" in found.detail


def test_others_dense_ternary(run: Path, trained: Fingerprint, tmp_path: Path) -> None:
    found = inspect(stripped(run / "dense", tmp_path / "dense"))
    assert found.kind == "dense ternary" and "by its architecture" in found.detail
    assert {layer.name: layer.scale for layer in found.layers} == {
        name: entry.scale for name, entry in trained.tensors.items()
    }


@pytest.mark.parametrize("convention", ["bitlinear", "autobitlinear", None])
def test_others_packed(run: Path, trained: Fingerprint, tmp_path: Path, convention: str | None) -> None:
    method = {"quant_method": "bitnet"} | ({"linear_class": convention} if convention else {})
    folder = stripped(run / "packed", tmp_path / "packed", quantization_config=method)
    if convention == "autobitlinear":

        def invert(tensors: dict[str, torch.Tensor]) -> None:
            for key in [key for key in tensors if key.endswith("_scale")]:
                tensors[key] = 1 / tensors[key]

        edit_tensors(folder, invert)
    found = inspect(folder)
    multiplies = convention == "autobitlinear"
    assert found.kind == "packed" and ("multiplies" in found.detail) == multiplies
    assert "by axolotl-bitnet" not in found.detail
    for layer in found.layers:
        assert layer.scale == pytest.approx(trained.tensors[layer.name].scale, rel=0.01)


def test_what_would_be_refused(run: Path, tmp_path: Path) -> None:
    for name, config, words in (
        ("gptq", {"quantization_config": {"quant_method": "gptq"}}, "quantized already (gptq)"),
        ("bypass", {"model_type": "mixtral", "num_local_experts": 2}, "cannot be made ternary"),
    ):
        found = inspect(stripped(run, tmp_path / name, **config))
        assert any(words in line for line in found.refused), found.refused

    def damage(tensors: dict[str, torch.Tensor]) -> None:
        tensors[f"{Q}.weight"][3, 5] = torch.nan

    broken = stripped(run, tmp_path / "nan")
    edit_tensors(broken, damage)
    assert any(f"NaN or Inf in {Q}" in line for line in inspect(broken).refused)

    odd = stripped(run, tmp_path / "odd", model_type="nobody_knows")
    tensors = {"layer.proj.weight": torch.randn(6, 8), "lm_head.weight": torch.randn(8, 8)}
    save_file(tensors, odd / SINGLE, {"format": "pt"})
    found = inspect(odd)
    assert [layer.name for layer in found.layers] == ["layer.proj"]  # by the names of the tensors
    assert any("layer.proj has 6 rows" in line for line in found.refused)


def test_code_that_comes_with_a_model_is_never_run(run: Path, tmp_path: Path) -> None:
    folder = stripped(
        run,
        tmp_path / "custom",
        model_type="custom",
        auto_map={"AutoConfig": "evil.Config", "AutoModelForCausalLM": "evil.Model"},
    )
    (folder / "evil.py").write_text(f"open({str(tmp_path / 'ran')!r}, 'w')")
    found = inspect(folder)
    assert any("without its own code" in line for line in found.refused) and found.layers
    assert not (tmp_path / "ran").exists()


def test_what_is_no_model(run: Path, tmp_path: Path) -> None:
    with pytest.raises(CheckpointError, match=r"config\.json does not exist"):
        inspect(tmp_path)
    folder = stripped(run, tmp_path / "pickle")
    (folder / SINGLE).rename(folder / "pytorch_model.bin")
    with pytest.raises(CheckpointError, match="pickle and not read"):
        inspect(folder)
    foreign = stripped(run / "packed", tmp_path / "uint8", quantization_config={"quant_method": "gptq"})
    with pytest.raises(CheckpointError, match="'gptq', which is not BitNet's"):
        inspect(foreign)


def test_matrices_of_zeros_are_named_and_not_counted(run: Path, tmp_path: Path) -> None:
    """A base with some is what its other matrices are."""
    latents = stripped(run, tmp_path / "latents")
    before = inspect(latents)
    edit_tensors(latents, lambda tensors: tensors[f"{Q}.weight"].zero_())
    found = inspect(latents)
    assert found.kind == before.kind and f"all zero: {Q}" in found.detail
    changes = [layer.change for layer in found.layers if layer.name != Q]
    assert f"{sum(changes) / len(changes):.0%} on average" in found.detail
