"""Latents from every stored ternary model there is, ours and others': the same codes and scales; and they
train."""

from __future__ import annotations

import logging
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file
from torch import Tensor, nn

import axolotl_bitnet
from axolotl_bitnet.formats.dense import DenseCheckpoint
from axolotl_bitnet.formats.export import export_mlx, open_checkpoint, pack_checkpoint, revert_checkpoint
from axolotl_bitnet.formats.latent import LatentCheckpoint
from axolotl_bitnet.formats.restore import restore_latents
from axolotl_bitnet.formats.third_party import ThirdPartyPackedCheckpoint
from axolotl_bitnet.model.convert import convert_to_bitlinear
from axolotl_bitnet.model.entry import CONFIG_KEY
from axolotl_bitnet.model.preflight import preflight
from axolotl_bitnet.ops import pack_codes
from axolotl_bitnet.storage.atomic import CheckpointError, read_json
from axolotl_bitnet.storage.safetensors_stream import SINGLE
from axolotl_bitnet.ternary import dequantize, scale_of, ternarize
from support import TINY
from support.marks import slow_but
from support.stored import IDS, Build, by_hand, codes_and_scales, edit, edit_config, save, trained


def others_packed(
    model: nn.Module, folder: Path, scale: Callable[[Tensor], Tensor], **quantization: Any
) -> Path:
    """What another program packs: no list of ours, weights of bf16 arithmetic, its own scale."""
    save(model, folder, "float32")
    names = getattr(model.config, CONFIG_KEY)["converted"]  # type: ignore[union-attr, arg-type]

    def change(tensors: dict[str, Tensor]) -> None:
        for name in names:
            mean = tensors[f"{name}.weight"].to(torch.bfloat16).abs().mean().clamp(min=1e-5)
            codes = (tensors[f"{name}.weight"].to(torch.bfloat16) * (1 / mean)).round().clamp(-1, 1)
            tensors[f"{name}.weight"] = pack_codes(codes.to(torch.int8))
            tensors[f"{name}.weight_scale"] = scale(mean).clone().reshape(1)
        for key, tensor in tensors.items():
            if tensor.dtype == torch.float32 and not key.endswith("_scale"):
                tensors[key] = tensor.to(torch.bfloat16)

    edit(folder, change)

    def rewrite(config: dict[str, Any]) -> None:
        config.pop(CONFIG_KEY)
        config["dtype"] = "bfloat16"
        config["quantization_config"] = {"quant_method": "bitnet"} | quantization

    return edit_config(folder, rewrite)


def onebitllms(model: nn.Module, folder: Path) -> Path:
    """As onebitllms 0.0.4's quantize_to_1bit leaves it."""
    others_packed(model, folder, lambda mean: 1 / mean, modules_to_not_convert=["lm_head"])
    return edit_config(folder, lambda config: config.update(is_bitnet_config=True, pretraining_tp=1))


def microsoft(model: nn.Module, folder: Path) -> Path:
    """As microsoft/bitnet-b1.58-2B-4T is: a scale that multiplies."""
    return others_packed(
        model, folder, lambda mean: mean, linear_class="autobitlinear", quantization_mode="offline"
    )


def microsoft_without_a_class(model: nn.Module, folder: Path) -> Path:
    others_packed(model, folder, lambda mean: mean)
    return edit_config(
        folder, lambda c: c.update(auto_map={"AutoConfig": "configuration_bitnet.BitNetConfig"})
    )


def float32_scales(model: nn.Module, folder: Path) -> Path:
    """A bitlinear whose scales are float32, and happen to be those of the definition."""
    return others_packed(
        model, folder, lambda mean: scale_of(mean).float().reshape(()), linear_class="bitlinear"
    )


def prequantized(model: nn.Module, folder: Path) -> Path:
    """Dense weights of one magnitude, and not a word in the config."""
    save(model, folder, "float32")

    def change(tensors: dict[str, Tensor]) -> None:
        for name, (codes, s) in codes_and_scales(model).items():
            tensors[f"{name}.weight"] = dequantize(codes, s)
        for key in tensors:
            tensors[key] = tensors[key].to(torch.bfloat16)

    edit(folder, change)
    return edit_config(folder, lambda config: (config.pop(CONFIG_KEY), config.update(dtype="bfloat16")))


