"""GGUF files in llama.cpp itself: logits, greedy tokens and perplexity of the model that trained."""

from __future__ import annotations

import json
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import nn
from transformers import AutoConfig, AutoModelForCausalLM, AutoTokenizer

from axolotl_bitnet import convert_to_bitlinear, pack_checkpoint
from axolotl_bitnet.formats.export import export_gguf, gguf_types
from axolotl_bitnet.formats.gguf import architecture as gguf_llama
from axolotl_bitnet.formats.gguf import metadata
from support import TINY
from support.llamacpp import LlamaCpp
from support.llamas import VARIANTS, build, save
from support.marks import slow_but

pytest.importorskip("gguf")
pytest.importorskip("xllamacpp")
pytestmark = pytest.mark.once  # both lanes have the same gguf and xllamacpp
IDS = (torch.arange(300) * 37 % 500 + 3) % 512
TYPES = gguf_types()
LENGTHS = (2, 9, 40, 150, 300)


def errors(model: nn.Module, file: Path) -> list[float]:
    """By length of the prompt, how far llama.cpp's log-probabilities are off, relative to their spread."""
    runner, found = LlamaCpp(file), []
    with torch.no_grad():
        expected = model(IDS[None]).logits[0].log_softmax(-1)
    for length in LENGTHS:
        reference = expected[length - 1]
        got = runner.logprobs(IDS[:length].tolist(), reference.numel())
        found.append(float((reference - got).norm() / (reference - reference.mean()).norm()))
    return found


# llama.cpp quantizes activations in blocks of 256 values, not by token: random models are up to 5 % off.
OFF = 0.07


@pytest.mark.parametrize("variant", slow_but(3, VARIANTS))
def test_llama_cpp_computes_the_trained_model(tmp_path: Path, variant: str) -> None:
    family, options = VARIANTS[variant]
    model = build(family, **options)
    file = export_gguf(save(model, tmp_path / "latents"), tmp_path / "model.gguf")
    assert max(errors(model, file)) < OFF


@pytest.mark.parametrize("type", TYPES)
@pytest.mark.parametrize("embeddings", slow_but(1, ["f16", "q8_0"]))
def test_other_types_compute_the_same(tmp_path: Path, type: str, embeddings: str) -> None:
    model = build(hidden_size=512)
    latents = save(model, tmp_path / "latents")
    file = export_gguf(latents, tmp_path / "model.gguf", type, embeddings=embeddings)
    assert max(errors(model, file)) < OFF


