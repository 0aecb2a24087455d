"""Peak memory of the recipes in Axolotl: shapes, lengths, one and two GPUs, two kinds of state.

Takes examples/falcon-e/sft-1b.yaml or dpo.yaml (one GPU) and sft.yaml (FSDP2) as they are, but for a base
with random weights of Falcon-E's shape, random tokens, two micro-batches per step and two steps; eager and
with `torch_compile: true`. State is that of the recipe (float32 latents, fused AdamW) or its low-memory
variant (bfloat16 latents, stochastic rounding, 8-bit moments). Axolotl resets the allocator's peaks whenever
it logs, so the peaks are read before each reset.

A run is a row of the CSV, written at once; what has a row without an error is not run again. Runs share GPUs
as long as their estimated memory fits: the figures are each process's own.

    python benchmarks/memory.py
    python benchmarks/memory.py --end 3B-sft-8192-1-float32-compiled   # with save, packing and verification
"""

from __future__ import annotations

import argparse
import json
import os
import subprocess
import sys
import time
from dataclasses import dataclass, fields
from pathlib import Path
from typing import Any

import torch
import yaml
from common import RESULTS, read_csv, write_csv
from scaling import ROOT, prepare

COLUMNS = (
    "shape", "recipe", "sequence", "gpus", "state", "compiled", "parameters",
    "peak_allocated_gib", "peak_reserved_gib",
    "backward_gib", "optimizer_gib", "between_steps_gib", "end_gib", "seconds", "machine", "error",
)  # fmt: skip
STATES = {"float32": 16.0, "low": 6.1}  # bytes per parameter, for the estimate by which runs share a GPU
SIZES = {"tiny": 0.1, "1B": 1.72, "3B": 3.05}
GIB = 2**30


@dataclass(frozen=True)
class Job:
    """A run of the table."""

    shape: str
    recipe: str  # sft | dpo
    sequence: int
    gpus: int
    state: str
    compiled: str  # eager | compiled

    @property
    def name(self) -> str:
        return "-".join(str(value) for value in vars(self).values())

    @property
    def tokens(self) -> int:
        """Of a micro-batch."""
        return self.sequence * (2 if self.recipe == "dpo" else 1)

    @property
    def estimate(self) -> float:
        """GiB of each GPU, with the process's own context: generous."""
        state = (STATES[self.state] / self.gpus + 1) * SIZES[self.shape]
        state += 2 * SIZES[self.shape] if self.recipe == "dpo" else 0
        return state + self.tokens * 0.62e-3 + 3

    def settings(self, folder: Path) -> dict[str, Any]:
        """The recipe with what a measurement needs."""
        recipe = "dpo.yaml" if self.recipe == "dpo" else "sft-1b.yaml" if self.gpus == 1 else "sft.yaml"
        found: dict[str, Any] = yaml.safe_load((ROOT / "examples" / "falcon-e" / recipe).read_text())
        for key in ("special_tokens", "eot_tokens", "loss_watchdog_threshold"):
            found.pop(key)
        base = folder / self.shape
        if self.recipe == "dpo":
            found["datasets"] = [{**found["datasets"][0], "path": str(pairs(base, self.sequence))}]
            found["datasets"][0] |= {"ds_type": "json"}
        else:
            data = {"path": str(base / f"data-{self.sequence}.parquet"), "ds_type": "parquet", "type": None}
            found |= {"datasets": [data], "chat_template": None}
        found |= {"base_model": str(base), "sequence_len": self.sequence}
        found |= {"torch_compile": True if self.compiled == "compiled" else None}
        found |= {"dataset_prepared_path": str(folder / f"prepared-{self.name}"), "dataset_num_proc": 1}
        found |= {"output_dir": str(folder / f"out-{self.name}"), "max_steps": 2, "warmup_steps": 1}
        found |= {"gradient_accumulation_steps": 2, "save_strategy": "no", "save_steps": None}
        if self.state == "low":
            found["bitnet"] |= {"latent_dtype": "bfloat16"}
            found |= {"optimizer": "adamw_torch_8bit", "optim_args": "bf16_stochastic_round=True"}
        if not torch.cuda.is_available():  # to try the script: DDP, float32
            found |= {"fsdp_version": None, "fsdp_config": None, "bf16": False, "tf32": False}
        return {key: value for key, value in found.items() if value is not None}


def pairs(base: Path, sequence: int) -> Path:
    """Pairs of answers of almost ``sequence`` tokens; Axolotl drops longer ones."""
    from transformers import AutoTokenizer

    tokenizer = AutoTokenizer.from_pretrained(base)
    path = base / f"pairs-{sequence}.jsonl"
    ask = {"role": "user", "content": "Which colour?"}
    row: dict[str, Any] = {"prompt": ask["content"]}
    for name, word in (("chosen", "red "), ("rejected", "blue ")):
        tokens = len(tokenizer(word * 100)["input_ids"]) / 100
        answer = {"role": "assistant", "content": word * int((sequence - 64) / tokens)}
        row[name] = [ask, answer]
    path.write_text(f"{json.dumps(row)}\n" * 16)
    return path