def ours(write: Callable[..., Path]) -> Callable[[nn.Module, Path], Path]:
    return lambda model, folder: write(save(model, folder.with_name("trained")), folder)


SOURCES: dict[str, tuple[str, Callable[[nn.Module, Path], Path]]] = {
    "ours": ("llama", ours(pack_checkpoint)),
    "ours with biases": ("tied with biases", ours(pack_checkpoint)),
    "ours partly dense": ("partly dense", ours(pack_checkpoint)),
    "dense": ("qwen3", ours(revert_checkpoint)),
    "mlx": ("tied with biases", ours(export_mlx)),
    "onebitllms": ("llama", onebitllms),
    "onebitllms partly dense": ("partly dense", onebitllms),
    "transformers float32 scales": ("qwen3", float32_scales),
    "microsoft": ("bitnet", microsoft),
    "microsoft without a class": ("bitnet", microsoft_without_a_class),
    "prequantized": ("llama", prequantized),
    "prequantized partly": ("partly dense", prequantized),
}


def stored_codes(folder: Path, model: nn.Module) -> dict[str, tuple[Tensor, Tensor]]:
    """Codes and what they are divided by, read from the file without this package's readers."""
    tensors, found = load_file(folder / SINGLE), {}
    quantization = read_json(folder / "config.json").get("quantization_config", {})
    multiplies = quantization.get("linear_class") == "autobitlinear" or "auto_map" in read_json(
        folder / "config.json"
    )
    for name, (codes, s) in codes_and_scales(model).items():
        weight = tensors[f"{name}.weight"]
        if weight.dtype != torch.uint8:
            found[name] = (codes, s)
            continue
        quarters = [(weight >> shift & 3).to(torch.int8) - 1 for shift in (0, 2, 4, 6)]
        scale = tensors[f"{name}.weight_scale"].float().reshape(1)
        found[name] = (torch.cat(quarters), (1 / scale if multiplies else scale).to(torch.bfloat16))
    return found


@pytest.mark.parametrize("case", SOURCES)
def test_codes_and_scales_are_the_stored_ones(tiny_model: Build, tmp_path: Path, case: str) -> None:
    family, write = SOURCES[case]
    model = trained(tiny_model, family)
    source = write(model, tmp_path / "source")
    restored = restore_latents(source, tmp_path / "restored")
    assert restored == tmp_path / "restored"
    assert (restored / "tokenizer.json").read_text() == "this is tokenizer.json"
    tensors = load_file(restored / SINGLE)
    expected = stored_codes(source, model)
    for name, (codes, s) in expected.items():
        back, scale = ternarize(tensors[f"{name}.weight"])
        assert torch.equal(back, codes) and torch.equal(scale, s), name

    found = open_checkpoint(restored)
    assert isinstance(found, LatentCheckpoint)
    assert found.names.converted == list(expected)
    assert set(found.names.dense) == set(getattr(model.config, CONFIG_KEY)["dense"])
    config = read_json(restored / "config.json")
    assert config["dtype"] == "bfloat16" and not config.keys() & {"quantization_config", "auto_map"}
    for name, parameter in model.named_parameters():  # the rest, untouched
        if name.removesuffix(".weight") not in expected:
            assert torch.equal(tensors[name], parameter.detach().to(torch.bfloat16)), name

    # packed again: the same bytes as the source's, whose layout it has
    packed = load_file(pack_checkpoint(restored, tmp_path / "packed") / SINGLE)
    if read_json(source / "config.json").get("quantization_config") and "float32" not in case:
        stored = load_file(source / SINGLE)
        assert stored.keys() == packed.keys()
        for key, tensor in stored.items():
            if "microsoft" in case and key.endswith("_scale"):
                tensor = scale_of(tensor)
            assert tensor.dtype == packed[key].dtype and torch.equal(tensor, packed[key]), key
    else:
        direct = load_file(pack_checkpoint(save(model, tmp_path / "latents"), tmp_path / "direct") / SINGLE)
        assert direct.keys() == packed.keys()
        for key, tensor in direct.items():
            if case != "transformers float32 scales":  # whose codes are of bf16 arithmetic
                assert torch.equal(tensor, packed[key]), key


