"""Packed models in vLLM, on a CPU: the trained model's tokens, whoever packed it; what is refused."""

from __future__ import annotations

import json
import os
import subprocess
import sys
import time
import urllib.error
import urllib.request
from collections.abc import Callable
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file
from torch import Tensor
from transformers import AutoTokenizer
from vllm import SamplingParams

from axolotl_bitnet import load_packed, pack_checkpoint
from axolotl_bitnet.serving.vllm import BitNetConfig, BitNetLinearMethod
from axolotl_bitnet.storage.atomic import read_json, write_json
from axolotl_bitnet.storage.safetensors_stream import SINGLE
from support import TINY
from support.llamas import build, save

Serve = Callable[..., Any]
PROMPTS = [[(i * 37 % 500 + 3) % 512 for i in range(length)] for length in (2, 9, 40, 150)]
HELDOUT = 300


def pack(folder: Path, family: str, **options: Any) -> Path:
    torch.manual_seed(7)
    pack_checkpoint(save(build(family, **options), folder / "latents"), folder / "packed")
    return folder / "packed"


def multiplying(folder: Path) -> Path:
    """The same model by Microsoft's convention: a scale that multiplies."""
    tensors = load_file(folder / SINGLE)
    for key in [key for key in tensors if key.endswith("weight_scale")]:
        tensors[key] = tensors[key].float().reciprocal()
    save_file(tensors, folder / SINGLE, {"format": "pt"})
    return configured(folder, linear_class="autobitlinear", quantization_mode="offline")


def configured(folder: Path, **entries: Any) -> Path:
    config = read_json(folder / "config.json")
    config["quantization_config"] |= entries
    write_json(folder / "config.json", config)
    return folder


def by_onebitllms(folder: Path) -> Path:
    """As onebitllms writes it: nothing of this package in the config, and the head alone left out."""
    config = read_json(folder / "config.json")
    config = {key: value for key, value in config.items() if "axolotl" not in key}
    config["quantization_config"] = {"quant_method": "bitnet", "modules_to_not_convert": ["lm_head"]}
    write_json(folder / "config.json", config)
    return folder


def same_tokens(engine: Any, model: Any, prompts: list[list[int]], count: int) -> float:
    """Greedy tokens must agree wherever the two best are further apart than logits differ. Returns the
    largest difference of a log-probability."""
    how = SamplingParams(max_tokens=count, temperature=0, logprobs=5, ignore_eos=True)
    answers = engine.generate([{"prompt_token_ids": ids} for ids in prompts], how, use_tqdm=False)
    worst, places = 0.0, []
    for ids, answer in zip(prompts, answers, strict=True):
        tokens = list(answer.outputs[0].token_ids)
        with torch.no_grad():
            expected = model(torch.tensor([ids + tokens])).logits[0, len(ids) - 1 : -1].log_softmax(-1)
        for row, token, found in zip(expected, tokens, answer.outputs[0].logprobs, strict=True):
            best: Tensor = row.topk(2).values
            places.append((int(row.argmax()) == token, float(best[0] - best[1])))
            worst = max([worst, *(abs(entry.logprob - float(row[at])) for at, entry in found.items())])
    assert all(same or margin <= 2 * worst for same, margin in places)
    assert sum(same for same, _ in places) >= 0.9 * len(places)
    return worst


MODELS: dict[str, tuple[str, dict[str, Any]]] = {
    "llama, tied, biases": (
        "Llama",
        {"tie_word_embeddings": True, "attention_bias": True, "mlp_bias": True},
    ),
    "qwen2": ("Qwen2", {"vocab_size": 520}),
    "qwen3": ("Qwen3", {"head_dim": 128}),
    "mistral": ("Mistral", {"sliding_window": None}),
}


@pytest.mark.parametrize("name", MODELS)
def test_ours(served: Serve, tmp_path: Path, name: str) -> None:
    family, options = MODELS[name]
    folder = pack(tmp_path, family, **options)
    worst = same_tokens(served(folder), load_packed(folder, dtype=torch.float32), PROMPTS, 12)
    print(f"{name}: log-probabilities differ by {worst:.2g}")
    assert worst < 0.3


@pytest.mark.parametrize("convention", [by_onebitllms, multiplying])
def test_others(served: Serve, tmp_path: Path, convention: Callable[[Path], Path]) -> None:
    folder = pack(tmp_path, "Llama")
    model = load_packed(folder, dtype=torch.float32)  # ours, before it becomes theirs
    worst = same_tokens(served(convention(folder)), model, PROMPTS, 12)
    print(f"{convention.__name__}: log-probabilities differ by {worst:.2g}")
    assert worst < 0.3


