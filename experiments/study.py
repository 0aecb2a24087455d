"""What ternary training prefers: learning rate, latents, scope, decay, ramp, optimizer; SFT and DPO after it.

Any Llama-like checkpoint and any text. Runs are spread over all GPUs; every result is appended to a CSV at
once, and a run whose row is there is not run again, so that an interrupted study goes on where it was.

    python experiments/study.py MODEL_FOLDER TEXT --seconds 600
"""

from __future__ import annotations

import argparse
import multiprocessing as mp
import os
import time
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import asdict, dataclass
from multiprocessing.connection import Connection, wait
from pathlib import Path
from typing import Any

import study_design as design
import torch
from shared import RESULTS, append_csv, read_csv
from study_train import MODES, Setting

RESULT_COLUMNS = (
    "loss", "eval_before", "eval_loss", "accuracy", "margin", "flips_start", "flips_quarter", "zeros",
    "state_gib", "peak_gib", "ms_step", "seconds", "error",
)  # fmt: skip
COLUMNS = (*asdict(Setting()), *RESULT_COLUMNS)
CURVE_COLUMNS = (*asdict(Setting()), "step", "loss", "lambda", "flips_start", "flips_last")


@dataclass(frozen=True)
class Place:
    """What every worker is told once."""

    model: Path
    text: Path
    mode: str
    work: Path
    small: bool

    def weights(self, model: str) -> Path:
        """Where the weights that SFT and DPO start from are kept."""
        return self.work / f"trained-{model}.safetensors"


def work(connection: Connection, place: Place) -> None:
    """A worker: settings come in, results go out. Any error ends it; the parent starts another."""
    import study_data
    import study_train
    from transformers import AutoModelForCausalLM, AutoTokenizer

    torch.set_num_threads(1 if place.small else 4)
    batches = study_data.load(place.text, AutoTokenizer.from_pretrained(place.model), place.small)
    base = AutoModelForCausalLM.from_pretrained(place.model, dtype=torch.float32)
    base.config.use_cache = False
    connection.send(None)
    while True:
        setting, keep = connection.recv()
        start = place.weights(setting.model) if setting.start == "trained" else None
        save = place.weights(setting.model) if keep else None
        try:
            done = study_train.train(base, setting, batches[setting.task], place.mode, start, save)
        except Exception as error:
            import traceback

            traceback.print_exc()
            connection.send((None, f"{type(error).__name__}: {error}"[:200]))
            return
        connection.send((done, ""))


class Worker:
    """A process with one GPU (or none) to itself, and what it is at."""

    def __init__(self, gpu: str, place: Place) -> None:
        self.gpu, self._place = gpu, place
        self.setting: Setting | None = None
        self.ready = False
        context = mp.get_context("spawn")
        self.connection, theirs = context.Pipe()
        os.environ |= {"CUDA_VISIBLE_DEVICES": gpu, "TOKENIZERS_PARALLELISM": "true"}
        self.process = context.Process(target=work, args=(theirs, place), daemon=True)
        self.process.start()
        theirs.close()

    def restarted(self) -> Worker:
        self.process.terminate()
        self.process.join()
        return Worker(self.gpu, self._place)


