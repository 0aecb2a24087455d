"""Models that others trained: no list of ternary layers, and sometimes several scales per matrix."""

from __future__ import annotations

import json
import logging
import struct
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from click.testing import CliRunner
from safetensors.torch import load_file
from torch import Tensor, nn

from axolotl_bitnet import open_checkpoint, pack_checkpoint, restore_latents, revert_checkpoint
from axolotl_bitnet.cli.main import main
from axolotl_bitnet.formats.export import export_mlx
from axolotl_bitnet.model.entry import CONFIG_KEY
from axolotl_bitnet.model.preflight import preflight
from axolotl_bitnet.model.scales import several_scales
from axolotl_bitnet.plugin.artifacts import finish_run
from axolotl_bitnet.storage.atomic import CheckpointError
from axolotl_bitnet.storage.safetensors_stream import SINGLE
from axolotl_bitnet.storage.trainer_checkpoint import problems
from axolotl_bitnet.ternary import ternarize
from axolotl_bitnet.verify.inspect import inspect
from support.stored import edit, edit_config, save, trained

Build = Callable[..., nn.Module]


def unlisted(folder: Path) -> Path:
    return edit_config(folder, lambda config: config.pop(CONFIG_KEY))


@pytest.mark.parametrize("stored", ["latents", "dense"])
def test_without_a_list_the_layers_are_those_that_training_would_take(
    tiny_model: Build, tmp_path: Path, caplog: pytest.LogCaptureFixture, stored: str
) -> None:
    """Dense ternary matrices keep their scale, which quantizing them anew would shrink."""
    latents = save(trained(tiny_model, "llama"), tmp_path / "latents")
    expected = pack_checkpoint(latents, tmp_path / "expected")
    source = latents if stored == "latents" else revert_checkpoint(latents, tmp_path / "dense")
    with caplog.at_level(logging.WARNING):
        packed = pack_checkpoint(unlisted(source), tmp_path / "packed")
    assert (packed / SINGLE).read_bytes() == (expected / SINGLE).read_bytes()
    assert "lists no ternary layers: the 14 that training would convert are taken" in caplog.text
    assert "onebitllms rounds otherwise" in caplog.text
    assert ("may never have been ternary" in caplog.text) == (stored == "latents")  # random: it was not
    assert open_checkpoint(packed).fingerprint() == open_checkpoint(expected).fingerprint()


