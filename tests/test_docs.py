"""Every command of the documentation is run here; one that this file does not know is a failure."""

from __future__ import annotations

import re
import shlex
import shutil
import subprocess
import sys
from collections.abc import Callable
from importlib.metadata import version
from pathlib import Path

import pytest
import torch
from click.testing import CliRunner
from transformers import AutoTokenizer

import axolotl_bitnet
from axolotl_bitnet.cli.main import main
from axolotl_bitnet.model.convert import convert_to_bitlinear
from axolotl_bitnet.model.fingerprint import fingerprint_model
from axolotl_bitnet.plugin.artifacts import finish_run
from support import ROOT
from support.zoo import HAS_GGUF, MADE

DOCUMENTS = [
    ROOT / "README.md",
    ROOT / "CONTRIBUTING.md",
    *sorted((ROOT / "docs").glob("*.md")),
    *sorted((ROOT / "examples").rglob("README.md")),
]


def _commands() -> list[tuple[str, str]]:
    found = []
    for path in DOCUMENTS:
        for block in re.findall(r"```(?:bash|sh)\n(.*?)```", path.read_text(encoding="utf-8"), re.DOTALL):
            lines = block.replace("\\\n", " ").splitlines()
            found += [(path.name, line.split("  #")[0].strip()) for line in lines if line.strip()]
    return list(dict.fromkeys(found))


COMMANDS = _commands()
SCRIPT = (pytest.mark.slow, pytest.mark.once)


@pytest.fixture(scope="module")
def workplace(tmp_path_factory: pytest.TempPathFactory, tiny_model: Callable[..., torch.nn.Module]) -> Path:
    """A folder with a finished run under the name that the documents use."""
    folder = tmp_path_factory.mktemp("docs")
    run = folder / "outputs" / "falcon-e-3b-sft"
    tokenizer = AutoTokenizer.from_pretrained(ROOT / "examples" / "falcon-e" / "tiny" / "model")
    torch.manual_seed(0)
    model = tiny_model("Llama", vocab_size=len(tokenizer))
    convert_to_bitlinear(model)
    model.save_pretrained(run)
    tokenizer.save_pretrained(run)
    finish_run(run, fingerprint_model(model), MADE, verify=True)
    return folder


def test_there_are_commands_to_run() -> None:
    assert len(COMMANDS) >= 10


SECONDS = re.compile("^python|axolotl-bitnet (verify|report) ")
"""Commands that take seconds."""


@pytest.mark.parametrize(
    ("document", "command"),
    [
        pytest.param(*found, marks=[pytest.mark.slow, pytest.mark.once] if SECONDS.search(found[1]) else ())
        for found in COMMANDS
    ],
)
def test_command(document: str, command: str, workplace: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(workplace)
    words = shlex.split(command)
    if words[:2] == ["pip", "install"]:
        assert version("axolotl-bitnet") == axolotl_bitnet.__version__  # this environment was made by it
    elif words[:2] == ["vllm", "serve"]:
        # Needs vLLM: tests/with_vllm serves such a folder.
        assert (workplace / words[2] / "config.json").is_file() and not words[3:]
    elif words[0] == "make":
        subprocess.run(["make", "-n", *words[1:]], cwd=ROOT, check=True, capture_output=True)
    elif words[:2] == ["axolotl", "train"]:
        # Needs GPUs and downloads; test_recipes.py validates the file, and test_plugin.py trains.
        assert (ROOT / words[2]).is_file()
        assert words[3:] in ([], ["--launcher", "torchrun"], ["--launcher", "python"])
    elif words[0] == "axolotl-bitnet" or words[:2] == ["axolotl", "bitnet"]:
        cli = main if words[0] == "axolotl-bitnet" else pytest.importorskip("axolotl.cli.main").cli
        if "gguf" in command and not HAS_GGUF:
            pytest.skip("needs the gguf package")
        shutil.rmtree(workplace / "my-recipes", ignore_errors=True)
        arguments = [str(ROOT / word) if word.startswith("examples/") else word for word in words[1:]]
        result = CliRunner().invoke(cli, arguments)
        assert result.exit_code == 0, result.output
    elif words[0] == "python":
        script = ROOT / words[1]
        assert script.is_file()
        result = subprocess.run([sys.executable, script, *words[2:]], capture_output=True, text=True)
        assert result.returncode == 0, result.stderr[-3000:]
    else:
        pytest.fail(f"{document} documents a command that no test runs: {command}")


def test_python_without_axolotl_runs(workplace: Path, tiny_model: Callable[..., torch.nn.Module]) -> None:
    blocks = re.findall(r"```python\n(.*?)```", (ROOT / "docs" / "python.md").read_text("utf-8"), re.DOTALL)
    assert blocks
    for block in blocks:
        code = block.replace('"out', f'"{workplace}/readme')
        exec(compile(code, "python.md", "exec"), {"model": tiny_model("Llama")})


def test_python_of_the_kernels_page_runs(tiny_model: Callable[..., torch.nn.Module]) -> None:
    (code,) = re.findall(r"```python\n(.*?)```", (ROOT / "docs/kernels.md").read_text("utf-8"), re.DOTALL)
    model = tiny_model("Llama")
    convert_to_bitlinear(model)
    ids = torch.randint(3, 128, (2, 7))
    before = model.model.layers[0].mlp.up_proj.weight.detach().clone()
    optimizer = torch.optim.AdamW(model.parameters())
    names = {"model": model, "optimizer": optimizer, "micro_batches": [dict(input_ids=ids, labels=ids)] * 2}
    exec(compile(code, "kernels.md", "exec"), names)
    assert not torch.equal(model.model.layers[0].mlp.up_proj.weight, before)


def test_python_of_the_run_it_page_runs(workplace: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(workplace)
    (code,) = re.findall(r"```python\n(.*?)```", (ROOT / "docs/run-it.md").read_text("utf-8"), re.DOTALL)
    names: dict[str, torch.nn.Module] = {}
    exec(compile(code.replace('"cuda"', '"cpu"'), "run-it.md", "exec"), names)
    assert next(names["model"].parameters()).dtype == torch.bfloat16


def test_links_lead_somewhere() -> None:
    for path in DOCUMENTS:
        for target in re.findall(r"\]\((?!https?://)([^)#]+)", path.read_text(encoding="utf-8")):
            assert (path.parent / target).exists(), f"{path.name} links to {target}"


def test_config_page_names_every_key_and_default() -> None:
    from axolotl_bitnet.plugin.args import BitNetConfig

    page = (ROOT / "docs" / "config.md").read_text(encoding="utf-8")
    documented = dict(re.findall(r"^\| `(\w+)` \| `([^`]*)` \|", page, re.MULTILINE))
    defaults = BitNetConfig().model_dump()
    shown = {
        key: "null" if value is None else str(value).lower() if isinstance(value, bool) else str(value)
        for key, value in defaults.items()
    }
    assert documented == {key: text.replace("'", "") for key, text in shown.items()}