@pytest.mark.parametrize("case", slow_but(1, ["ours", "onebitllms", "microsoft", "prequantized"]))
def test_it_computes_what_the_source_does_and_trains(tiny_model: Build, tmp_path: Path, case: str) -> None:
    from transformers import AutoModelForCausalLM

    family, write = SOURCES[case]
    source = write(trained(tiny_model, family), tmp_path / "source")
    restored = restore_latents(source, tmp_path / "restored")
    model = AutoModelForCausalLM.from_pretrained(restored, dtype=torch.float32)
    names = convert_to_bitlinear(model)
    found = preflight(model, names)
    assert (found.rescaled, found.shrunk, found.zero, found.broken) == ([], [], [], [])

    with torch.compiler.set_stance("force_eager"), torch.no_grad():
        logits = model(IDS).logits
        theirs = AutoModelForCausalLM.from_pretrained(source, dtype=torch.float32)(IDS).logits
        error = float((logits - theirs).norm() / theirs.norm())
    # Microsoft's multiplies by g, of which s = bf16(1 / g) is not quite the inverse, and a prequantized model
    # does not quantize activations. The others are the same to the bit.
    assert 0 < error < 0.05 if case in ("microsoft", "prequantized") else error == 0

    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-2)
    losses = []
    for _ in range(3):
        loss = model(IDS, labels=IDS).loss
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        losses.append(loss.item())
    assert losses[2] < losses[0]
    before = codes_and_scales(AutoModelForCausalLM.from_pretrained(restored))
    assert any(not torch.equal(codes, before[n][0]) for n, (codes, _) in codes_and_scales(model).items())


@pytest.mark.parametrize("density", slow_but(1, [0.3, 0.02, 1.0]))
def test_odd_shapes_and_every_mantissa(tmp_path: Path, density: float) -> None:
    tensors, expected = {}, {}
    for index in range(128):
        rows, columns = [(4, 97), (12, 5), (64, 33), (132, 64)][index % 4]
        codes = torch.randint(0, 2, (rows, columns), dtype=torch.int8) * 2 - 1
        codes *= torch.rand(rows, columns) < density
        codes[0, :2] = torch.tensor([1, -1])
        s = scale_of(torch.tensor((1 + index / 128) * 2.0 ** -(index % 15)))
        tensors[f"l{index}.weight"] = pack_codes(codes)
        tensors[f"l{index}.weight_scale"] = s
        expected[f"l{index}"] = (codes, s)
    source = by_hand(tmp_path / "source", {})
    edit_config(
        source,
        lambda c: (
            c[CONFIG_KEY].update(converted=list(expected)),
            c.update(quantization_config={"quant_method": "bitnet", "linear_class": "bitlinear"}),
        ),
    )
    save_file(tensors, source / SINGLE)
    found = LatentCheckpoint(restore_latents(source, tmp_path / "restored"))
    for name, (codes, s) in expected.items():
        for one, other in zip(found.codes(name), (codes, s), strict=True):
            assert torch.equal(one, other), name
    packed = pack_checkpoint(tmp_path / "restored", tmp_path / "packed")
    assert (packed / SINGLE).read_bytes() == (pack_checkpoint(source, tmp_path / "p") / SINGLE).read_bytes()


def test_tensors_of_other_dtypes_are_kept(tiny_model: Build, tmp_path: Path) -> None:
    source = microsoft(trained(tiny_model, "bitnet"), tmp_path / "source")
    norm, embedding = torch.randn(64), torch.randn(128, 64).half()
    edit(source, lambda t: t.update({"model.norm.weight": norm, "model.embed_tokens.weight": embedding}))
    restored = restore_latents(source, tmp_path / "restored")
    tensors = load_file(restored / SINGLE)
    assert torch.equal(tensors["model.norm.weight"], norm)
    assert tensors["model.norm.weight"].dtype == torch.float32
    assert torch.equal(tensors["model.embed_tokens.weight"], embedding)
    assert tensors["model.embed_tokens.weight"].dtype == torch.float16
    assert read_json(restored / "config.json")["dtype"] == "bfloat16"  # as the source's
    edit_config(source, lambda config: (config.pop("dtype"), config.update(torch_dtype="float16")))
    restore_latents(source, restored, overwrite=True)
    config = read_json(restored / "config.json")
    assert config["dtype"] == "float32" and "torch_dtype" not in config