def test_the_demo_s_answers(served: Serve, demo: Path) -> None:
    """Hundreds of held-out questions, answered as in transformers."""
    questions = [
        json.loads(line)["messages"][0] for line in (TINY / "heldout.jsonl").read_text().splitlines()
    ]
    questions = questions[:HELDOUT]
    tokenizer = AutoTokenizer.from_pretrained(demo)
    prompts = [
        tokenizer.apply_chat_template([question], add_generation_prompt=True)["input_ids"]
        for question in questions
    ]
    model = load_packed(demo, dtype=torch.float32)
    expected = []
    for ids in prompts:
        with torch.no_grad():
            tokens = model.generate(torch.tensor([ids]), max_new_tokens=8, do_sample=False)
        expected.append(tokenizer.decode(tokens[0, len(ids) :], skip_special_tokens=True))
    engine = served(demo)
    how = SamplingParams(max_tokens=8, temperature=0)
    found = engine.generate([{"prompt_token_ids": ids} for ids in prompts], how, use_tqdm=False)
    same = [answer.outputs[0].text == text for answer, text in zip(found, expected, strict=True)]
    print(f"{sum(same)} of {len(same)} answers are the same")
    assert all(same) and len(same) == HELDOUT


def test_vllm_serve_answers_a_request(demo: Path) -> None:
    """The command line of the documentation, and the plugin found by its entry point."""
    port = 18765
    command = [Path(sys.executable).parent / "vllm", "serve", demo, "--port", str(port), "--dtype", "float32"]
    command += ["--enforce-eager", "--max-model-len", "64"]
    environment = os.environ | {"VLLM_ENABLE_V1_MULTIPROCESSING": "1"}
    with subprocess.Popen(
        command, env=environment, stdout=subprocess.PIPE, stderr=subprocess.STDOUT
    ) as server:
        try:
            question = {"role": "user", "content": "What is 17 + 25?"}
            body = {"model": str(demo), "messages": [question], "temperature": 0, "max_tokens": 8}
            answer = post(f"http://127.0.0.1:{port}/v1/chat/completions", body, server)
        finally:
            server.terminate()
    tokenizer = AutoTokenizer.from_pretrained(demo)
    ids = tokenizer.apply_chat_template([question], add_generation_prompt=True, return_tensors="pt")[
        "input_ids"
    ]
    with torch.no_grad():
        tokens = load_packed(demo, dtype=torch.float32).generate(ids, max_new_tokens=8, do_sample=False)
    expected = tokenizer.decode(tokens[0, ids.shape[1] :], skip_special_tokens=True)
    assert answer["choices"][0]["message"]["content"] == expected


def post(url: str, body: dict[str, Any], server: subprocess.Popen[bytes]) -> Any:
    """Ask as soon as the server is up."""
    request = urllib.request.Request(url, json.dumps(body).encode(), {"Content-Type": "application/json"})
    end = time.monotonic() + 500
    while time.monotonic() < end and server.poll() is None:
        try:
            with urllib.request.urlopen(request, timeout=120) as answer:
                return json.loads(answer.read())
        except (urllib.error.URLError, ConnectionError):
            time.sleep(2)
    raise AssertionError(f"vllm serve ended or did not come up: {server.stdout and server.stdout.read1()!r}")


# What is refused


def test_a_scale_that_is_missing(served: Serve, tmp_path: Path) -> None:
    folder = pack(tmp_path, "Llama")
    tensors = load_file(folder / SINGLE)
    del tensors["model.layers.1.mlp.up_proj.weight_scale"]
    save_file(tensors, folder / SINGLE, {"format": "pt"})
    with pytest.raises(ValueError, match=r"weight_scale"):
        served(folder)


def test_part_of_a_merged_layer_that_is_dense(served: Serve, tmp_path: Path) -> None:
    folder = configured(pack(tmp_path, "Llama"), modules_to_not_convert=["lm_head", "k_proj"])
    with pytest.raises(ValueError, match=r"as one layer, and 'model\.layers\.0\.self_attn\.k_proj' is dense"):
        served(folder)


def test_a_layer_that_does_more(served: Serve, tmp_path: Path) -> None:
    with pytest.raises(Exception, match="use_rms_norm"):
        served(configured(pack(tmp_path, "Llama"), use_rms_norm=True))


def test_tensor_parallelism() -> None:
    method = BitNetLinearMethod(BitNetConfig({}), "model.layers.0.mlp.down_proj")
    layer = SimpleNamespace(tp_size=2)
    with pytest.raises(ValueError, match="--tensor-parallel-size above 1: a slice of packed bytes"):
        method.create_weights(layer, 64, [32], 128, 32, torch.float32, weight_loader=None)
