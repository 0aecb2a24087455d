"""The command line: `python -m axolotl_bitnet`, `axolotl-bitnet` and `axolotl bitnet` are one group."""

from __future__ import annotations

import subprocess
import sys
from collections.abc import Callable
from importlib.metadata import entry_points
from pathlib import Path

import pytest
import torch
from click.testing import CliRunner
from safetensors.torch import load_file, save_file

from axolotl_bitnet.convert import convert_to_bitlinear
from axolotl_bitnet.integration.cli import main


@pytest.fixture
def run_folder(tmp_path: Path, tiny_model: Callable[..., torch.nn.Module]) -> Path:
    model = tiny_model("Llama")
    convert_to_bitlinear(model)
    model.save_pretrained(tmp_path / "run")
    return tmp_path / "run"


def _call(*arguments: str | Path) -> tuple[int, str]:
    result = CliRunner().invoke(main, [str(argument) for argument in arguments])
    return result.exit_code, result.output


def test_pack_then_verify(run_folder: Path) -> None:
    packed = run_folder / "packed"
    code, output = _call("pack", run_folder, packed)
    assert code == 0 and "MiB" in output
    code, output = _call("verify", packed)
    assert code == 0 and output.startswith("verified: 14 ternary layers")


def test_verify_fails_on_one_changed_code(run_folder: Path) -> None:
    packed = run_folder / "packed"
    _call("pack", run_folder, packed)
    path = packed / "model.safetensors"
    tensors = load_file(path)
    name = "model.layers.1.self_attn.q_proj.weight"
    byte = int(tensors[name][3, 5])
    tensors[name][3, 5] = byte & ~3 | ((byte & 3) + 1) % 3
    save_file(tensors, path, {"format": "pt"})
    code, output = _call("verify", packed, "--against", run_folder)
    assert code == 1 and "model.layers.1.self_attn.q_proj: codes differ" in output


def test_pack_refuses_an_existing_target_unless_told(run_folder: Path) -> None:
    packed = run_folder / "packed"
    assert _call("pack", run_folder, packed)[0] == 0
    code, output = _call("pack", run_folder, packed)
    assert code == 2 and "--overwrite" in output
    assert _call("pack", run_folder, packed, "--overwrite")[0] == 0


def test_errors_are_sentences(tmp_path: Path) -> None:
    code, output = _call("pack", tmp_path, tmp_path / "packed")
    assert code == 2 and "config.json does not exist" in output and "Traceback" not in output
    code, output = _call("verify", tmp_path)
    assert code == 2 and "Traceback" not in output


def test_recipes_are_copied_once(tmp_path: Path) -> None:
    target = tmp_path / "recipes"
    code, output = _call("recipes", target)
    assert code == 0 and "sft.yaml" in output
    names = {path.name for path in target.iterdir()}
    assert {"sft.yaml", "sft-1b.yaml", "dpo.yaml", "README.md", "tiny"} <= names
    (target / "sft.yaml").write_text("mine")
    code, output = _call("recipes", target)
    assert code == 2 and "not empty" in output and (target / "sft.yaml").read_text() == "mine"


def test_help_of_every_command_has_an_example() -> None:
    for name, command in main.commands.items():
        code, output = _call(name, "--help")
        assert code == 0 and "Example" in output and command.help


def test_module_and_entry_points_lead_here() -> None:
    result = subprocess.run(
        [sys.executable, "-m", "axolotl_bitnet", "--help"], capture_output=True, text=True, check=True
    )
    assert "python -m axolotl_bitnet" in result.stdout and "verify" in result.stdout
    (command,) = [point for point in entry_points(group="axolotl.cli_commands") if point.name == "bitnet"]
    assert command.load() is main
    (plugin,) = [point for point in entry_points(group="axolotl.plugins") if point.name == "bitnet"]
    assert plugin.value == "axolotl_bitnet:BitNetPlugin"  # another spelling would load it twice
    (script,) = [point for point in entry_points(group="console_scripts") if point.name == "axolotl-bitnet"]
    assert script.load() is main