@pytest.mark.parametrize("kind", slow_but(1, ["tq2_0", "tq1_0", "q2_0"]))
def test_from_gguf(tiny_model: Build, tmp_path: Path, kind: str) -> None:
    pytest.importorskip("gguf", reason="gguf is not installed")
    from transformers import AutoTokenizer

    from axolotl_bitnet.formats.export import export_gguf

    tokenizer = AutoTokenizer.from_pretrained(TINY / "model")
    size = -(-len(tokenizer) // 4) * 4
    model = tiny_model("Llama", vocab_size=size, hidden_size=256, intermediate_size=260, head_dim=64)
    convert_to_bitlinear(model)
    latents = save(model, tmp_path / "latents")
    (latents / "chat_template.jinja").unlink()
    tokenizer.save_pretrained(latents)
    (tmp_path / "gguf").mkdir()
    file = export_gguf(latents, tmp_path / "gguf" / "model.gguf", type=kind)
    restored = restore_latents(file, tmp_path / "restored")
    assert LatentCheckpoint(restored).fingerprint() == LatentCheckpoint(latents).fingerprint()
    packed = pack_checkpoint(restored, tmp_path / "packed")
    direct = pack_checkpoint(latents, tmp_path / "direct")
    assert (packed / SINGLE).read_bytes() == (direct / SINGLE).read_bytes()


# Scales that latents cannot carry


def test_the_nearest_scale_is_taken_and_said(
    tiny_model: Build, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    lost = [
        s
        for s in (torch.tensor([32 + step / 4]).to(torch.bfloat16) for step in range(128))
        if not torch.equal(scale_of(s.float().reciprocal()), s)
    ]
    assert lost
    source = others_packed(trained(tiny_model, "llama"), tmp_path / "source", lambda mean: lost[0])
    with caplog.at_level(logging.WARNING):
        restored = restore_latents(source, tmp_path / "restored")
    (record,) = caplog.records
    said = record.getMessage()
    assert "cannot carry the scales of 14 of 14 matrices" in said and "% away" in said
    for codes, s in codes_and_scales_of(restored).values():
        assert codes.any() and 0 < abs(float(s) / float(lost[0]) - 1) < 0.006
    with pytest.raises(CheckpointError, match=r"is not bf16\(1 / bf16\(g\)\).*axolotl-bitnet restore"):
        revert_checkpoint(source, tmp_path / "dense")
    caplog.clear()
    restore_latents(pack_checkpoint(restored, tmp_path / "packed"), tmp_path / "again")
    assert caplog.records == []
    assert (tmp_path / "again" / SINGLE).read_bytes() == (restored / SINGLE).read_bytes()


def codes_and_scales_of(folder: Path) -> dict[str, tuple[Tensor, Tensor]]:
    found = LatentCheckpoint(folder)
    return {name: found.codes(name) for name in found.names.converted}


# What is refused


def remove_scale(folder: Path) -> None:
    edit(folder, lambda tensors: tensors.pop("model.layers.1.mlp.up_proj.weight_scale"))


def code_of_two(folder: Path) -> None:
    def change(tensors: dict[str, Tensor]) -> None:
        tensors["model.layers.1.mlp.up_proj.weight"][3, 3] |= 3

    edit(folder, change)


def all_zero(folder: Path) -> None:
    def change(tensors: dict[str, Tensor]) -> None:
        tensors["model.layers.1.mlp.up_proj.weight"].fill_(0b01010101)

    edit(folder, change)


def nan_scale(folder: Path) -> None:
    def change(tensors: dict[str, Tensor]) -> None:
        tensors["model.layers.1.mlp.up_proj.weight_scale"].fill_(float("nan"))

    edit(folder, change)


def packed_head(folder: Path) -> None:
    def change(tensors: dict[str, Tensor]) -> None:
        tensors["lm_head.weight"] = torch.zeros(32, 64, dtype=torch.uint8)
        tensors["lm_head.weight_scale"] = torch.ones(1)

    edit(folder, change)


def quantization(**entries: Any) -> Callable[[Path], Any]:
    return lambda folder: edit_config(folder, lambda config: config["quantization_config"].update(entries))


REFUSED: dict[str, tuple[Callable[[Path], Any], str]] = {
    "no scale": (remove_scale, r"'model\.layers\.1\.mlp\.up_proj' has no weight_scale"),
    "a code of two": (code_of_two, r"up_proj\.weight' holds codes beside -1, 0 and 1"),
    "zeros": (all_zero, r"up_proj\.weight': all its codes are zero"),
    "nan": (nan_scale, r"up_proj\.weight' holds a NaN or an Inf"),
    "a packed head": (packed_head, "'lm_head' is packed, but is no layer that becomes ternary"),
    "rms norm": (quantization(use_rms_norm=True), "use_rms_norm"),
    "unknown class": (quantization(linear_class="trilinear"), "unknown linear_class 'trilinear'"),
    "online": (quantization(linear_class="autobitlinear", quantization_mode="online"), "not latents"),
    "another method": (quantization(quant_method="gptq"), "not a packed BitNet model's"),
    "unknown architecture": (
        lambda folder: edit_config(folder, lambda config: config.update(model_type="newest")),
        "no architecture 'newest' of its own",
    ),
    "broken config": (
        lambda folder: edit_config(folder, lambda config: config.update(num_attention_heads=0)),
        "cannot build this model",
    ),
}


@pytest.mark.parametrize("case", REFUSED)
def test_refused(tiny_model: Build, tmp_path: Path, case: str) -> None:
    damage, message = REFUSED[case]
    source = onebitllms(trained(tiny_model, "llama"), tmp_path / "source")
    damage(source)
    with pytest.raises(CheckpointError, match=message):
        restore_latents(source, tmp_path / "restored")
    assert [path.name for path in tmp_path.iterdir()] == ["source"]


def test_biases_that_autobitlinear_scales(tiny_model: Build, tmp_path: Path) -> None:
    source = microsoft(trained(tiny_model, "tied with biases"), tmp_path / "source")
    with pytest.raises(CheckpointError, match="has a bias, which `autobitlinear` scales"):
        restore_latents(source, tmp_path / "restored")


def test_latents_and_dense_models(tiny_model: Build, tmp_path: Path) -> None:
    latents = save(trained(tiny_model, "llama"), tmp_path / "latents")
    with pytest.raises(CheckpointError, match="holds latents already"):
        restore_latents(latents, tmp_path / "restored")
    edit_config(latents, lambda config: config.pop(CONFIG_KEY))  # any dense model
    with pytest.raises(CheckpointError, match="is not ternary: none of its 14 linear layers"):
        restore_latents(latents, tmp_path / "restored")
    with pytest.raises(CheckpointError, match=r"nowhere (does not exist|is not a folder)"):
        restore_latents(tmp_path / "nowhere", tmp_path / "restored")
    assert [path.name for path in tmp_path.iterdir()] == ["latents"]


def test_readers_of_others(tiny_model: Build, tmp_path: Path) -> None:
    """A model that others packed can be written in any format at once."""
    source = onebitllms(trained(tiny_model, "llama"), tmp_path / "source")
    found = open_checkpoint(source)
    assert isinstance(found, ThirdPartyPackedCheckpoint)
    dense = DenseCheckpoint(revert_checkpoint(source, tmp_path / "dense"))
    assert dense.fingerprint() == found.fingerprint()
    assert list(found.entries) == sorted(found.entries) == list(dense.entries)
    repacked = load_file(pack_checkpoint(source, tmp_path / "packed") / SINGLE)
    assert all(torch.equal(tensor, repacked[key]) for key, tensor in load_file(source / SINGLE).items())


def test_public_name() -> None:
    assert axolotl_bitnet.restore_latents is restore_latents
