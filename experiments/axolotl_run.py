"""One training by Axolotl, in this process, with every logged loss in a CSV at once.

    python experiments/axolotl_run.py SETTINGS.json NAME TOKENS_A_STEP OUT.csv

:func:`run_all` starts several as processes, each with a GPU.
"""

from __future__ import annotations

import gc
import json
import os
import subprocess
import sys
import time
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from shared import append_csv, read_csv

COLUMNS = ("run", "step", "tokens", "loss", "eval_loss", "learning_rate", "seconds")
OFFLINE = {"AXOLOTL_DO_NOT_TRACK": "1", "DO_NOT_TRACK": "1", "HF_HUB_OFFLINE": "1"}


@dataclass(frozen=True)
class Run:
    """A training: its name in the CSV, its config, and the tokens of a step."""

    name: str
    settings: dict[str, Any]
    tokens: int


def finished(out: Path) -> set[str]:
    """Names of the runs that reached their last evaluation."""
    if not out.exists():
        return set()
    return {row["run"] for row in read_csv(out) if row["step"] == "end"}


def run_all(runs: list[Run], out: Path, work: Path, per_gpu: int, deadline: float) -> None:
    """All runs that are not finished, over the GPUs that there are (on the CPU, one at a time)."""
    import torch

    seen = os.environ.get("CUDA_VISIBLE_DEVICES", "")
    gpus = seen.split(",") if seen else [str(gpu) for gpu in range(torch.cuda.device_count())] or [""]
    free = gpus * per_gpu
    queue = [run for run in runs if run.name not in finished(out)]
    busy: dict[subprocess.Popen[bytes], str] = {}
    try:
        while queue or busy:
            while queue and free and time.monotonic() < deadline:
                run, gpu = queue.pop(0), free.pop(0)
                busy[_start(run, gpu, out, work)] = gpu
            if time.monotonic() > deadline:
                return
            time.sleep(0.5)
            for process in [process for process in busy if process.poll() is not None]:
                free.append(busy.pop(process))
                print(f"{time.strftime('%X')} {process.args[3]}: exit {process.returncode}", flush=True)  # type: ignore[index]
    finally:
        for process in busy:
            process.kill()
            process.wait()


def _start(run: Run, gpu: str, out: Path, work: Path) -> subprocess.Popen[bytes]:
    work.mkdir(parents=True, exist_ok=True)
    config = work / f"{run.name}.json"
    config.write_text(json.dumps(run.settings))
    with (work / f"{run.name}.log").open("wb") as log:
        command = [sys.executable, __file__, str(config), run.name, str(run.tokens), str(out)]
        environment = {**os.environ, **OFFLINE, "CUDA_VISIBLE_DEVICES": gpu}
        return subprocess.Popen(command, stdout=log, stderr=subprocess.STDOUT, env=environment)


def main(config: str, name: str, tokens: str, out: str) -> None:
    import torch
    from axolotl.cli.config import load_cfg
    from axolotl.common.datasets import load_datasets
    from axolotl.utils.dict import DictDefault
    from transformers import TrainerCallback

    from axolotl_bitnet.training.latents import upcast_trainable

    began = time.monotonic()

    class Losses(TrainerCallback):
        def on_log(self, args: Any, state: Any, control: Any, logs: Any = None, **kwargs: Any) -> None:
            row = {key: logs[key] for key in ("loss", "eval_loss", "learning_rate") if key in logs}
            if "loss" in row or "eval_loss" in row:
                step = state.global_step
                seconds = f"{time.monotonic() - began:.1f}"
                row |= dict(run=name, step=step, tokens=step * int(tokens), seconds=seconds)
                append_csv(Path(out), COLUMNS, [row])

    settings = json.loads(Path(config).read_text())
    float32 = settings.pop("float32_weights", False)
    cfg = load_cfg(DictDefault(settings))
    # Only now: plugins extend the training arguments, which are put together when these are imported.
    from axolotl.core.builders.causal import HFCausalTrainerBuilder
    from axolotl.train import train

    build = HFCausalTrainerBuilder.build

    def build_and_watch(self: Any, *args: Any, **kwargs: Any) -> Any:
        trainer = build(self, *args, **kwargs)
        trainer.add_callback(Losses())
        if float32:  # a dense model with the precision that ternary latents have
            upcast_trainable(trainer.model)
        return trainer

    HFCausalTrainerBuilder.build = build_and_watch
    data = load_datasets(cfg=cfg)
    gc.freeze()  # Axolotl collects garbage all the time, which takes longer than a small model's step
    _, _, trainer = train(cfg=cfg, dataset_meta=data)
    peak = torch.cuda.max_memory_allocated() / 2**30 if torch.cuda.is_available() else 0.0
    print(f"peak {peak:.1f} GiB")
    last = [entry["eval_loss"] for entry in trainer.state.log_history if "eval_loss" in entry]
    append_csv(Path(out), COLUMNS, [dict(run=name, step="end", eval_loss=last[-1] if last else "")])


if __name__ == "__main__":
    main(*sys.argv[1:])
