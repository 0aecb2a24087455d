"""`axolotl bitnet doctor`: what is installed, what will run, what is missing for what."""

from __future__ import annotations

import json

import pytest
from click.testing import CliRunner

from axolotl_bitnet.cli.doctor import GPU, gpus_of, problems_of
from axolotl_bitnet.cli.main import main

SMI = "NVIDIA H100 80GB HBM3, 81559, 9.0, 580.159.04\nTesla T4, 15360, 7.5, 580.159.04\n"
WHOLE: dict[str, str | None] = {
    "torch": "2.13.0",
    "transformers": "5.16.1",
    "axolotl": "0.19.0",
    "triton": "3",
}


def test_gpus_and_their_kernels() -> None:
    h100, t4 = gpus_of(SMI)
    assert h100 == GPU("NVIDIA H100 80GB HBM3", 81559, (9, 0), "580.159.04") and "TMA" in h100.kernels
    assert t4.kernels.startswith("none")
    assert "pointers" in GPU("A100", 81920, (8, 0), "1").kernels
    assert gpus_of("NVIDIA-SMI has failed because it could not communicate\n\nN/A, N/A, N/A, N/A") == []


@pytest.mark.parametrize(
    ("packages", "gpus", "compiler", "words"),
    [
        ({"axolotl": None}, SMI, True, "axolotl is not installed: it is needed for training"),
        ({"axolotl": "0.22.1"}, SMI, True, "pip install 'axolotl>=0.19,<0.22'"),
        ({"triton": None}, SMI, True, "triton is not installed"),
        ({"torch": "2.13.0+cpu"}, SMI, True, "has no CUDA"),
        ({}, "", True, "nvidia-smi shows no GPU"),
        ({}, SMI, False, "no C compiler"),
    ],
)
def test_each_problem(packages: dict[str, str | None], gpus: str, compiler: bool, words: str) -> None:
    (problem,) = problems_of(WHOLE | packages, gpus_of(gpus), compiler)
    assert words in problem


def test_a_whole_installation_has_no_problem() -> None:
    assert problems_of(WHOLE, gpus_of(SMI), True) == []


def test_as_text_and_as_json() -> None:
    text = CliRunner().invoke(main, ["doctor"])
    assert text.exit_code == 0 and "torch" in text.output and "Python" in text.output
    found = json.loads(CliRunner().invoke(main, ["doctor", "--json"]).output)
    assert found["packages"]["torch"] and set(found) == {"packages", "gpus", "compilers", "problems"}