def worker(config: str, result: str, end: str) -> None:
    """A process of a run."""
    sys.path.insert(0, str(ROOT / "tests"))
    from transformers import Trainer, TrainerCallback

    from support import runs

    cuda = torch.cuda.is_available()
    reset = torch.cuda.reset_peak_memory_stats
    peaks: dict[str, float] = {
        "allocated": 0.0,
        "reserved": 0.0,
        "backward": 0.0,
        "optimizer": 0.0,
        "end": 0.0,
    }
    phase = "backward"

    def note(*_: Any) -> None:
        """Take the peaks since the last reset, and reset them."""
        if not cuda:
            return
        allocated = torch.cuda.max_memory_allocated() / GIB
        peaks[phase] = max(peaks[phase], allocated)
        if phase != "end":
            peaks["allocated"] = max(peaks["allocated"], allocated)
            peaks["reserved"] = max(peaks["reserved"], torch.cuda.max_memory_reserved() / GIB)
        reset()

    torch.cuda.reset_peak_memory_stats = note

    class Watch(TrainerCallback):
        def on_pre_optimizer_step(self, *args: Any, **kwargs: Any) -> None:
            nonlocal phase
            note()
            phase = "optimizer"

        def on_optimizer_step(self, *args: Any, **kwargs: Any) -> None:
            nonlocal phase
            note()
            phase = "backward"

        def on_train_end(self, *args: Any, **kwargs: Any) -> None:
            nonlocal phase
            note()
            if cuda:
                peaks["between"] = torch.cuda.memory_allocated() / GIB
            phase = "end"
            peaks["parameters"] = sum(p.numel() for p in kwargs["model"].parameters())
            save()
            if end != "end":
                if torch.distributed.is_initialized():
                    torch.distributed.barrier()
                os._exit(0)  # saving the weights would take longer than the steps

    def save() -> None:
        if os.environ.get("RANK", "0") == "0":
            Path(result).write_text(json.dumps(peaks))

    build = Trainer.__init__

    def watched(self: Any, *args: Any, **kwargs: Any) -> None:
        build(self, *args, **kwargs)
        self.add_callback(Watch())

    Trainer.__init__ = watched
    runs.train(json.loads(Path(config).read_text()))
    note()
    save()


class Table:
    """The rows, and the runs that are under way."""

    def __init__(self, folder: Path, out: Path, room: float, timeout: float) -> None:
        self.folder, self.out, self.timeout = folder, out, timeout
        self.rows: list[dict[str, Any]] = read_csv(out) if out.exists() else []
        seen = os.environ.get("CUDA_VISIBLE_DEVICES", "")
        gpus = seen.split(",") if seen else [str(i) for i in range(max(torch.cuda.device_count(), 1))]
        self.free = dict.fromkeys(gpus, room)
        self.busy: dict[subprocess.Popen[bytes], tuple[Job, list[str], float]] = {}

    def run(self, jobs: list[Job], end: list[str], deadline: float) -> None:
        """In the order given, as many at a time as fit; ``end`` names those that save, pack and verify."""
        done = {self._place(row) for row in self.rows if not row["error"]}
        queue = [job for job in jobs if job.name not in done and job.gpus <= len(self.free)]
        while (queue or self.busy) and time.monotonic() < deadline:
            for job in list(queue):
                gpus = sorted(self.free, key=lambda gpu: -self.free[gpu])[: job.gpus]
                fits = len(gpus) == job.gpus and all(self.free[gpu] >= job.estimate for gpu in gpus)
                if fits:
                    queue.remove(job)
                    self._start(job, gpus, job.name in end)
            self._collect()
            time.sleep(0.2)
        for process, (job, _, _) in self.busy.items():
            process.terminate()  # `timeout` passes it on
            self._write(job, {}, "not finished in time")

    def _start(self, job: Job, gpus: list[str], end: bool) -> None:
        for gpu in gpus:
            self.free[gpu] -= job.estimate
        config, result = self.folder / f"{job.name}.json", self.folder / f"{job.name}.result.json"
        config.write_text(json.dumps(job.settings(self.folder)))
        result.unlink(missing_ok=True)
        command = ["timeout", "--kill-after=5", str(self.timeout), sys.executable]
        if job.gpus > 1:
            command += ["-m", "torch.distributed.run", "--standalone", "--nproc_per_node", str(job.gpus)]
        command += [__file__, "--worker", str(config), str(result), "end" if end else "steps"]
        environment = os.environ | {"CUDA_VISIBLE_DEVICES": ",".join(gpus)}
        environment |= {} if torch.cuda.is_available() else {"ACCELERATE_USE_CPU": "true"}
        with (self.folder / f"{job.name}.log").open("w") as log:
            process = subprocess.Popen(command, stdout=log, stderr=log, env=environment)
        self.busy[process] = job, gpus, time.monotonic()

    def _collect(self) -> None:
        for process in [process for process in self.busy if process.poll() is not None]:
            job, gpus, began = self.busy.pop(process)
            for gpu in gpus:
                self.free[gpu] += job.estimate
            result = self.folder / f"{job.name}.result.json"
            error, found = "", {}
            if result.exists():
                found = json.loads(result.read_text())
            if process.returncode or not found:
                lines = (self.folder / f"{job.name}.log").read_text().splitlines()
                error = next(
                    (line for line in reversed(lines) if "Error" in line), f"exit {process.returncode}"
                )
            self._write(job, found | {"seconds": time.monotonic() - began}, error)

    def _write(self, job: Job, found: dict[str, float], error: str) -> None:
        row: dict[str, Any] = dict.fromkeys(COLUMNS, "")
        row |= vars(job)
        names = dict(peak_allocated_gib="allocated", peak_reserved_gib="reserved", backward_gib="backward",
                     optimizer_gib="optimizer", between_steps_gib="between")  # fmt: skip
        row |= {column: f"{found[key]:.2f}" for column, key in names.items() if key in found}
        row |= {"parameters": found.get("parameters", ""), "error": error[:200], "machine": machine()}
        row |= {"seconds": f"{found['seconds']:.0f}"} if "seconds" in found else {}
        row |= {"end_gib": f"{found['end']:.2f}"} if found.get("end") else {}
        self.rows = [old for old in self.rows if self._place(old) != job.name] + [row]
        print(row, flush=True)
        write_csv(self.out, self.rows)

    @staticmethod
    def _place(row: dict[str, Any]) -> str:
        return "-".join(str(row[field.name]) for field in fields(Job))


