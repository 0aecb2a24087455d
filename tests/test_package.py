"""What importing the package costs and needs."""

from __future__ import annotations

import os
import subprocess
import sys
import zipfile
from collections.abc import Callable
from pathlib import Path

import pytest
from torch import nn

import axolotl_bitnet
from axolotl_bitnet.formats.registry import FORMATS
from support import stored
from support.reports import log, moved, names, proof, record, write

SOURCE = Path(axolotl_bitnet.__file__).parent

ALONE = """
import sys

for name in ("axolotl", "triton", "onebitllms", "trl", "peft", "accelerate"):
    sys.modules[name] = None  # what an import finds is: not installed

import torch
from torch import nn
import axolotl_bitnet
from axolotl_bitnet import BitLinear, convert_to_bitlinear, pack_checkpoint, quantize_activations, ternarize
from axolotl_bitnet import VerificationReport, verify_checkpoint

model = nn.Sequential(nn.Linear(16, 8), nn.ReLU(), nn.Linear(8, 4))
assert convert_to_bitlinear(model) == ["0", "2"]
model(torch.randn(3, 16)).sum().backward()
assert isinstance(model[0], BitLinear) and model[0].weight.grad.abs().sum() > 0
"""


def _run(code: str) -> str:
    return subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True).stdout


@pytest.mark.slow
def test_it_works_without_axolotl_and_triton() -> None:
    _run(ALONE)


@pytest.mark.slow
def test_importing_it_loads_next_to_nothing() -> None:
    """The import takes under 50 ms beyond torch's because it imports nothing; so that is what is held."""
    code = (
        "import torch, sys; old = set(sys.modules); import axolotl_bitnet; print(*(set(sys.modules) - old))"
    )
    assert set(_run(code).split()) <= {"axolotl_bitnet", "typing", "importlib"}


def test_public_names_are_few_and_there() -> None:
    assert len(axolotl_bitnet.__all__) <= 16
    for name in axolotl_bitnet.__all__:
        if name != "BitNetPlugin":
            assert getattr(axolotl_bitnet, name).__doc__
    with pytest.raises(AttributeError, match="no attribute 'nothing'"):
        axolotl_bitnet.nothing  # noqa: B018


@pytest.mark.parametrize("module", ["cli.main", "plugin.args"])
def test_what_only_reads_words_does_not_wait_for_torch(module: str) -> None:
    """The command line is loaded with every `axolotl` command, the config's rules with every config."""
    assert _heavy(f"import axolotl_bitnet.{module}") == []


RECIPE = str(SOURCE.parents[1] / "examples" / "falcon-e" / "tiny" / "sft.yaml")


@pytest.mark.parametrize(
    "arguments",
    [["--help"], ["recipes", "FOLDER/recipes"], ["plan", RECIPE], ["doctor"]],
    ids=lambda words: words[0],
)
def test_commands_that_need_no_torch_do_not_import_it(arguments: list[str], tmp_path: Path) -> None:
    """Importing torch takes seconds; without it a command starts in under half a second."""
    words = [word.replace("FOLDER", str(tmp_path)) for word in arguments]
    assert _heavy(f"from axolotl_bitnet.cli.main import main; main({words}, standalone_mode=False)") == []


@pytest.mark.slow
def test_a_report_needs_no_torch(tmp_path: Path) -> None:
    """Of a run with an artifact of every format: how each is run is known without the format itself."""
    pytest.importorskip("matplotlib")
    made = {name: {"verified": True, "path": row.path, "bytes": 1 << 20} for name, row in FORMATS.items()}
    proven = proof(names(3), artifacts=made)
    write(tmp_path, run=record(log()), bitnet=proven, monitor=moved(names(3)))
    words = ["report", str(tmp_path)]
    assert _heavy(f"from axolotl_bitnet.cli.main import main; main({words}, standalone_mode=False)") == []
    page = (tmp_path / "report" / "index.html").read_text(encoding="utf-8")
    assert all(
        words in page for words in ("vllm serve", "llama-cli", "mlx_lm.generate", "axolotl-bitnet chat")
    )


def test_no_help_and_no_mistyped_option_imports_torch() -> None:
    assert _heavy(EVERY_HELP) == []


EVERY_HELP = """
from click.testing import CliRunner
from axolotl_bitnet.cli.main import _COMMANDS, main

for name in _COMMANDS:
    assert CliRunner().invoke(main, [name, "--help"]).exit_code == 0
    assert CliRunner().invoke(main, [name, "--nothing"]).exit_code == 2
"""


def _heavy(code: str) -> list[str]:
    """What a program imports of the libraries that take seconds."""
    report = "import sys; print('heavy', *({'torch', 'transformers', 'axolotl', 'rich'} & set(sys.modules)))"
    return _run(f"{code}\n{report}").splitlines()[-1].split()[1:]


@pytest.mark.slow
def test_the_wheel_carries_code_and_recipes(tmp_path: Path) -> None:
    pytest.importorskip("build")
    pytest.importorskip("hatchling")
    root = SOURCE.parents[1]
    command = [
        sys.executable,
        "-m",
        "build",
        "--wheel",
        "--no-isolation",
        "--outdir",
        str(tmp_path),
        str(root),
    ]
    subprocess.run(command, check=True, capture_output=True)
    (wheel,) = tmp_path.glob("*.whl")
    installed = tmp_path / "site"
    with zipfile.ZipFile(wheel) as archive:
        archive.extractall(installed)
    target = tmp_path / "recipes"
    arguments = [sys.executable, "-m", "axolotl_bitnet", "recipes", str(target)]
    environment = os.environ | {"PYTHONPATH": str(installed)}
    subprocess.run(arguments, check=True, capture_output=True, cwd=tmp_path, env=environment)
    for path in [
        path for kind in ("falcon-e", "convert") for path in (root / "examples" / kind).glob("*.yaml")
    ]:
        assert (target / path.name).read_bytes() == path.read_bytes()
    assert (target / "tiny" / "train.jsonl").is_file()


@pytest.mark.slow
@pytest.mark.once
def test_systems_that_lack_names(tiny_model: Callable[..., nn.Module], tmp_path: Path) -> None:
    """macOS and Windows have neither sched_getaffinity nor fdatasync, nor Axolotl: the tools work there."""
    code = (
        "import os, sys\n"
        "for name in ('sched_getaffinity', 'fdatasync'): vars(os).pop(name, None)\n"
        "for name in ('axolotl', 'trl', 'triton', 'peft', 'accelerate'): sys.modules[name] = None\n"
        "from pathlib import Path\n"
        "from axolotl_bitnet import pack_checkpoint, restore_latents, revert_checkpoint, verify_checkpoint\n"
        "from axolotl_bitnet.storage import safetensors_stream\n"
        "safetensors_stream.FLUSH = 1\n"
        "run = Path(sys.argv[1])\n"
        "pack_checkpoint(run, run / 'packed')\n"
        "revert_checkpoint(run, run / 'dense')\n"
        "restore_latents(run / 'packed', run / 'restored')\n"
        "assert verify_checkpoint(run / 'packed', run).ok and verify_checkpoint(run / 'restored', run).ok\n"
    )
    stored.save(stored.trained(tiny_model, "llama"), tmp_path / "run")
    command = [sys.executable, "-c", code, str(tmp_path / "run")]
    done = subprocess.run(command, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
