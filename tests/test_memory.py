"""The formula of a step's memory against the measured rows, and in its parts."""

from __future__ import annotations

import csv
from dataclasses import replace
from pathlib import Path

import pytest

from axolotl_bitnet.layers.weight_codes import FEW_ROWS
from axolotl_bitnet.model.memory import GIB, Settings, moment_bytes, step_memory
from axolotl_bitnet.model.outline import Outline, outline_of

ROOT = Path(__file__).parents[1]


def rows(path: str) -> list[dict[str, str]]:
    return list(csv.DictReader((ROOT / path).read_text().splitlines()))


ROWS = rows("benchmarks/results/memory.csv")
IN_THE_RUN = [("1B", 8192, 15.7), ("3B", 32768, 33.8)]
"""benchmarks/in_the_run.py: sft.yaml on two GPUs, float32 latents, compiled."""

FALCON_E = {
    "model_type": "llama",
    "hidden_size": 2048,
    "num_attention_heads": 16,
    "num_key_value_heads": 2,
    "head_dim": 128,
    "vocab_size": 32768,
}
SHAPES = {
    "1B": FALCON_E | {"intermediate_size": 9216, "num_hidden_layers": 24},
    "3B": FALCON_E | {"intermediate_size": 13312, "num_hidden_layers": 32},
}
QWEN3 = {"model_type": "qwen3", "num_attention_heads": 16, "num_key_value_heads": 8, "head_dim": 128}
QWEN3 |= {"vocab_size": 151936, "num_hidden_layers": 28, "tie_word_embeddings": True}
COSTS = {
    "0.6b": QWEN3 | {"hidden_size": 1024, "intermediate_size": 3072},
    "1.7b": QWEN3 | {"hidden_size": 2048, "intermediate_size": 6144},
}
LOW = Settings(8192, latent_bytes=2, moment_bytes=moment_bytes("adamw_torch_8bit", 2))


def outline(shape: str) -> Outline:
    return outline_of(SHAPES[shape])[0]


def test_every_measured_row_is_one_run() -> None:
    columns = ("shape", "recipe", "sequence", "gpus", "state", "compiled")
    assert len({tuple(row[column] for column in columns) for row in ROWS}) == len(ROWS) >= 19
    assert not any(row["error"] for row in ROWS)


@pytest.mark.parametrize("row", ROWS, ids=lambda row: "-".join(list(row.values())[:6]))
def test_every_measured_row_is_met_within_a_tenth(row: dict[str, str]) -> None:
    model, pairs = outline(row["shape"]), row["recipe"] == "dpo"
    assert model.parameters == int(row["parameters"])
    compiled = row["compiled"] == "compiled"
    settings = replace(
        LOW if row["state"] == "low" else Settings(8192),
        tokens=int(row["sequence"]) * (2 if pairs else 1),
        frozen=model.parameters if pairs else 0,
        compiled=compiled,
        loss="preference" if pairs else "compiled" if compiled else "plain",
    )
    found = step_memory(model, settings, int(row["gpus"]))
    assert found.peak / GIB == pytest.approx(float(row["peak_allocated_gib"]), rel=0.1)
    assert found.needed / GIB > float(row["peak_reserved_gib"]) * 0.94


@pytest.mark.parametrize(("shape", "tokens", "measured"), IN_THE_RUN)
def test_compiled_on_two_gpus(shape: str, tokens: int, measured: float) -> None:
    settings = Settings(tokens, compiled=True, loss="compiled")
    assert step_memory(outline(shape), settings, 2).peak / GIB == pytest.approx(measured, rel=0.1)


@pytest.mark.parametrize("shape", COSTS)
@pytest.mark.parametrize(
    ("what", "loss"), [("cross-entropy", "plain"), ("liger", "chunked"), ("teacher", "chunked")]
)
def test_losses_without_checkpointing(shape: str, what: str, loss: str) -> None:
    """What forward and backward take beyond the weights; the optimizer's moments were not there."""
    (row,) = (
        row
        for row in rows("experiments/results/convert_cost.csv")
        if (row["shape"], row["what"]) == (shape, what)
    )
    settings = Settings(8192, moment_bytes=0, checkpointing=False, accumulates=False, loss=loss)
    found = step_memory(outline_of(COSTS[shape])[0], settings, 1)
    assert (found.peak - found.weights) / GIB == pytest.approx(float(row["peak_gib"]), rel=0.1)


def test_the_end_of_a_run_does_not_raise_the_peak() -> None:
    ends = [row for row in ROWS if row["end_gib"]]
    assert len(ends) >= 3 and all(
        float(row["end_gib"]) < 0.7 * float(row["peak_allocated_gib"]) for row in ends
    )


def test_what_adds_and_what_shards() -> None:
    model, whole = outline("3B"), Settings(8192)
    one, eight = step_memory(model, whole, 1), step_memory(model, whole, 8)
    assert eight.weights == one.weights / 8 and eight.codes == one.codes / 4 > 0
    assert step_memory(model, replace(whole, sharding="ddp"), 8).peak > one.peak
    assert step_memory(model, replace(whole, foreach=True), 1).peak == pytest.approx(
        20 * model.parameters, rel=0.01
    ), "torch's foreach AdamW has a temporary tensor of every weight's size"
    assert (
        step_memory(model, replace(whole, frozen=model.parameters), 1).peak == one.peak + 2 * model.parameters
    )
    assert step_memory(model, LOW, 1).peak < 0.5 * one.peak
    compiled = [step_memory(model, Settings(FEW_ROWS + more, compiled=True), 1).codes for more in (0, 1)]
    assert compiled == [one.codes, 0]
    assert step_memory(model, replace(whole, accumulates=False), 1).peak < one.peak


@pytest.mark.parametrize(("shape", "latent", "measured"), [("3B", 2, 36.4), ("3B", 4, 55.3), ("1B", 2, 21.0)])
def test_without_checkpointing(shape: str, latent: int, measured: float) -> None:
    """The README's bare step at 8k tokens has no embedding and no head, and one micro-batch."""
    model = outline(shape)
    bare = replace(model, others=model.others - model.embedding, embedding=0, vocabulary=1)
    settings = Settings(8192, latent, 2.0 * latent, checkpointing=False, accumulates=False)
    assert step_memory(bare, settings, 1).peak / GIB == pytest.approx(measured, rel=0.1)