def test_without_the_order_of_rows_it_is_another_model(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """What the tests above would see if q and k were not permuted."""
    model = build()
    monkeypatch.setattr(gguf_llama, "row_order", lambda *arguments: None)
    file = export_gguf(save(model, tmp_path / "latents"), tmp_path / "model.gguf")
    assert max(errors(model, file)) > 5 * OFF


@pytest.mark.parametrize("variant", ["linear rope", "llama3 rope", "yarn rope"])
def test_without_its_scaling_of_rope_it_is_another_model(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, variant: str
) -> None:
    family, options = VARIANTS[variant]
    model = build(family, **options)
    monkeypatch.setattr(metadata, "rope_type", lambda rope: "default")
    file = export_gguf(save(model, tmp_path / "latents"), tmp_path / "model.gguf")
    assert max(errors(model, file)) > 2 * OFF


# A model that has learned something


@dataclass
class Trained:
    model: Any
    latents: Path
    packed: Path
    prompts: list[list[int]]
    answers: list[list[int]]
    text: list[int]


@pytest.fixture(scope="module")
def trained(tmp_path_factory: pytest.TempPathFactory) -> Trained:
    """The demo's shape, taught the answers to some of its questions until their margins are clear."""
    torch.manual_seed(5)
    root = tmp_path_factory.mktemp("trained")
    tokenizer = AutoTokenizer.from_pretrained(TINY / "model")
    rows = [json.loads(line)["messages"] for line in (TINY / "heldout.jsonl").read_text().splitlines()[:24]]
    prompts = [
        tokenizer.apply_chat_template(row[:1], add_generation_prompt=True)["input_ids"] for row in rows
    ]
    answers = [
        tokenizer(f"{row[1]['content']}<|im_end|>", add_special_tokens=False)["input_ids"] for row in rows
    ]
    model = AutoModelForCausalLM.from_config(AutoConfig.from_pretrained(TINY / "model"))
    convert_to_bitlinear(model)
    width = max(len(p) + len(a) for p, a in zip(prompts, answers, strict=True))
    ids = torch.zeros(len(rows), width, dtype=torch.long)
    labels = torch.full_like(ids, -100)
    for row, (prompt, answer) in enumerate(zip(prompts, answers, strict=True)):
        whole = torch.tensor(prompt + answer)
        ids[row, : whole.numel()] = labels[row, : whole.numel()] = whole
    optimizer = torch.optim.AdamW(model.parameters(), lr=2e-3, betas=(0.9, 0.98), weight_decay=0.0)
    for _ in range(100):
        loss = model(input_ids=ids, labels=labels).loss
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
    model.eval()
    latents = save(model, root / "latents")
    pack_checkpoint(latents, root / "packed")
    text = [
        token for prompt, answer in zip(prompts[:12], answers[:12], strict=True) for token in prompt + answer
    ]
    return Trained(model, latents, root / "packed", prompts, answers, text)


@pytest.mark.slow
@pytest.mark.parametrize("type", TYPES)
def test_greedy_tokens_are_the_trained_model_s(trained: Trained, tmp_path: Path, type: str) -> None:
    runner = LlamaCpp(export_gguf(trained.latents, tmp_path / "model.gguf", type))
    right = 0
    for prompt, answer in zip(trained.prompts, trained.answers, strict=True):
        ids = torch.tensor([prompt])
        expected = trained.model.generate(ids, attention_mask=torch.ones_like(ids), max_new_tokens=5)
        expected = expected[0, len(prompt) :].tolist()
        assert runner.greedy(prompt, 5) == expected
        right += expected == answer
    assert right >= 22  # it has learned: these are not the tokens of noise


@pytest.mark.slow
@pytest.mark.parametrize("kind", ["tq2_0", "q2_0"])
def test_perplexity_is_that_of_the_packed_model(trained: Trained, tmp_path: Path, kind: str) -> None:
    """As transformers computes it with its own BitLinear."""
    ids = torch.tensor([trained.text])
    with torch.compiler.set_stance("force_eager"), torch.no_grad():
        packed = AutoModelForCausalLM.from_pretrained(trained.packed, dtype=torch.float32).eval()
        assert type(packed.model.layers[0].mlp.up_proj).__module__ == "transformers.integrations.bitnet"
        chances = packed(ids).logits[0, :-1].log_softmax(-1)
    expected = (-chances.gather(1, ids[0, 1:, None]).mean()).exp()
    runner, text = LlamaCpp(export_gguf(trained.packed, tmp_path / "model.gguf", kind)), trained.text
    each = [runner.logprobs(text[:n], 512)[text[n]] for n in range(1, len(text))]
    found = (-torch.stack(each).mean()).exp()
    print(f"{kind}: perplexity {found:.4f}, packed {expected:.4f}")
    assert abs(found / expected - 1) < 0.01


@pytest.mark.slow
def test_chat_template_and_stop_are_the_tokenizer_s(trained: Trained, tmp_path: Path) -> None:
    runner = LlamaCpp(export_gguf(trained.latents, tmp_path / "model.gguf"))
    messages = [{"role": "user", "content": "What is 17 + 25?"}]
    tokenizer = AutoTokenizer.from_pretrained(trained.latents)
    expected = tokenizer.apply_chat_template(messages, add_generation_prompt=True, tokenize=False)
    assert runner.post("/apply-template", messages=messages)["prompt"] == expected
    answer = runner.post("/v1/chat/completions", messages=messages, max_tokens=20, temperature=0)
    assert answer["choices"][0]["finish_reason"] == "stop"  # at <|im_end|>, which it was taught
