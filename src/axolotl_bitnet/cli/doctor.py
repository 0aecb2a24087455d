"""`doctor`: what is installed here, what will run, and what is missing for what.

Nothing is imported: versions come from the packages' metadata, GPUs from nvidia-smi. So a broken installation
can be examined too.
"""

from __future__ import annotations

import platform
import shutil
import subprocess
from dataclasses import asdict, dataclass
from importlib.metadata import PackageNotFoundError, version
from typing import Any

import click

from .terminal import as_json, command

_PACKAGES = {
    "axolotl": "training by `axolotl train`",
    "torch": "everything",
    "transformers": "everything that has a model",
    "triton": "the kernels, on NVIDIA GPUs",
    "torchao": "`optimizer: adamw_torch_8bit`: bfloat16 latents with stochastic rounding",
    "liger-kernel": "Axolotl's Liger plugin",
    "deepspeed": "ZeRO",
    "gguf": "`bitnet.export: [gguf-...]`, `axolotl-bitnet gguf`: pip install 'axolotl-bitnet[gguf]'",
    "xllamacpp": "running a GGUF file when it is verified",
    "jinja2": "the report's page: pip install 'axolotl-bitnet[report]'",
    "matplotlib": "the report's plots: pip install 'axolotl-bitnet[report]'",
    "mlx-lm": "running an MLX folder (the export needs nothing)",
}
"""By distribution: what it is needed for."""

_REQUIRED = ("torch", "transformers", "axolotl")
_SEEN = {"axolotl": ((0, 19), (0, 22))}
"""From and below: the versions that are supported."""


@dataclass(frozen=True)
class GPU:
    """A GPU as nvidia-smi says it; memory in MiB."""

    name: str
    memory: int
    capability: tuple[int, int]
    driver: str

    @property
    def kernels(self) -> str:
        """Which of our kernels run on it."""
        if self.capability >= (9, 0):
            return "Triton kernels, products by TMA"
        if self.capability >= (8, 0):
            return "Triton kernels, products through pointers"
        return "none: plain torch (the kernels need compute capability 8.0, Ampere)"


@click.command()
@click.option("--json", "machine", is_flag=True, help="Write the outcome as JSON.")
@command
def doctor(machine: bool) -> None:
    """Say what is installed, which GPUs are there and which kernels will run, and what is missing for what.

    \b
    Example:
        axolotl-bitnet doctor
        axolotl-bitnet doctor --json
    """
    found = {name: _version(name) for name in ("axolotl-bitnet", *_PACKAGES)}
    gpus = gpus_of(_nvidia_smi())
    compilers = {name: shutil.which(name) for name in ("cc", "nvcc")}
    problems = problems_of(found, gpus, compilers["cc"] is not None)
    if machine:
        shown: list[dict[str, Any]] = [{**asdict(gpu), "kernels": gpu.kernels} for gpu in gpus]
        as_json({"packages": found, "gpus": shown, "compilers": compilers, "problems": problems})
        return
    click.echo(f"Python {platform.python_version()}, {platform.system()} {platform.machine()}")
    for name, installed in found.items():
        purpose = f"  for {_PACKAGES[name]}" if name in _PACKAGES and installed is None else ""
        click.echo(f"  {name:<15}{installed or 'not installed'}{purpose}")
    for number, gpu in enumerate(gpus):
        memory = f"{gpu.memory / 1024:.0f} GiB"
        click.echo(f"GPU {number}: {gpu.name}, {memory}, driver {gpu.driver}: {gpu.kernels}")
    for line in problems:
        click.echo(f"- {line}")
    if not problems:
        click.echo("nothing is missing")


def problems_of(found: dict[str, str | None], gpus: list[GPU], compiler: bool) -> list[str]:
    """What will not work, and what to do: sentences."""
    problems = [f"{name} is not installed: it is needed for {_PACKAGES[name]}" for name in _REQUIRED
                if found.get(name) is None]  # fmt: skip
    for name, (first, below) in _SEEN.items():
        installed = found.get(name)
        if installed is not None and not first <= _numbers(installed) < below:
            wanted = f">={first[0]}.{first[1]},<{below[0]}.{below[1]}"
            problems.append(f"{name} {installed} is not supported: pip install '{name}{wanted}'")
    if not gpus:
        problems.append("nvidia-smi shows no GPU: layers compute in plain torch, which is for trials only")
    if gpus and found.get("triton") is None:
        problems.append("triton is not installed: layers compute in plain torch. pip install triton")
    if gpus and (found.get("torch") or "").endswith("+cpu"):
        problems.append(f"torch {found['torch']} has no CUDA: install a CUDA build of torch")
    if not compiler:
        problems.append(
            "there is no C compiler (cc): Triton and torch.compile need one. Install gcc or clang"
        )
    return problems


def gpus_of(text: str) -> list[GPU]:
    """The rows of nvidia-smi's CSV."""
    gpus = []
    for line in text.splitlines():
        parts = [part.strip() for part in line.split(",")]
        if len(parts) == 4 and parts[1].isdigit() and "." in parts[2]:
            major, minor = parts[2].split(".")
            gpus.append(GPU(parts[0], int(parts[1]), (int(major), int(minor)), parts[3]))
    return gpus


def _nvidia_smi() -> str:
    query = "--query-gpu=name,memory.total,compute_cap,driver_version"
    try:
        done = subprocess.run(
            ["nvidia-smi", query, "--format=csv,noheader,nounits"], capture_output=True, text=True, timeout=20
        )
    except (OSError, subprocess.SubprocessError):
        return ""
    return done.stdout


def _version(name: str) -> str | None:
    try:
        return version(name)
    except PackageNotFoundError:
        return None


def _numbers(text: str) -> tuple[int, ...]:
    return tuple(int(part) for part in text.split(".")[:2] if part.isdigit())
