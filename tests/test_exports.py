"""Exports that cannot work are refused before anything is trained."""

from __future__ import annotations

import shutil
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch

pytest.importorskip("axolotl.cli")

from axolotl.utils.dict import DictDefault
from transformers import AutoTokenizer, BitNetConfig, LlamaConfig, MixtralConfig

from axolotl_bitnet.model.layer_plan import ConversionError
from axolotl_bitnet.plugin.base_model import refuse_exports
from axolotl_bitnet.storage.atomic import read_json
from axolotl_bitnet.verify.verify import verify_checkpoint
from support import TINY
from support.models import WIDE
from support.runs import config, train
from support.zoo import HAS_GGUF, MADE

TOKENIZER = TINY / "model"
needs_gguf = pytest.mark.skipif(not HAS_GGUF, reason="needs the gguf package")


def refuse(config: Any, *export: str, folder: Path | None = TOKENIZER, **cfg: Any) -> None:
    refuse_exports(DictDefault({"base_model": "someone/model"} | cfg), config, folder, export)


@pytest.mark.slow
def test_what_can_be_made_is_not_refused() -> None:
    refuse(LlamaConfig(), *MADE)
    refuse(BitNetConfig(), "packed", "dense")


@needs_gguf
@pytest.mark.parametrize(
    ("made", "cfg", "words"),
    [
        (BitNetConfig(), {}, "squared ReLU"),
        (MixtralConfig(), {}, "has not been run in llama.cpp"),
        (LlamaConfig(), {"reward_model": True}, "classifier"),
        (
            LlamaConfig(rope_parameters={"rope_type": "dynamic", "rope_theta": 1e4, "factor": 2.0}),
            {},
            "rope_type",
        ),
    ],
)
def test_what_llama_cpp_cannot_run(made: Any, cfg: dict[str, Any], words: str) -> None:
    with pytest.raises(ConversionError, match=r"bitnet\.export") as caught:
        refuse(made, "packed", "gguf-tq2_0", **cfg)
    assert words in str(caught.value) and "gguf-tq2_0" in str(caught.value)
    refuse(made, "packed", **cfg)


@needs_gguf
def test_a_tokenizer_that_llama_cpp_has_not(tmp_path: Path) -> None:
    with pytest.raises(ConversionError, match="no tokenizer"):
        refuse(LlamaConfig(), "gguf-tq1_0", folder=tmp_path)
    refuse(LlamaConfig(), "gguf-tq1_0", folder=tmp_path, tokenizer_config="another/tokenizer")
    refuse(LlamaConfig(), "gguf-tq1_0", folder=None)  # not on this machine: found at the end


def test_a_package_that_is_missing(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "gguf", None)
    with pytest.raises(ConversionError, match=r"pip install .axolotl-bitnet\[gguf\]"):
        refuse(LlamaConfig(), "gguf-tq2_0")


def test_mlx_has_no_such_architecture() -> None:
    with pytest.raises(ConversionError, match="mlx-lm's `bitnet`"):
        refuse(BitNetConfig(), "mlx")


@pytest.mark.slow
def test_a_run_makes_them_all(tmp_path: Path, tiny_model: Callable[..., torch.nn.Module]) -> None:
    base = tmp_path / "base"
    tokenizer = AutoTokenizer.from_pretrained(TOKENIZER)
    sizes = WIDE | {"num_hidden_layers": 1}
    model = tiny_model("Llama", vocab_size=-(-len(tokenizer) // 32) * 32, **sizes)
    model.save_pretrained(base)  # type: ignore[operator]
    tokenizer.save_pretrained(base)
    run = train(config(tmp_path, base, max_steps=2, bitnet={"export": MADE}))
    out = Path(run.cfg.output_dir)
    artifacts = read_json(out / "bitnet.json")["artifacts"]
    assert list(artifacts) == MADE and all(entry["verified"] is True for entry in artifacts.values())
    for entry in artifacts.values():
        report = verify_checkpoint(out / entry["path"], out)
        assert report.ok and all(check.done for check in report.checks), report.mismatches
    assert "## Ternary (1.58-bit) weights" in (out / "README.md").read_text()

    shutil.rmtree(out)
    block = {"export": ["packed", "mlx"]}
    refused = config(tmp_path, base, bitnet=block)
    shutil.rmtree(base)
    tiny_model("BitNet", vocab_size=len(tokenizer), **sizes).save_pretrained(base)  # type: ignore[operator]
    tokenizer.save_pretrained(base)
    with pytest.raises(ConversionError, match=r"`bitnet.export: \[mlx\]` would fail"):
        train(refused)
    assert not (out / "model.safetensors").exists()
