"""Reward models in real Axolotl runs on the CPU: a ternary body, a dense score head, packed and read back."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path

import pytest
import torch

pytest.importorskip("axolotl.cli")  # sets up logging, and would take away a handler that was there before

from transformers import AutoModel, AutoModelForSequenceClassification, AutoModelForTokenClassification

from axolotl_bitnet.layers.bitlinear import BitLinear
from axolotl_bitnet.model.convert import convert_to_bitlinear
from axolotl_bitnet.verify.verify import verify_checkpoint
from support.methods import STEPS, flipped, save_base, settings_of
from support.runs import train

pytestmark = pytest.mark.slow

KINDS = {
    "reward_model": (AutoModelForSequenceClassification, "LlamaForSequenceClassification", 1),
    "process_reward_model": (AutoModelForTokenClassification, "LlamaForTokenClassification", 2),
}


@pytest.fixture(scope="module")
def base(tmp_path_factory: pytest.TempPathFactory, tiny_model: Callable[..., torch.nn.Module]) -> Path:
    torch.manual_seed(11)
    return save_base(tiny_model, tmp_path_factory.mktemp("base"))


@pytest.mark.parametrize("kind", KINDS)
def test_a_reward_model_trains_packs_and_judges_alike(
    kind: str, base: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    loader, architecture, labels = KINDS[kind]
    run = train(settings_of(kind, tmp_path, base))
    assert len(run.losses) == STEPS and len(set(run.losses)) > STEPS // 2
    start = AutoModel.from_pretrained(base, dtype=torch.float32)
    convert_to_bitlinear(start)
    assert flipped(run.model.model, start) > 100
    score = run.model.score
    assert type(score) is torch.nn.Linear and score.weight.shape == (labels, 64)
    assert run.trainer.optimizer.state[score.weight]["exp_avg_sq"].sum() > 0  # it trains too

    out, packed = tmp_path / "out", tmp_path / "out" / "packed"
    assert json.loads((out / "bitnet.json").read_text())["dense"] == ["score"]
    assert verify_checkpoint(packed, out).ok
    config = json.loads((packed / "config.json").read_text())
    assert config["architectures"] == [architecture]
    assert config["quantization_config"]["modules_to_not_convert"] == ["score"]

    monkeypatch.setenv("TORCH_COMPILE_DISABLE", "1")  # transformers compiles the activations' quantization
    judge = loader.from_pretrained(packed, dtype=torch.float32).eval()
    assert judge.config.num_labels == labels
    trained = run.model.eval()
    with torch.no_grad():
        for module in trained.modules():  # what packing stores in bfloat16
            for parameter in module.parameters(recurse=False):
                if not isinstance(module, BitLinear):
                    parameter.copy_(parameter.to(torch.bfloat16))
        ids = torch.randint(3, 200, (3, 9))
        ours, theirs = trained(input_ids=ids).logits, judge(input_ids=ids).logits
    assert ours.shape[-1] == labels and ours.std() > 0
    assert torch.equal(ours, theirs)
