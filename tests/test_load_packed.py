"""A packed folder in transformers with 2-bit layers: the trained model's bits, in float32 and in bfloat16."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file
from torch import Tensor, nn
from transformers import AutoModelForCausalLM

from axolotl_bitnet import convert_to_bitlinear, load_packed, pack_checkpoint
from axolotl_bitnet.layers.bitlinear import BitLinear
from axolotl_bitnet.serving.packed_linear import PackedLinear
from axolotl_bitnet.storage.atomic import CheckpointError, read_json, write_json
from axolotl_bitnet.storage.safetensors_stream import SINGLE
from support.llamas import VARIANTS, build, save
from support.stored import trained

IDS = (torch.arange(60) * 37 % 500 + 3).reshape(2, 30)
MODELS = ["llama", "tied", "biases", "llama3 rope", "no multiple of 256", "qwen2", "qwen3"]


def packed(model: nn.Module, folder: Path) -> Path:
    pack_checkpoint(save(model, folder / "latents"), folder / "packed")
    return folder / "packed"


def logits(model: Any, ids: Tensor = IDS) -> Tensor:
    with torch.no_grad():
        return model(ids, use_cache=False).logits


@pytest.mark.parametrize("variant", MODELS)
def test_bfloat16_logits_are_those_of_the_trained_model_cast(tmp_path: Path, variant: str) -> None:
    family, options = VARIANTS[variant]
    folder = packed(build(family, **options), tmp_path)
    cast = AutoModelForCausalLM.from_pretrained(tmp_path / "latents", dtype=torch.bfloat16).eval()
    names = convert_to_bitlinear(cast)
    model = load_packed(folder)
    assert model.dtype == torch.bfloat16
    assert [n for n, m in model.named_modules() if isinstance(m, PackedLinear)] == list(names)
    assert torch.equal(logits(model), logits(cast))


@pytest.mark.parametrize("variant", MODELS)
def test_float32_logits_are_those_of_transformers_own_layers(tmp_path: Path, variant: str) -> None:
    """Which are the trained model's (tests/test_packed.py)."""
    family, options = VARIANTS[variant]
    folder = packed(build(family, **options), tmp_path)
    with torch.compiler.set_stance("force_eager"):
        plain = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32).eval()
        assert torch.equal(logits(load_packed(folder, dtype=torch.float32)), logits(plain))


def test_a_layer_is_bitlinear_in_every_dtype(tmp_path: Path) -> None:
    model = build(attention_bias=True)
    folder = packed(model, tmp_path)
    for dtype in (torch.float32, torch.bfloat16, torch.float16):
        ours = load_packed(folder, dtype=dtype)
        for name in ("model.layers.0.self_attn.q_proj", "model.layers.1.mlp.down_proj"):
            layer, theirs = ours.get_submodule(name), model.get_submodule(name)
            assert isinstance(theirs, BitLinear)
            x = torch.randn(3, 2, layer.in_features).to(dtype)
            bias = None if theirs.bias is None else theirs.bias.to(torch.bfloat16)
            with torch.no_grad():
                assert torch.equal(layer(x), _with_bias(theirs, bias)(x))


def _with_bias(layer: BitLinear, bias: Tensor | None) -> BitLinear:
    made = BitLinear(layer.in_features, layer.out_features, bias=bias is not None)
    made.weight.data = layer.weight.data
    if bias is not None:
        made.bias.data = bias  # as it is stored
    return made


def test_layers_left_dense_stay_dense(tiny_model: Any, tmp_path: Path) -> None:
    trained(tiny_model, "partly dense").save_pretrained(tmp_path / "latents")
    folder = pack_checkpoint(tmp_path / "latents", tmp_path / "packed")
    found = load_packed(folder)
    assert type(found.get_submodule("model.layers.0.self_attn.q_proj")) is nn.Linear
    assert type(found.get_submodule("model.layers.1.self_attn.q_proj")) is PackedLinear


def test_microsoft_s_scale_multiplies(tmp_path: Path) -> None:
    folder = packed(build(), tmp_path)
    expected = logits(load_packed(folder, dtype=torch.float32))
    tensors = load_file(folder / SINGLE)
    for key in [key for key in tensors if key.endswith("weight_scale")]:
        tensors[key] = tensors[key].float().reciprocal()  # float32, so that it comes back nearly whole
    save_file(tensors, folder / SINGLE, {"format": "pt"})
    config = read_json(folder / "config.json")
    config["quantization_config"]["linear_class"] = "autobitlinear"
    write_json(folder / "config.json", config)
    found = logits(load_packed(folder, dtype=torch.float32))
    assert float((found - expected).norm() / expected.norm()) < 1e-4
    config["quantization_config"]["linear_class"] = "bitlinear"
    write_json(folder / "config.json", config)
    assert float((logits(load_packed(folder, dtype=torch.float32)) - expected).norm() / expected.norm()) > 0.1


def test_generate_with_a_cache(tmp_path: Path) -> None:
    model = build()
    found = load_packed(packed(model, tmp_path), dtype=torch.float32)
    tokens = found.generate(IDS[:1], max_new_tokens=8, do_sample=False)
    for length in range(30, 38):
        assert int(logits(found, tokens[:, :length])[0, -1].argmax()) == int(tokens[0, length])


def test_what_is_refused(tmp_path: Path) -> None:
    folder = packed(build(), tmp_path)
    with pytest.raises(CheckpointError, match="no quantization_config: it is not a packed model's"):
        load_packed(tmp_path / "latents")
    tensors = load_file(folder / SINGLE)
    tensors["model.layers.1.mlp.up_proj.weight_scale"].fill_(float("nan"))
    save_file(tensors, folder / SINGLE, {"format": "pt"})
    with pytest.raises(ValueError, match=r"model\.layers\.1\.mlp\.up_proj' has the weight_scale \[nan\]"):
        load_packed(folder)
    config = read_json(folder / "config.json")
    config["quantization_config"]["use_rms_norm"] = True
    write_json(folder / "config.json", config)
    with pytest.raises(CheckpointError, match="use_rms_norm"):
        load_packed(folder)
