"""The recipes that read plain text, run by Axolotl for a few steps on the CPU: packed, and verified."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch
import yaml

pytest.importorskip("axolotl")
from support import ROOT
from support.runs import Run, train

RECIPES = ROOT / "examples" / "falcon-e"
TEXT = "\n".join(path.read_text(encoding="utf-8") for path in sorted((ROOT / "docs").glob("*.md")))


def _run(folder: Path, recipe: str, **changes: Any) -> Run:
    """The recipe as it is, but for a CPU and a text of ours; None removes a key."""
    settings = yaml.safe_load((RECIPES / recipe).read_text(encoding="utf-8"))
    text = folder / "text.jsonl"
    documents = [TEXT[start : start + 3000] for start in range(0, 24_000, 3000)]
    text.write_text("".join(json.dumps({"text": document}) + "\n" for document in documents))
    settings["datasets"][0]["path"] = str(text)
    settings |= {
        "base_model": str(RECIPES / "pretrain-tiny"),
        "dataset_prepared_path": str(folder / "prepared"),
        "output_dir": str(folder / "out"),
        "dataset_num_proc": 0,  # one starts a pool
        "bf16": False,
        "optimizer": "adamw_torch",
        "sequence_len": 256,
        "micro_batch_size": 2,
        "logging_steps": 1,
        **changes,
    }
    return train({key: value for key, value in settings.items() if value is not None})


def _verdict(run: Run) -> Any:
    record = json.loads((Path(run.cfg.output_dir) / "bitnet.json").read_text(encoding="utf-8"))
    return record["artifacts"]["packed"]["verified"], len(record["converted"])


@pytest.mark.slow
def test_pretraining_from_random_weights(tmp_path: Path) -> None:
    run = _run(tmp_path, "pretrain-tiny.yaml", max_steps=5, eval_steps=5, warmup_ratio=0.2)
    assert 5.3 < run.losses[0] < 7.5  # ln 260 is 5.56: no base's knowledge
    assert run.losses[-1] < run.losses[0] - 0.5
    assert run.logged("eval_loss")[-1] < run.losses[0]
    assert _verdict(run) == (True, 42)
    assert run.cfg.learning_rate == pytest.approx(1e-3)
    assert (tmp_path / "out" / "packed" / "tokenizer.json").exists()


@pytest.mark.slow
def test_continued_pretraining_trains_every_token_of_a_text(tmp_path: Path) -> None:
    base = tmp_path / "base"
    _a_base(base)
    keys = ("fsdp_version", "fsdp_config", "accelerator_config", "special_tokens", "torch_compile")
    one_process = dict.fromkeys(keys)
    run = _run(
        tmp_path,
        "cpt.yaml",
        base_model=str(base),
        max_steps=3,
        eval_steps=3,
        gradient_accumulation_steps=1,
        val_set_size=0.1,
        **(one_process | {"loss_watchdog_threshold": None, "loss_watchdog_patience": None}),
    )
    batch = next(iter(run.trainer.get_train_dataloader()))
    labels, ids = batch["labels"], batch["input_ids"]
    assert torch.equal(labels[labels != -100], ids[labels != -100])
    assert (labels != -100).float().mean() > 0.7  # all but the padding of packed rows
    assert len(run.losses) == 3 and _verdict(run) == (True, 42)
    assert run.cfg.learning_rate == pytest.approx(5e-4)


def _a_base(folder: Path) -> None:
    from transformers import AutoConfig, AutoModelForCausalLM, AutoTokenizer

    AutoModelForCausalLM.from_config(AutoConfig.from_pretrained(RECIPES / "pretrain-tiny")).save_pretrained(
        folder
    )
    AutoTokenizer.from_pretrained(RECIPES / "pretrain-tiny").save_pretrained(folder)


def test_any_text_comes_back_from_its_bytes() -> None:
    from transformers import AutoConfig, AutoTokenizer

    tokenizer = AutoTokenizer.from_pretrained(RECIPES / "pretrain-tiny")
    config = AutoConfig.from_pretrained(RECIPES / "pretrain-tiny")
    text = "Größe: 10 €,  two spaces\n\n\ttab\u0000 漢字 🙂"
    ids = tokenizer(text)["input_ids"]
    assert tokenizer.decode(ids) == text and len(ids) == len(text.encode())
    assert len(tokenizer) <= config.vocab_size and config.eos_token_id == tokenizer.eos_token_id
    assert config.hidden_size % 256 == 0 and config.intermediate_size % 256 == 0  # GGUF's rows
