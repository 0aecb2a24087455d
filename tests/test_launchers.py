"""Started by torchrun on two nodes, or by Ray Train: the rate is multiplied once, one process packs."""

from __future__ import annotations

import importlib.util
import json
import socket
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import torch

from support import TINY
from support.processes import environment
from support.runs import config

pytestmark = pytest.mark.slow

RAY = """
import sys, ray, ray.train
ray.init(num_cpus=2, num_gpus=0, include_dashboard=False)
scaling = ray.train.ScalingConfig
ray.train.ScalingConfig = lambda use_gpu, **rest: scaling(use_gpu=False, **rest)  # Axolotl asks for GPUs
from axolotl.cli.train import do_cli
do_cli(sys.argv[1])
"""


def start(command: list[str], log: Path) -> subprocess.Popen[bytes]:
    env = environment(ACCELERATE_USE_CPU="true", OMP_NUM_THREADS="1")
    with log.open("w") as file:
        return subprocess.Popen([sys.executable, *command], env=env, stdout=file, stderr=file)


def write(folder: Path, name: str, **keys: Any) -> Path:
    block = {"learning_rate_multiplier": 10}
    settings = config(folder, TINY / "model", reinit_weights=True, bitnet=block, **keys)
    path = folder / f"{name}.json"  # JSON is YAML
    path.write_text(json.dumps(settings))
    return path


def assert_packed_once(text: str, output_dir: Path) -> None:
    said = [line for line in text.splitlines() if "[axolotl.bitnet]" in line]
    rates = [line for line in said if "learning rate:" in line]
    assert len(rates) == 1 and "base 0.001 x multiplier 10 = effective 0.01" in rates[0]
    assert len([line for line in said if "MiB of latents are" in line]) == 1
    assert len([line for line in said if "verified:" in line]) == 1
    record = json.loads((output_dir / "bitnet.json").read_text())
    assert record["artifacts"]["packed"]["verified"] is True and (output_dir / "packed").is_dir()
    assert "'learning_rate': '0.01'" in text


no_driver = pytest.mark.skipif(
    torch.version.cuda is not None and not torch.cuda.is_available(),
    reason="with torch for CUDA and no GPU, Axolotl dies of asking two processes' GPUs about each other",
)


@no_driver
@pytest.mark.parametrize("disks", ["one disk", "a disk each"])
def test_torchrun_on_two_nodes(tmp_path: Path, disks: str) -> None:
    outputs = [tmp_path / "out", tmp_path / ("out" if disks == "one disk" else "other")]
    for output in outputs:
        output.mkdir(exist_ok=True)
        (output / "model.safetensors").write_text("a previous run's")
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    nodes = []
    for node, output in enumerate(outputs):
        path = write(tmp_path, f"node{node}", output_dir=str(output))
        command = ["-m", "torch.distributed.run", "--nnodes", "2", "--node_rank", str(node)]
        command += ["--nproc_per_node", "1", "--master_addr", "127.0.0.1", "--master_port", str(port)]
        nodes.append(start([*command, "-m", "axolotl.cli.train", str(path)], tmp_path / f"node{node}.log"))
    status = [node.wait(timeout=240) for node in nodes]
    text = "".join((tmp_path / f"node{node}.log").read_text() for node in range(2))
    assert status == [0, 0], text[-3000:]
    assert_packed_once(text, outputs[0])
    if disks == "a disk each":
        assert not (outputs[1] / "packed").exists() and not (outputs[1] / "model.safetensors").exists()
        assert (outputs[1] / "_previous" / "model.safetensors").read_text() == "a previous run's"


@pytest.mark.skipif(importlib.util.find_spec("ray") is None, reason="ray is not installed")
@pytest.mark.parametrize("workers", [1, pytest.param(2, marks=no_driver)])
def test_ray_train(tmp_path: Path, workers: int) -> None:
    keys = {"use_ray": True, "ray_num_workers": workers, "resources_per_worker": {"CPU": 1}}
    path = write(tmp_path, "ray", **keys)
    log = tmp_path / "ray.log"
    status = start(["-c", RAY, str(path)], log).wait(timeout=240)
    text = log.read_text()
    assert status == 0, text[-3000:]
    assert_packed_once(text, tmp_path / "out")
