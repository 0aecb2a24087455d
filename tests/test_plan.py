"""`axolotl bitnet plan`: what a config will do, without weights."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import yaml
from click.testing import CliRunner

from axolotl_bitnet.cli.main import main
from axolotl_bitnet.plugin.args import BitNetConfig
from axolotl_bitnet.plugin.plan import _PLAIN, base_config, plan_run
from test_memory import SHAPES

RECIPES = Path(__file__).parents[1] / "examples" / "falcon-e"


def _recipe(name: str = "sft-1b.yaml", **keys: Any) -> dict[str, Any]:
    return yaml.safe_load((RECIPES / name).read_text()) | keys


@pytest.fixture
def base(tmp_path: Path) -> Path:
    (tmp_path / "base").mkdir()
    (tmp_path / "base" / "config.json").write_text(json.dumps(SHAPES["1B"]))
    return tmp_path / "base"


def _call(*words: str | Path) -> tuple[int, str]:
    result = CliRunner().invoke(main, ["plan", *map(str, words)])
    return result.exit_code, result.output


def test_a_recipe_as_text_and_as_json(base: Path) -> None:
    code, text = _call(RECIPES / "sft-1b.yaml", "--base", base)
    assert code == 0, text
    assert "effective learning rate: 0.0005 (all parameters)" in text
    assert "168 linear layers become ternary" in text and "1,719,764,992 parameters" in text
    assert "packed" in text and "nothing in this config is refused" in text
    code, text = _call(RECIPES / "sft-1b.yaml", "--base", base, "--json")
    found = json.loads(text)
    assert code == 0 and found["refused"] == [] and list(found["memory"]) == ["1", "2", "4", "8"]
    assert found["memory"]["1"]["peak"] / 2**30 == pytest.approx(31.97, rel=0.1)
    assert found["artifacts"]["latents"] == 4 * 1719764992


def test_refusals_are_all_told_and_the_status_says_so(base: Path, tmp_path: Path) -> None:
    config = tmp_path / "config.yaml"
    bad = _recipe(adapter="lora", optimizer="adamw_torch_8bit", optim_args="bf16_stochastic_round=True")
    config.write_text(yaml.safe_dump(bad))
    code, text = _call(config, "--base", base)
    assert code == 1 and text.count("refused: ") == 2
    assert "adapter: lora" in text and "no effect on float32 latents" in text


@pytest.mark.parametrize(
    ("keys", "words"),
    [
        ({"use_onebitllms": None}, "trains a dense model"),
        ({"bitnet": {"latent_type": "float32"}}, "latent_type"),
        ({"bitnet": {"learning_rate_multiplier": -1}}, "greater than 0"),
        ({"bitnet": {"ramp_steps": 5}, "max_steps": 4}, "before the model is ternary"),
        ({"fsdp_version": 1, "fsdp_config": {"x": 1}, "bitnet": {"latent_dtype": "bfloat16"}}, "FSDP1"),
        ({"bitnet": {"skip_modules": ["nothing"]}}, "matches no linear layer"),
    ],
)
def test_each_refusal(keys: dict[str, Any], words: str) -> None:
    found = plan_run(_recipe(**keys), SHAPES["1B"])
    assert len(found.refused) == 1 and words in found.refused[0]


def test_a_quantized_base_is_refused() -> None:
    found = plan_run(_recipe(), SHAPES["1B"] | {"quantization_config": {"quant_method": "bitnet"}})
    assert "quantized already (bitnet)" in found.refused[0]
    online = {"quant_method": "bitnet", "quantization_mode": "online"}
    found = plan_run(_recipe(), SHAPES["1B"] | {"quantization_config": online})  # bitlinear holds codes
    assert "quantized already (bitnet)" in found.refused[0]
    found = plan_run(
        _recipe(), SHAPES["1B"] | {"quantization_config": online | {"linear_class": "autobitlinear"}}
    )
    assert found.refused == []


def test_exports_that_would_fail_are_refused(base: Path, tmp_path: Path) -> None:
    """By the config, and by the tokenizer beside it."""
    pytest.importorskip("gguf")
    windowed = SHAPES["1B"] | {"architectures": ["MistralForCausalLM"], "model_type": "mistral"}
    windowed |= {"sliding_window": 128}
    found = plan_run(_recipe(bitnet={"export": ["packed", "mlx"]}), windowed)
    assert ["export: [mlx]" in line for line in found.refused] == [True], found.refused
    (base / "config.json").write_text(json.dumps(SHAPES["1B"] | {"architectures": ["LlamaForCausalLM"]}))
    (base / "tokenizer.json").write_text("{}")
    config = tmp_path / "config.yaml"
    config.write_text(yaml.safe_dump(_recipe(base_model=str(base), bitnet={"export": ["gguf-q2_0"]})))
    code, text = _call(config)
    assert code == 1 and "`bitnet.export: [gguf-q2_0]` would fail" in text and "tokenizer" in text


def test_falcon_under_fsdp_is_refused() -> None:
    old = {"model_type": "falcon", "hidden_size": 64}
    assert "does not support the Falcon architecture" in plan_run(_recipe("sft.yaml"), old).refused[0]


def test_scope_and_layouts() -> None:
    options = {"learning_rate_multiplier": 10, "learning_rate_scope": "ternary"}
    found = plan_run(_recipe("sft.yaml", bitnet=options), SHAPES["3B"])
    assert found.rates == {"ternary weights": pytest.approx(5e-4), "everything else": 5e-5}
    assert found.sharding == "fsdp2" and found.memory[8].peak < found.memory[1].peak / 1.5
    dpo = plan_run(_recipe("dpo.yaml"), SHAPES["3B"])
    assert dpo.tokens == 2 * 8192 and dpo.memory[1].frozen == 2 * dpo.outline.parameters
    assert plan_run(_recipe(deepspeed={"zero_optimization": {"stage": 2}}), SHAPES["1B"]).memory == {}


def test_what_decides_the_head(tmp_path: Path) -> None:
    """Compiled and chunked losses keep no float32 logits; a preference method's is its own."""
    shape = SHAPES["1B"]

    def work(name: str = "sft-1b.yaml", **keys: Any) -> float:
        return plan_run(_recipe(name, **keys), shape).memory[1].work

    fused = work(liger_fused_linear_cross_entropy=True)
    assert fused < work(torch_compile=True) < 0.6 * work()
    assert work("dpo.yaml", torch_compile=True) == work("dpo.yaml")
    assert plan_run(_recipe(torch_compile=True), shape).memory[1].codes == 0

    block = {"learning_rate_multiplier": 10, "teacher": "base"}
    taught = plan_run(_recipe(bitnet=block), shape)
    assert taught.outline is not None and taught.memory[1].frozen == 2 * taught.outline.parameters
    assert taught.memory[1].work == fused
    (tmp_path / "config.json").write_text(json.dumps(SHAPES["3B"]))
    larger = plan_run(_recipe(bitnet=block | {"teacher": str(tmp_path)}), shape)
    assert larger.memory[1].frozen > taught.memory[1].frozen and not larger.notes
    unknown = plan_run(_recipe(bitnet=block | {"teacher": str(tmp_path / "none")}), shape)
    assert unknown.memory[1].frozen == 0 and "the teacher's memory is not planned" in unknown.notes[0]


