"""Packed models in a vLLM engine on a CPU: the trained model's tokens, whoever packed it; what is refused."""

from __future__ import annotations

import json
import shutil
import statistics
from collections.abc import Callable
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file
from transformers import AutoTokenizer
from vllm import SamplingParams

from axolotl_bitnet import load_packed, ternary
from axolotl_bitnet.ops import unpack_codes
from axolotl_bitnet.serving.vllm import BitNetConfig, BitNetLinearMethod
from axolotl_bitnet.storage.atomic import read_json, write_json
from axolotl_bitnet.storage.safetensors_stream import SINGLE
from support import TINY
from support.greedy import Greedy, differences, greedy
from support.packed_models import by_onebitllms, configured, multiplying, pack

pytestmark = pytest.mark.timeout(1800)

Serve = Callable[..., Any]
PROMPTS = [[(i * 37 % 500 + 3) % 512 for i in range(length)] for length in (2, 9, 40, 150)]
HELDOUT = 300


def in_transformers(folder: Path) -> list[Greedy]:
    """To be asked before vLLM is: its engine changes the classes of the architectures that it takes from
    transformers, in this process."""
    model = load_packed(folder, dtype=torch.float32)
    return [greedy(model, ids, 12) for ids in PROMPTS]


def same_tokens(engine: Any, expected: list[Greedy], what: str) -> None:
    """Greedy tokens agree wherever the two best are further apart than log-probabilities differ."""
    how = SamplingParams(max_tokens=12, temperature=0, logprobs=5, ignore_eos=True)
    answers = engine.generate([{"prompt_token_ids": ids} for ids in PROMPTS], how, use_tqdm=False)
    found: list[list[float]] = []
    for greedy_one, answer in zip(expected, answers, strict=True):
        said = answer.outputs[0]
        rows = [{at: entry.logprob for at, entry in row.items()} for row in said.logprobs]
        off, margin = differences(greedy_one, list(said.token_ids), rows)
        found.append(off)
        assert margin is None or margin <= 2 * off[-1]
    typical = [statistics.median(off) for off in found]
    print(f"{what}: log-probabilities differ by", *(f"{off:.1g}" for off in typical), "(medians of prompts)")
    # Norms and attention sum in another order. Where that moves an activation over a rounding boundary, its
    # code is another one, for all that follows the prompt: 0.02 on so small a model, and 1e-6 elsewhere.
    assert min(typical) < 1e-5 and max(map(max, found)) < 0.3 and sum(map(len, found)) >= 24


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
    expected = in_transformers(folder)
    same_tokens(served(folder), expected, name)


@pytest.mark.parametrize("convention", [by_onebitllms, multiplying])
def test_others(served: Serve, tmp_path: Path, convention: Callable[[Path], Path]) -> None:
    folder = pack(tmp_path)
    expected = in_transformers(folder)  # ours, before it becomes theirs
    same_tokens(served(convention(folder)), expected, convention.__name__)


@pytest.fixture(scope="module")
def bitnets(tmp_path_factory: pytest.TempPathFactory) -> tuple[dict[str, Path], list[Greedy]]:
    """Microsoft's architecture by our convention and by theirs, whose config names no ``linear_class``: that
    the scale multiplies, the architecture alone says. vLLM takes it from transformers."""
    root = tmp_path_factory.mktemp("bitnets")
    folders = {"ours": pack(root, "BitNet", tie_word_embeddings=True), "Microsoft's": root / "theirs"}
    expected = in_transformers(folders["ours"])
    theirs = multiplying(shutil.copytree(folders["ours"], folders["Microsoft's"]))
    config = read_json(theirs / "config.json")
    config["quantization_config"] = {"quant_method": "bitnet", "modules_to_not_convert": ["lm_head"]}
    write_json(theirs / "config.json", config)
    return folders, expected


@pytest.mark.parametrize("whose", ["ours", "Microsoft's"])
def test_bitnet(served: Serve, bitnets: tuple[dict[str, Path], list[Greedy]], whose: str) -> None:
    folders, expected = bitnets
    same_tokens(served(folders[whose]), expected, f"bitnet, {whose}")


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_a_merged_layer_is_the_definition(served: Serve, tmp_path: Path, dtype: torch.dtype) -> None:
    """q, k and v in one layer of vLLM's, each with its own scale and bias: equal bits on equal input."""
    folder = pack(tmp_path, attention_bias=True, mlp_bias=True)
    tensors = load_file(folder / SINGLE)
    engine = served(folder, dtype=str(dtype).removeprefix("torch."))
    merged = {
        "self_attn.qkv_proj": ["self_attn.q_proj", "self_attn.k_proj", "self_attn.v_proj"],
        "mlp.gate_up_proj": ["mlp.gate_proj", "mlp.up_proj"],
        "mlp.down_proj": ["mlp.down_proj"],
    }
    x = {columns: torch.randn(5, columns).to(dtype) for columns in (256, 512)}

    def outputs(model: Any) -> list[torch.Tensor]:
        layers = [model.get_submodule(f"model.layers.1.{name}") for name in merged]
        return [layer.quant_method.apply(layer, x[layer.input_size], layer.bias) for layer in layers]

    (found,) = engine.apply_model(outputs)
    for y, names in zip(found, merged.values(), strict=True):
        parts = []
        for key in [f"model.layers.1.{name}" for name in names]:
            codes_w, s = unpack_codes(tensors[f"{key}.weight"]), tensors[f"{key}.weight_scale"].float()
            codes, r = ternary.quantize_activations(x[codes_w.shape[1]])
            part = ternary.dequantize_output(ternary.matmul_codes(codes, codes_w), r, s).to(dtype)
            parts.append(part + tensors[f"{key}.bias"].to(dtype))
        assert torch.equal(y, torch.cat(parts, dim=-1)), names


def test_compiled(served: Serve, tmp_path: Path) -> None:
    """As ``vllm serve`` runs it by default: vLLM compiles the model, around our operations."""
    folder = pack(tmp_path, attention_bias=True)
    expected = in_transformers(folder)
    same_tokens(served(folder, enforce_eager=False), expected, "compiled")


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


# What is refused


def test_a_scale_that_is_missing(served: Serve, tmp_path: Path) -> None:
    folder = pack(tmp_path)
    tensors = load_file(folder / SINGLE)
    del tensors["model.layers.1.mlp.up_proj.weight_scale"]
    save_file(tensors, folder / SINGLE, {"format": "pt"})
    with pytest.raises(ValueError, match=r"weight_scale"):
        served(folder)


def test_part_of_a_merged_layer_that_is_dense(served: Serve, tmp_path: Path) -> None:
    folder = configured(pack(tmp_path), modules_to_not_convert=["lm_head", "k_proj"])
    with pytest.raises(ValueError, match=r"as one layer, and 'model\.layers\.0\.self_attn\.k_proj' is dense"):
        served(folder)


def test_a_layer_that_does_more(served: Serve, tmp_path: Path) -> None:
    with pytest.raises(Exception, match="use_rms_norm"):
        served(configured(pack(tmp_path), use_rms_norm=True))


def test_tensor_parallelism() -> None:
    method = BitNetLinearMethod(BitNetConfig({}), "model.layers.0.mlp.down_proj")
    layer = SimpleNamespace(tp_size=2)
    with pytest.raises(ValueError, match="--tensor-parallel-size above 1: a slice of packed bytes"):
        method.create_weights(layer, 64, [32], 128, 32, torch.float32, weight_loader=None)
