"""What the model card and the report give people to copy."""

from __future__ import annotations

import os
import shlex
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from transformers import AutoConfig, AutoModelForCausalLM, AutoTokenizer

from axolotl_bitnet import convert_to_bitlinear, pack_checkpoint, revert_checkpoint
from axolotl_bitnet.formats.registry import FORMATS
from axolotl_bitnet.formats.usage import usages

TINY = Path(__file__).parents[1] / "examples" / "falcon-e" / "tiny" / "model"
ODD = """a "run", it's $HOME's"""


@pytest.mark.parametrize("name", FORMATS)
def test_commands_are_one_line_and_name_the_path(name: str) -> None:
    for way in usages(name, f"{ODD}/{FORMATS[name].path}"):
        if way.language == "bash":
            assert "\n" not in way.text
            assert f"{ODD}/{FORMATS[name].path}" in shlex.split(way.text)
        else:
            compile(way.text, name, "exec")


@pytest.fixture(scope="module")
def run(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("usage") / ODD
    torch.manual_seed(1)
    model = AutoModelForCausalLM.from_config(AutoConfig.from_pretrained(TINY))
    convert_to_bitlinear(model)
    model.save_pretrained(folder)
    AutoTokenizer.from_pretrained(TINY).save_pretrained(folder)
    pack_checkpoint(folder, folder / "packed")
    revert_checkpoint(folder, folder / "dense")
    return folder


@pytest.mark.parametrize("name", ["packed", "dense"])
def test_python_runs(run: Path, name: str) -> None:
    (way,) = (way for way in usages(name, str(run / name)) if way.language == "python")
    environment = os.environ | {"TORCH_COMPILE_DISABLE": "1", "HF_HUB_OFFLINE": "1"}
    done = subprocess.run(
        [sys.executable, "-c", way.text], env=environment, text=True, capture_output=True, check=False
    )
    assert done.returncode == 0, done.stderr
    assert "The capital of France is" in done.stdout
