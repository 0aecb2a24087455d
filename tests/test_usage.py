"""What the model card and the report give people to copy."""

from __future__ import annotations

import shlex
from pathlib import Path

import pytest
import torch
from transformers import AutoConfig, AutoModelForCausalLM, AutoTokenizer

from axolotl_bitnet import convert_to_bitlinear, pack_checkpoint, revert_checkpoint
from axolotl_bitnet.formats.registry import FORMATS
from support import TINY
from support.processes import python

ODD = """a "run", it's $HOME's"""


@pytest.mark.parametrize("name", FORMATS)
def test_commands_are_one_line_and_name_the_path(name: str) -> None:
    for way in FORMATS[name].ways_to_run(f"{ODD}/{FORMATS[name].path}"):
        if way.language == "bash":
            assert "\n" not in way.text
            assert f"{ODD}/{FORMATS[name].path}" in shlex.split(way.text)
        else:
            compile(way.text, name, "exec")


@pytest.fixture(scope="module")
def run(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("usage") / ODD
    torch.manual_seed(1)
    model = AutoModelForCausalLM.from_config(AutoConfig.from_pretrained(TINY / "model"))
    convert_to_bitlinear(model)
    model.save_pretrained(folder)
    AutoTokenizer.from_pretrained(TINY / "model").save_pretrained(folder)
    pack_checkpoint(folder, folder / "packed")
    revert_checkpoint(folder, folder / "dense")
    return folder


@pytest.mark.slow
def test_python_runs(run: Path) -> None:
    """In one process, for it imports more than it runs; neither knows of the other's names."""
    texts = []
    for name in ("packed", "dense"):
        (way,) = (way for way in FORMATS[name].ways_to_run(str(run / name)) if way.language == "python")
        texts.append(way.text)
    each = "import sys\nfor text in sys.argv[1:]: exec(text, {'__name__': '__main__'})"
    done = python("-c", each, *texts, TORCH_COMPILE_DISABLE="1", HF_HUB_OFFLINE="1")
    assert done.stdout.count("The capital of France is") == 2
