"""Tensors of a base that its architecture has no place for: named by inspect, run, report and card."""

from __future__ import annotations

import json
import logging
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from click.testing import CliRunner
from torch import nn
from transformers import AutoTokenizer

from axolotl_bitnet.cli.main import main
from axolotl_bitnet.formats.unplaced import KEY, note_of, unplaced
from axolotl_bitnet.run_folder import CARD, RUN_LOG
from axolotl_bitnet.storage.atomic import read_json
from axolotl_bitnet.storage.safetensors_stream import CheckpointReader
from axolotl_bitnet.training.log import LOG
from axolotl_bitnet.verify.inspect import inspect
from support import TINY, reports
from support.reports import page_of
from support.runs import config, train
from support.zoo import edit_tensors

Make = Callable[..., nn.Module]

EXTRA = ["model.layers.0.mlp.ffn_layernorm.weight", "model.layers.0.self_attn.inner_attn_ln.weight"]


def saved(model: nn.Module, folder: Path) -> Path:
    model.save_pretrained(folder)  # type: ignore[operator]
    return folder


def with_norms(folder: Path) -> Path:
    edit_tensors(folder, lambda tensors: tensors.update({name: torch.ones(64) for name in EXTRA}))
    return folder


def names_in(folder: Path, **changes: Any) -> list[str]:
    return unplaced(read_json(folder / "config.json") | changes, CheckpointReader(folder).entries)


@pytest.mark.parametrize("family", ["Llama", "Qwen3", "Mixtral"])
def test_a_plain_model_has_none(tiny_model: Make, tmp_path: Path, family: str) -> None:
    """Mixtral's experts are renamed on loading."""
    folder = saved(tiny_model(family), tmp_path)
    assert names_in(folder) == [] and inspect(folder).unplaced == []
    renamed = any("experts.0." in name for name in CheckpointReader(folder).entries)
    assert renamed == (family == "Mixtral")


def test_they_are_named(tiny_model: Make, tmp_path: Path) -> None:
    folder = with_norms(saved(tiny_model("Llama"), tmp_path))
    assert names_in(folder) == EXTRA
    assert names_in(folder, architectures=["BitnetForCausalLM"], auto_map={"AutoModel": "x.Y"}) == EXTRA
    assert names_in(folder, architectures=["Nobodys"], model_type="nobodys") == []
    shown = CliRunner().invoke(main, ["inspect", str(folder)]).output
    assert "not loaded: 2 tensors" in shown and all(name in shown for name in EXTRA)
    told = CliRunner().invoke(main, ["inspect", str(folder), "--json"]).output
    assert json.loads(told)["unplaced"] == EXTRA


@pytest.mark.parametrize("tied", [True, False])
def test_what_has_no_place_and_need_not_be_named(tiny_model: Make, tmp_path: Path, tied: bool) -> None:
    """A copy of a tied head, RoPE's frequencies, scales of packed matrices, other prefixes."""
    folder = saved(tiny_model("Llama", tie_word_embeddings=tied), tmp_path)
    described, stored = read_json(folder / "config.json"), set(CheckpointReader(folder).entries)
    assert ("lm_head.weight" in stored) != tied
    layer = "model.layers.0.self_attn"
    more = {"lm_head.weight", f"{layer}.rotary_emb.inv_freq", f"{layer}.q_proj.weight_scale"}
    assert unplaced(described, stored | more) == []
    assert unplaced(described, {name.removeprefix("model.") for name in stored}) == []
    assert unplaced(described, stored | more | {f"{layer}.sub_norm.weight"}) == [f"{layer}.sub_norm.weight"]


@pytest.mark.once
@pytest.mark.slow
def test_the_report_repeats_them(tmp_path: Path) -> None:
    folder = reports.whole(tmp_path / "run", layers=1)
    assert "no place" not in page_of(folder).text
    reports.write(folder, run=reports.record(reports.log(), **{KEY: EXTRA}))
    assert f"{note_of(EXTRA)}." in page_of(folder).text
    reports.write(folder, run=reports.record(reports.log(), **{KEY: 5}))
    assert "no place" not in page_of(folder).text


def test_a_base_that_cannot_be_compared_gives_none(tiny_model: Make, tmp_path: Path) -> None:
    pytest.importorskip("axolotl.cli")
    from axolotl.utils.dict import DictDefault

    from axolotl_bitnet.plugin.base_model import unplaced_tensors

    folder = with_norms(saved(tiny_model("Llama"), tmp_path / "base"))
    base = {"base_model": str(folder)}
    assert unplaced_tensors(DictDefault(base)) == EXTRA
    assert unplaced_tensors(DictDefault(base | {"reinit_weights": True})) == []
    assert unplaced_tensors(DictDefault({"base_model": str(tmp_path)})) == []


@pytest.mark.slow
def test_the_run_warns_of_them_and_its_card_repeats_it(
    tiny_model: Make, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    pytest.importorskip("axolotl.cli")
    tokenizer = AutoTokenizer.from_pretrained(TINY / "model")
    folder = saved(tiny_model("Llama", vocab_size=-(-len(tokenizer) // 32) * 32), tmp_path / "base")
    tokenizer.save_pretrained(with_norms(folder))
    LOG.addHandler(caplog.handler)
    try:
        with caplog.at_level(logging.WARNING, logger=LOG.name):
            train(config(tmp_path, folder, max_steps=1))
    finally:
        LOG.removeHandler(caplog.handler)
    sentence = note_of(EXTRA)
    assert sentence and caplog.text.count(sentence) >= 1 and all(name in sentence for name in EXTRA)
    assert read_json(tmp_path / "out" / RUN_LOG)[KEY] == EXTRA
    assert f"\n{sentence}.\n" in (tmp_path / "out" / CARD).read_text()
