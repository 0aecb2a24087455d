"""Distillation by Axolotl's kd plugin: a dense teacher's log-probabilities, a ternary student."""

from __future__ import annotations

import json
from itertools import pairwise
from pathlib import Path
from typing import Any

import pytest
import torch
import yaml

pytest.importorskip("axolotl")
from safetensors.torch import load_file
from transformers import AutoConfig, AutoModelForCausalLM, AutoTokenizer

from axolotl_bitnet.plugin.refusals.sharding import sharding_refusals as layout_refusals
from support import ROOT, TINY
from support.processes import python

RECIPE = ROOT / "examples" / "falcon-e" / "distill.yaml"
SCRIPT = RECIPE.with_name("distill_teacher.py")
TOP_K = 8


@pytest.fixture(scope="module")
def teacher(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("teacher")
    torch.manual_seed(3)
    model = AutoModelForCausalLM.from_config(AutoConfig.from_pretrained(TINY / "model"))
    with torch.no_grad():
        for parameter in model.parameters():
            if parameter.dim() == 2:
                parameter *= 6  # that its answers depend on what it reads
    model.save_pretrained(folder)
    AutoTokenizer.from_pretrained(TINY / "model").save_pretrained(folder)
    return folder


@pytest.fixture(scope="module")
def taught(teacher: Path) -> Path:
    """The teacher's log-probabilities of forty conversations."""
    lines = (TINY / "heldout.jsonl").read_text(encoding="utf-8").splitlines(keepends=True)[:40]
    conversations = teacher / "conversations.jsonl"
    conversations.write_text("".join(lines), encoding="utf-8")
    out = teacher / "teacher.parquet"
    python(SCRIPT, teacher, conversations, out, "--top-k", str(TOP_K), "--batch", "16")
    return out


@pytest.mark.slow
def test_the_script_writes_the_teachers_own_distribution(teacher: Path, taught: Path) -> None:
    from datasets import load_dataset

    rows = load_dataset("parquet", data_files=str(taught), split="train", cache_dir=str(teacher / "cache"))
    assert len(rows) == 40
    row = rows[17]
    tokenizer = AutoTokenizer.from_pretrained(teacher)
    ids = tokenizer.apply_chat_template(row["messages"], return_dict=False)
    with torch.no_grad():
        logits = AutoModelForCausalLM.from_pretrained(teacher)(torch.tensor([ids])).logits[0]
    want, places = logits.log_softmax(-1).topk(TOP_K)
    assert row["target_token_ids"] == places.tolist()
    torch.testing.assert_close(torch.tensor(row["logprobs"]), want, atol=1e-5, rtol=0)


def _settings(folder: Path, teacher: Path, taught: Path, **changes: Any) -> dict[str, Any]:
    settings = yaml.safe_load(RECIPE.read_text(encoding="utf-8"))
    settings["datasets"][0]["path"] = str(taught)
    settings |= {
        "base_model": str(teacher),
        "output_dir": str(folder / "out"),
        "dataset_prepared_path": str(folder / "prepared"),
        "dataset_num_proc": 1,
        "dataloader_num_workers": 0,
        "bf16": False,
        "optimizer": "adamw_torch",
        "sequence_len": 64,
        "logging_steps": 1,
        "max_steps": 5,
        **changes,
    }
    return settings


SHARDED = {"fsdp_version": 2, "fsdp_config": {"reshard_after_forward": True}}


@pytest.mark.parametrize(
    "layout",
    [
        SHARDED,
        {"fsdp_version": 2, "fsdp_config": {"state_dict_type": "FULL_STATE_DICT"}},
        {"fsdp_version": 1, "fsdp_config": {"reshard_after_forward": False}},
        {"deepspeed": {"zero_optimization": {"stage": 3, "stage3_gather_16bit_weights_on_model_save": True}}},
    ],
)
def test_a_sharded_head_is_refused_with_the_reason(layout: dict[str, Any]) -> None:
    settings = {"use_onebitllms": True, **layout}
    assert not layout_refusals(settings)
    (problem,) = layout_refusals({**settings, "kd_trainer": True})
    assert "lm_head.weight" in problem and "outside the model's forward" in problem


@pytest.mark.parametrize(
    "layout",
    [
        {},
        {"fsdp_version": 2, "fsdp_config": {"reshard_after_forward": False}},
        {"deepspeed": {"zero_optimization": {"stage": 2}}},
    ],
)
def test_a_whole_head_is_taken(layout: dict[str, Any]) -> None:
    assert not layout_refusals({"use_onebitllms": True, "kd_trainer": True, **layout})


@pytest.mark.slow
def test_a_ternary_student_learns_from_its_dense_original(
    tmp_path: Path, teacher: Path, taught: Path
) -> None:
    # of the teacher's answers alone, so that the first loss is a divergence that can be computed here
    settings = _settings(tmp_path, teacher, taught, kd_ce_alpha=0.0, kd_alpha=1.0)
    files = [tmp_path / name for name in ("settings.json", "result.json", "batch.safetensors")]
    files[0].write_text(json.dumps(settings), encoding="utf-8")
    python("-m", "support.distilling", *files)
    result = json.loads(files[1].read_text(encoding="utf-8"))
    losses = result["losses"]
    assert result["trainer"] == "AxolotlKDTrainer" and len(losses) == 5 and losses[-1] < losses[0]
    record = json.loads((tmp_path / "out" / "bitnet.json").read_text(encoding="utf-8"))
    assert record["artifacts"]["packed"]["verified"] is True and len(record["converted"]) == 14
    batch = load_file(files[2])
    assert batch["target_mask"].any() and batch["target_logprobs"].shape[-1] == TOP_K
    assert losses[0] == pytest.approx(_divergence(teacher, batch), rel=1e-3)


def _divergence(teacher: Path, batch: dict[str, Any]) -> float:
    """The first batch's loss, from the teacher's weights made ternary here; every conversation by itself."""
    from axolotl_bitnet import convert_to_bitlinear

    student = AutoModelForCausalLM.from_pretrained(teacher)
    convert_to_bitlinear(student)
    total, packed = 0.0, 0
    for ids, positions, tokens, logprobs, mask in zip(
        *(batch[key] for key in ("input_ids", "position_ids", "target_token_ids", "target_logprobs")),
        batch["target_mask"].bool(),
        strict=True,
    ):
        starts = [*(positions == 0).nonzero().flatten().tolist(), len(ids)]
        packed += len(starts) > 2 and int(starts[1] < len(ids) - 1)
        for start, stop in pairwise(starts):
            sample = slice(start, stop)
            with torch.no_grad():
                likely = student(ids[None, sample]).logits[0].log_softmax(-1).gather(-1, tokens[sample])
            apart = logprobs[sample].exp() * (logprobs[sample] - likely)
            total += float(apart[mask[sample]].sum())
    assert packed, "no row has two conversations: nothing was tested"
    return total / float((batch["labels"] != -100).sum())