def test_what_cannot_be_planned_is_said(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("HF_HUB_OFFLINE", "1")
    monkeypatch.setenv("HF_HOME", str(tmp_path))
    code, text = _call(RECIPES / "sft-1b.yaml")
    assert code == 0 and "layers, memory and sizes are not planned: tiiuae/" in text and "--base" in text
    found = plan_run(_recipe(), {"model_type": "gpt2"})
    assert "gpt2" in found.notes[0] and not found.memory
    path = tmp_path / "list.yaml"
    path.write_text("- 1")
    assert _call(path)[0] == 2
    path.write_text("a: [")
    assert "not YAML" in _call(path)[1]


def test_a_base_in_the_hubs_cache_is_found(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("HF_HOME", str(tmp_path))
    monkeypatch.delenv("HF_HUB_CACHE", raising=False)
    cache = tmp_path / "hub" / "models--me--model"
    (cache / "refs").mkdir(parents=True)
    (cache / "refs" / "main").write_text("abc")
    (cache / "snapshots" / "abc").mkdir(parents=True)
    (cache / "snapshots" / "abc" / "config.json").write_text('{"model_type": "llama"}')
    assert base_config({"base_model": "me/model"})[0] == {"model_type": "llama"}


def test_what_passes_at_first_sight_passes_the_schema() -> None:
    """The quick check may be stricter than pydantic, never looser."""
    assert _PLAIN.keys() <= BitNetConfig.model_fields.keys()
    values: list[Any] = [
        0,
        1,
        -1,
        2.5,
        float("inf"),
        True,
        None,
        "all",
        "ternary",
        "float32",
        "bfloat16",
        "bf16",
        "x",
    ]
    values += ["auto", "native", "base", "stretch", "", [], ["packed"], ["x"], [1], {}]
    for key, plain in _PLAIN.items():
        passed = [value for value in values if plain(value)]
        assert passed, key
        for value in passed:
            BitNetConfig(**{key: value})