def _room() -> float:
    """GiB of the first GPU, but for 1.5."""
    if not torch.cuda.is_available():
        return 16.0
    return torch.cuda.get_device_properties(0).total_memory / GIB - 1.5


def machine() -> str:
    """GPU, versions and date."""
    from importlib.metadata import version

    gpu = torch.cuda.get_device_name() if torch.cuda.is_available() else "CPU"
    return f"{gpu}, axolotl {version('axolotl')}, torch {torch.__version__}, {time.strftime('%Y-%m-%d')}"


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument(
        "--only", nargs="*", default=[], help="runs, such as 1B-sft-8192-1-low-eager, in order"
    )
    parser.add_argument("--end", nargs="*", default=[], help="runs that save, pack and verify at their end")
    parser.add_argument("--room", type=float, help="GiB of a GPU that runs may share; all but 1.5 by default")
    parser.add_argument("--timeout", type=float, default=150, help="seconds per run")
    parser.add_argument("--seconds", type=float, default=1e9, help="stop in time for this")
    parser.add_argument(
        "--shapes", nargs="*", default=["1B-sft-8192", "3B-sft-8192", "3B-sft-32768", "3B-dpo-8192"]
    )
    parser.add_argument("--gpus", type=int, nargs="*", default=[1, 2])
    parser.add_argument("--states", nargs="*", default=list(STATES))
    parser.add_argument("--folder", type=Path, default=ROOT / "outputs" / "memory")
    parser.add_argument("--out", type=Path, default=RESULTS / "memory.csv")
    args = parser.parse_args()
    deadline = time.monotonic() + args.seconds
    folder = args.folder.resolve()
    jobs = [
        Job(shape, recipe, int(sequence), gpus, state, compiled)
        for shape, recipe, sequence in (each.split("-") for each in args.shapes)
        for gpus in args.gpus
        for state in args.states
        for compiled in ("eager", "compiled")
        if recipe == "sft" or gpus == 1  # dpo.yaml is for one
    ]
    jobs.sort(key=lambda job: -job.estimate * job.gpus)
    if args.only:
        jobs = sorted(
            (job for job in jobs if job.name in args.only), key=lambda job: args.only.index(job.name)
        )
    for shape, sequence in sorted({(job.shape, job.sequence) for job in jobs}):
        (folder / shape).mkdir(parents=True, exist_ok=True)
        prepare(folder / shape, shape, sequence, rows=8 * max(args.gpus))
    Table(folder, args.out, args.room or _room(), args.timeout).run(jobs, args.end, deadline)


if __name__ == "__main__":
    worker(*sys.argv[2:]) if sys.argv[1:2] == ["--worker"] else main()