class Study:
    """The queue: settings to workers, results to the CSV."""

    def __init__(self, place: Place, workers: list[Worker], out: Path, deadline: float) -> None:
        self.place, self.workers, self.out, self.deadline = place, workers, out, deadline
        self.rows: list[dict[str, Any]] = read_csv(out) if out.exists() else []
        self.curves = out.with_name(f"{out.stem}_curves.csv")
        self.slowest = 0.05  # seconds a step
        self.failed, self.succeeded = 0, 0
        self.awaited: set[Setting] = set()  # whose weights are not there yet

    def fresh(self, settings: list[Setting]) -> list[Setting]:
        """Those that have no row without an error."""
        done = {design.key(row) for row in self.rows if not row["error"]}
        return [setting for setting in settings if design.key(setting) not in done]

    def run(self, settings: list[Setting], sources: Sequence[Setting] = ()) -> None:
        """All that have no row yet; as many as fit before the deadline.

        Args:
            sources: run first, and again if they have a row: others start from their weights.
        """
        queue = list(dict.fromkeys([*sources, *self.fresh(settings)]))
        self.awaited = set(sources)
        while queue or any(worker.setting for worker in self.workers):
            left = self.deadline - time.monotonic()
            queue = [each for each in queue if left > 1.2 * self.slowest * each.steps]
            for worker in self.workers:
                models = {source.model for source in self.awaited}
                can_start = [each for each in queue if each.start == "base" or each.model not in models]
                if can_start and worker.ready and worker.setting is None:
                    worker.setting = can_start[0]
                    queue.remove(worker.setting)
                    worker.connection.send((worker.setting, worker.setting in sources))
            idle = not any(worker.setting for worker in self.workers)
            if left < 0 or (idle and not can_start):
                return
            for connection in wait([worker.connection for worker in self.workers], timeout=min(left, 5)):
                self._receive(next(worker for worker in self.workers if worker.connection is connection))

    def _receive(self, worker: Worker) -> None:
        try:
            message = worker.connection.recv()
        except EOFError:
            message = (None, "the process ended")
        if message is None:
            worker.ready = True
            return
        done, error = message
        setting, worker.setting = worker.setting, None
        if error:
            if setting is None:
                raise SystemExit(f"a worker cannot start: {error}")
            self.workers[self.workers.index(worker)] = worker.restarted()
        self.failed, self.succeeded = self.failed + bool(error), self.succeeded + (not error)
        if self.failed > 3 * (1 + self.succeeded):
            raise SystemExit(f"one failure after another, the last: {error}")
        assert setting is not None
        if not error:
            self.awaited.discard(setting)
        result, curve = done or ({}, [])
        row = {**asdict(setting), **_short(result), "error": error}
        if not error and design.key(setting) in {design.key(each) for each in self.rows if not each["error"]}:
            return  # run again for its weights
        self.rows.append({column: str(row.get(column, "")) for column in COLUMNS})
        append_csv(self.out, COLUMNS, [row])
        append_csv(self.curves, CURVE_COLUMNS, [{**asdict(setting), **_short(each)} for each in curve])
        self.slowest = max(self.slowest, result.get("seconds", 0.0) / setting.steps)
        shown = {name: row.get(name) for name in ("eval_loss", "flips_start", "ms_step", "seconds", "error")}
        print(f"{time.strftime('%X')} {' '.join(map(str, asdict(setting).values()))} {shown}", flush=True)


def _short(values: dict[str, Any]) -> dict[str, Any]:
    return {name: f"{value:.6g}" if isinstance(value, float) else value for name, value in values.items()}


@contextmanager
def staffed(place: Place, per_gpu: int) -> Iterator[list[Worker]]:
    visible = os.environ.get("CUDA_VISIBLE_DEVICES")
    gpus = visible.split(",") if visible else [str(gpu) for gpu in range(torch.cuda.device_count() or 1)]
    workers = [Worker(gpu, place) for _ in range(per_gpu) for gpu in gpus]
    try:
        yield workers
    finally:
        for worker in workers:
            worker.process.terminate()
            worker.process.join()
        os.environ.pop("CUDA_VISIBLE_DEVICES", None)
        if visible is not None:
            os.environ["CUDA_VISIBLE_DEVICES"] = visible


def main() -> None:
    parser = argparse.ArgumentParser(description="What ternary training prefers.")
    parser.add_argument("model", type=Path)
    parser.add_argument("text", type=Path)
    parser.add_argument("--stages", nargs="+", choices=design.STAGES, default=list(design.STAGES))
    parser.add_argument("--mode", choices=MODES, default="graph")
    parser.add_argument("--per-gpu", type=int, default=1, help="processes that share a GPU")
    parser.add_argument("--seconds", type=float, default=1e9, help="stop in time for this")
    parser.add_argument("--steps", type=int, default=400)
    parser.add_argument("--first", type=int, help="only so many settings of each stage")
    parser.add_argument("--small", action="store_true", help="tiny batches, to try the script on a CPU")
    parser.add_argument("--work", type=Path, default=Path("/tmp/study"), help="weights that runs start from")
    parser.add_argument("--out", type=Path, default=RESULTS / "study.csv")
    args = parser.parse_args()

    deadline = time.monotonic() + args.seconds
    args.work.mkdir(parents=True, exist_ok=True)
    place = Place(args.model, args.text, args.mode, args.work, args.small)
    with staffed(place, args.per_gpu) as workers:
        study = Study(place, workers, args.out, deadline)
        base = Setting(steps=args.steps)
        for stage in args.stages:
            settings = design.STAGES[stage](study.rows, base)[: args.first]
            needed = {setting.model for setting in study.fresh(settings) if setting.start == "trained"}
            sources = [
                each
                for each in design.trained(study.rows, base)
                if each.model in needed and not place.weights(each.model).exists()
            ]
            print(f"{stage}: {len(settings)} settings", flush=True)
            study.run(settings, sources)


if __name__ == "__main__":
    main()
