"""Every YAML of examples/ validates in Axolotl, and keeps the promises of its comments."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import yaml

from axolotl_bitnet.plugin.refusals import launch_refusal, refusals, rounds_stochastically

EXAMPLES = Path(__file__).resolve().parents[1] / "examples"
RECIPES = sorted(EXAMPLES.rglob("*.yaml"))
ONE_GPU = {"pretrain-tiny.yaml", "convert.yaml", "sft-1b.yaml", "dpo.yaml"}
FULL = [path for path in RECIPES if path.parent.name == "falcon-e" and path.name not in ONE_GPU]


def _load(path: Path) -> dict[str, Any]:
    return yaml.safe_load(path.read_text(encoding="utf-8"))


def test_they_are_all_here() -> None:
    assert {path.name for path in FULL} >= {"sft.yaml", "cpt.yaml"}
    assert {path.name for path in RECIPES} >= ONE_GPU
    assert (EXAMPLES / "falcon-e" / "tiny" / "sft.yaml") in RECIPES


@pytest.mark.parametrize("path", RECIPES, ids=lambda path: str(path.relative_to(EXAMPLES)))
def test_it_validates(path: Path) -> None:
    pytest.importorskip("axolotl")
    from axolotl.cli.config import prepare_plugins
    from axolotl.utils.config import validate_config
    from axolotl.utils.dict import DictDefault

    settings = _load(path)
    cfg = DictDefault(settings)
    prepare_plugins(cfg)
    gpu = {"bf16": True, "fp8": True, "tf32": True, "n_gpu": 2, "compute_capability": "sm_90"}
    validated = validate_config(cfg, capabilities=gpu, env_capabilities={"torch_version": "2.11.0"}).to_dict()
    lost = {key for key in settings if key not in validated}
    assert not lost, f"Axolotl does not know {lost}, and drops them"
    for key, value in settings.get("bitnet", {}).items():
        assert validated["bitnet"][key] == value


@pytest.mark.parametrize("path", RECIPES, ids=lambda path: str(path.relative_to(EXAMPLES)))
def test_it_is_ternary_and_explained(path: Path) -> None:
    settings = _load(path)
    assert settings["use_onebitllms"] is True and "axolotl_bitnet.BitNetPlugin" in settings["plugins"]
    text = path.read_text(encoding="utf-8")
    lines = [line for line in text.splitlines() if line.strip() and not line.lstrip().startswith(("#", "- "))]
    top = [line for line in lines if not line.startswith(" ")]
    headings = (
        "plugins:",
        "bitnet:",
        "datasets:",
        "special_tokens:",
        "eot_tokens:",
        "fsdp_config:",
        "accelerator_config:",
    )
    silent = [line for line in top if "#" not in line and not line.startswith(headings)]
    assert not silent, "every key says what it does"


@pytest.mark.parametrize("path", FULL, ids=lambda path: path.name)
def test_it_shards_with_fsdp2_and_saves_whole_checkpoints(path: Path) -> None:
    settings = _load(path)
    sharding = settings["fsdp_config"]
    assert settings["fsdp_version"] == 2 and sharding["state_dict_type"] == "FULL_STATE_DICT"
    assert sharding["activation_checkpointing"] is True and "gradient_checkpointing" not in settings
    assert settings["bf16"] is True and "flash_attention" not in settings


SEVERAL, HALF = "# --- several GPUs", "# --- half the memory"


def _uncommented(path: Path, heading: str) -> dict[str, Any]:
    """The keys of the commented block below a heading."""
    lines = path.read_text(encoding="utf-8").split(heading)[1].splitlines()[1:]
    block = [line.removeprefix("# ") for line in lines[: lines.index("")]]
    return yaml.safe_load("\n".join(block))


def _low_memory(path: Path) -> dict[str, Any]:
    settings = _load(path) | _uncommented(path, HALF)
    return settings | {"bitnet": settings["bitnet"] | {"latent_dtype": "bfloat16"}}


@pytest.mark.parametrize("name", ["sft-1b.yaml", "dpo.yaml"])
def test_it_runs_on_one_gpu_and_its_comments_hold(name: str) -> None:
    path = EXAMPLES / "falcon-e" / name
    settings = _load(path)
    assert settings["gradient_checkpointing"] is True and "fsdp_config" not in settings
    several = _uncommented(path, SEVERAL)
    assert several["fsdp_version"] == 2 and several["fsdp_config"]["activation_checkpointing"] is True
    low = _low_memory(path)
    assert rounds_stochastically(low)
    assert refusals(settings) == refusals(low) == refusals(low | several) == []


def test_fsdp_without_a_launcher_says_what_to_do() -> None:
    sharded, single = (_load(EXAMPLES / "falcon-e" / name) for name in ("sft.yaml", "sft-1b.yaml"))
    text = launch_refusal(sharded, {})
    assert text is not None and "gradient_checkpointing: true" in text and "--launcher torchrun" in text
    assert launch_refusal(sharded, {"LOCAL_RANK": "0"}) is None and launch_refusal(single, {}) is None


def test_effective_rates_are_upstreams() -> None:
    for name, rate in (("sft.yaml", 5e-4), ("sft-1b.yaml", 5e-4), ("cpt.yaml", 5e-4), ("dpo.yaml", 1e-5)):
        settings = _load(EXAMPLES / "falcon-e" / name)
        effective = settings["learning_rate"] * settings["bitnet"]["learning_rate_multiplier"]
        assert effective == pytest.approx(rate)