def test_bf16_bitnet_that_transformers_quantizes_as_it_runs(
    tiny_model: Build, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    """As microsoft/bitnet-b1.58-2B-4T-bf16 is stored: latents, and a method in the config but no layers."""
    source = tmp_path / "microsoft"
    tiny_model("BitNet").to(torch.bfloat16).save_pretrained(source)
    online = {"quant_method": "bitnet", "linear_class": "autobitlinear", "quantization_mode": "online"}
    edit_config(source, lambda config: config.update(quantization_config=online))
    packed = pack_checkpoint(source, tmp_path / "packed")
    assert "lists no ternary layers" in caplog.text
    latents, codes = load_file(source / SINGLE), open_checkpoint(packed)
    for name, key in codes.keys.items():
        expected = ternarize(latents[key])
        assert all(torch.equal(*pair) for pair in zip(codes.codes(name), expected, strict=False)), name
    done = CliRunner().invoke(main, ["verify", str(packed), "--against", str(source)])
    assert done.exit_code == 0, done.output
    with pytest.raises(CheckpointError, match="holds latents already"):
        restore_latents(source, tmp_path / "latents")
    edit_config(source, lambda config: config["quantization_config"].update(use_rms_norm=True))
    with pytest.raises(CheckpointError, match="use_rms_norm: its layers normalize inside"):
        pack_checkpoint(source, tmp_path / "again")


def test_an_unknown_architecture_is_refused(tiny_model: Build, tmp_path: Path) -> None:
    source = unlisted(save(trained(tiny_model, "llama"), tmp_path / "latents"))
    edit_config(source, lambda config: config.update(model_type="mine"))
    with pytest.raises(CheckpointError, match="no architecture 'mine'"):
        pack_checkpoint(source, tmp_path / "packed")
    assert not (tmp_path / "packed").exists()


def with_scales(shape: tuple[int, int], group: int) -> Tensor:
    """Ternary, with a scale a group of a row; ``group`` 0: a row."""
    codes = torch.randint(-1, 2, shape).float()
    scales = torch.rand(shape[0], shape[1] // group if group else 1) + 0.5
    return (codes * scales.repeat_interleave(group or shape[1], dim=1)).bfloat16()


@pytest.mark.parametrize(("group", "layout"), [(0, "by rows"), (32, "by groups of 32")])
def test_several_scales_are_named(
    tiny_model: Build, tmp_path: Path, caplog: pytest.LogCaptureFixture, group: int, layout: str
) -> None:
    torch.manual_seed(4)
    source = unlisted(save(trained(tiny_model, "llama"), tmp_path / "model"))

    def change(tensors: dict[str, Tensor]) -> None:
        for key, tensor in tensors.items():
            if key.endswith("_proj.weight"):
                tensors[key] = with_scales((tensor.shape[0], tensor.shape[1]), group)

    edit(source, change)
    words = rf"ternary, with several scales per matrix \({layout}; 14 matrices\), which .* cannot carry"
    found = inspect(source)
    assert found.kind == "ternary with several scales" and layout in found.detail
    with pytest.raises(CheckpointError, match=words):
        restore_latents(source, tmp_path / "latents")
    with caplog.at_level(logging.WARNING):
        pack_checkpoint(source, tmp_path / "packed")
    assert f"with several scales per matrix ({layout}" in caplog.text
    assert "may never have been ternary" not in caplog.text
    model = trained(tiny_model, "llama")
    names = [name for name, _ in model.named_modules() if name.endswith("_proj")]
    model.load_state_dict(load_file(source / SINGLE), strict=False)
    (line,) = preflight(model, names).warnings()
    assert "Training starts from another model" in line and layout in line


def test_one_scale_and_latents_are_not_several() -> None:
    codes = torch.randint(-1, 2, (64, 128)).float()
    assert several_scales(codes * 0.02) is None
    assert several_scales(torch.randn(64, 128)) is None
    assert several_scales(torch.zeros(4, 128)) is several_scales(torch.zeros(0, 128)) is None
    assert several_scales(torch.eye(64)) is None  # one number a row is no ternary row
    assert several_scales(with_scales((64, 512), 128)) == "by groups of 128"
    spoiled = with_scales((64, 512), 128)
    spoiled[63, 511] = 9.0
    assert several_scales(spoiled) is None


def test_a_source_may_be_a_model_of_the_hub(
    tiny_model: Build, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    source = unlisted(save(trained(tiny_model, "llama"), tmp_path / "snapshot"))
    asked: list[Any] = []

    def stand_in(name: str, revision: str | None, allow_patterns: list[str]) -> str:
        asked.append((name, revision))
        assert not any("bin" in pattern or "pt" in pattern for pattern in allow_patterns)
        return str(source)

    monkeypatch.setattr("huggingface_hub.snapshot_download", stand_in)
    command = ["pack", "tiiuae/Falcon-E-1B-Base@prequantized", str(tmp_path / "packed")]
    done = CliRunner().invoke(main, command)
    assert done.exit_code == 0, done.output
    assert asked == [("tiiuae/Falcon-E-1B-Base", "prequantized")] and (tmp_path / "packed" / SINGLE).exists()


def test_offline_and_mistyped_sources_are_sentences(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("HF_HUB_OFFLINE", "1")
    monkeypatch.setenv("HF_HOME", str(tmp_path / "empty"))
    done = CliRunner().invoke(main, ["pack", "nobody/Nothing-1B@main", str(tmp_path / "packed")])
    assert done.exit_code == 2 and "the hub gave no such model" in done.output
    (tmp_path / "outputs").mkdir()
    monkeypatch.chdir(tmp_path)
    done = CliRunner().invoke(main, ["pack", "outputs/mistyped", str(tmp_path / "packed")])
    assert done.exit_code == 2 and "Path 'outputs/mistyped' does not exist" in done.output


def test_a_tokenizer_with_more_tokens_than_embeddings(tiny_model: Build, tmp_path: Path) -> None:
    latents = save(trained(tiny_model, "llama"), tmp_path / "latents")
    words = {"model": {"vocab": {"a": 0, "b": 127}}, "added_tokens": [{"id": 128}]}
    (latents / "tokenizer.json").write_text(json.dumps(words))
    for write in (pack_checkpoint, export_mlx):
        with pytest.raises(CheckpointError, match="has 129 tokens, the model only 128 embeddings"):
            write(latents, tmp_path / "out")
    (latents / "tokenizer.json").write_text(json.dumps(words | {"added_tokens": []}))
    pack_checkpoint(latents, tmp_path / "out")


def test_a_model_packed_in_a_checkpoint_is_compared_with_that_checkpoint(
    tiny_model: Build, tmp_path: Path
) -> None:
    """Not with the run's end, which is in the folder above."""
    run = save(trained(tiny_model, "llama"), tmp_path / "run")
    finish_run(run, open_checkpoint(run).fingerprint(), [], verify=True)
    torch.manual_seed(9)
    middle = save(trained(tiny_model, "llama"), run / "checkpoint-5")
    edit(middle, lambda tensors: [tensor.neg_() for key, tensor in tensors.items() if "proj" in key])
    pack_checkpoint(middle, middle / "packed")
    done = CliRunner().invoke(main, ["verify", str(middle / "packed"), "--no-run"])
    assert done.exit_code == 0, done.output
    done = CliRunner().invoke(main, ["verify", str(middle / "packed"), "--against", str(run), "--no-run"])
    assert done.exit_code == 1


def test_a_checkpoint_of_the_model_only_says_how_to_go_on(tiny_model: Build, tmp_path: Path) -> None:
    folder = save(trained(tiny_model, "llama"), tmp_path / "checkpoint-5")
    (folder / "trainer_state.json").write_text('{"global_step": 5}')
    found = [line for line in problems(folder) if "save_only_model" in line]
    assert len(found) == 1 and f"base_model: {folder}" in found[0]


def test_i2_s_is_named(tmp_path: Path) -> None:
    pytest.importorskip("gguf")
    key, name = b"general.architecture", b"blk.0.attn_q.weight"
    data = b"GGUF" + struct.pack("<IQQ", 3, 1, 1)
    data += struct.pack("<Q", len(key)) + key + struct.pack("<IQ", 8, 5) + b"llama"
    data += struct.pack("<Q", len(name)) + name + struct.pack("<IQQIQ", 2, 256, 4, 36, 0)
    (tmp_path / "model.gguf").write_bytes(data + bytes(4096))
    with pytest.raises(CheckpointError, match=r"I2_S, bitnet\.cpp's own, which is not read"):
        open_checkpoint(tmp_path / "model.gguf")
