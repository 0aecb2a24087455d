"""The embedded default: its data and tokenizer are what the script writes, and its shape is Falcon-E's."""

from __future__ import annotations

import json
from pathlib import Path

from transformers import AutoConfig, AutoTokenizer

from support import TINY
from support.processes import python

WRITTEN = ["train.jsonl", "heldout.jsonl", "dpo.jsonl", "model/tokenizer.json", "model/tokenizer_config.json"]


def _questions(name: str) -> set[str]:
    rows = [json.loads(line) for line in (TINY / name).read_text(encoding="utf-8").splitlines()]
    return {row["messages"][0]["content"] for row in rows}


def test_the_script_writes_the_committed_files_again(tmp_path: Path) -> None:
    script = TINY / "make_data.py"
    python(script, "--out", tmp_path)
    for name in WRITTEN:
        assert (tmp_path / name).read_bytes() == (TINY / name).read_bytes(), name
    other = tmp_path / "other"
    python(script, "--out", other, "--seed", "1")
    assert (other / "train.jsonl").read_bytes() != (TINY / "train.jsonl").read_bytes()


def test_held_out_questions_are_in_no_training_file() -> None:
    heldout = _questions("heldout.jsonl")
    assert len(heldout) == 500
    assert not heldout & _questions("train.jsonl") and not heldout & _questions("dpo.jsonl")


def test_answers_are_right_and_rejected_ones_wrong() -> None:
    for name in ("train.jsonl", "heldout.jsonl"):
        for line in (TINY / name).read_text(encoding="utf-8").splitlines():
            question, answer = (turn["content"] for turn in json.loads(line)["messages"])
            left, right = question.removeprefix("What is ").removesuffix("?").split(" + ")
            assert int(answer) == int(left) + int(right)
    for line in (TINY / "dpo.jsonl").read_text(encoding="utf-8").splitlines():
        row = json.loads(line)
        assert row["chosen"]["content"] != row["rejected"]["content"]


def test_the_shape_is_falcon_es_in_small() -> None:
    config = AutoConfig.from_pretrained(TINY / "model")
    assert config.model_type == "llama" and not config.tie_word_embeddings
    assert config.hidden_size % 256 == 0 and config.intermediate_size % 256 == 0
    assert config.num_key_value_heads < config.num_attention_heads
    tokenizer = AutoTokenizer.from_pretrained(TINY / "model")
    assert len(tokenizer) <= config.vocab_size
    ids = tokenizer("17 + 25 = 42").input_ids
    assert tokenizer.decode(ids) == "17 + 25 = 42"
