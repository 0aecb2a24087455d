"""The step of the run that people start: the shipped SFT recipe in Axolotl, dense and ternary, on real rows.

Takes examples/falcon-e/sft.yaml as it is, but for a base with random weights of Falcon-E's shape and random
tokens: rows packed of conversations of about 1k tokens that the mask separates, or whole documents. All
kinds run one after the other in one process a GPU, so they share the machine and the data. A row of the CSV
is written when its kind is done; a kind that fails leaves its error there. After the timed steps one step is
profiled (GPU-busy, NCCL, launches, CPU time by function).

    torchrun --nproc-per-node 2 benchmarks/in_the_run.py --shape 1B --sequence 8192
    torchrun --nproc-per-node 2 benchmarks/in_the_run.py --shape 3B --sequence 32768 --rows conversations
"""

from __future__ import annotations

import argparse
import datetime
import gc
import itertools
import json
import os
import statistics
import sys
import time
import traceback
from collections.abc import Iterator
from contextlib import contextmanager
from functools import partial
from importlib import import_module
from pathlib import Path
from typing import Any

import numpy
import torch
import torch.distributed as dist
import yaml
from common import RESULTS, append_csv
from profiled_step import summary
from scaling import ROOT, SHAPES, VOCABULARY, save_base

from axolotl_bitnet.plugin.upstream import sdpa_compiled, sdpa_varlen
from axolotl_bitnet.training.checkpoint_once import CheckpointOnce
from axolotl_bitnet.training.layer_compile import CompileLayers
from axolotl_bitnet.training.trainer_loss import filter_losses

LIGER: dict[str, Any] = {
    "plugins": ["axolotl.integrations.liger.LigerPlugin"],
    "liger_rope": True,
    "liger_rms_norm": True,
    "liger_glu_activation": True,
    "liger_fused_linear_cross_entropy": True,
}
EAGER = {"torch_compile": None}
FP8 = {"fp8": True}
COMPILED_DENSE = {"use_onebitllms": False, "bitnet": None, "learning_rate": 5e-4}
DENSE = COMPILED_DENSE | EAGER
QAT = {"qat": {"weight_dtype": "ternary", "activation_dtype": "int8"}}
KINDS: dict[str, dict[str, Any]] = {  # what each changes in the recipe, which compiles layers
    "dense": DENSE,
    "dense liger": DENSE | LIGER,
    "dense compiled": COMPILED_DENSE,  # as Axolotl does it, the whole model at once
    "dense fp8": COMPILED_DENSE | FP8,
    "dense mended": DENSE,  # with what the plugin mends in Axolotl for ternary runs
    "dense mended, compiled": DENSE,
    "dense mended, fp8, compiled": DENSE | FP8,
    "axolotl qat": DENSE | QAT,
    "native": {"bitnet": {"gather": "native"}},
    "ternary": {},
    "ternary eager": EAGER,
    "ternary eager liger": EAGER | LIGER,
    "ternary 8-bit dX": {"bitnet": {"backward": "int8_dx"}},
    "ternary 8-bit": {"bitnet": {"backward": "int8"}},
}
COLUMNS = (
    "shape", "gpus", "sequence", "rows", "kind", "ms_step", "tokens_per_second", "peak_gib", "loss",
    "busy_ms", "nccl_ms", "idle_percent", "launches", "profiled_ms", "gpu", "versions", "date", "note",
    "error",
)  # fmt: skip


class Done(Exception):
    """The last step is over; nothing is to be saved."""


def write_rows(folder: Path, rows: str, sequence: int, tokens: int) -> Path:
    """Random tokens as a data set: documents of a whole row each, or conversations of 512 to 1536 tokens."""
    from datasets import Dataset

    path = folder / f"{rows}-{sequence}.parquet"
    if path.exists():
        return path
    generator = torch.Generator().manual_seed(1)
    lengths: list[int] = []
    while sum(lengths) < tokens:
        of_one = (
            torch.randint(512, 1537, (), generator=generator).item() if rows == "conversations" else sequence
        )
        lengths.append(min(int(of_one), sequence))
    random = partial(torch.randint, 3, VOCABULARY, generator=generator)
    ids = [random((n,)).numpy() for n in lengths]
    ones = [numpy.ones(n, numpy.int64) for n in lengths]
    Dataset.from_dict({"input_ids": ids, "attention_mask": ones, "labels": ids}).to_parquet(path)
    return path


def recipe(args: argparse.Namespace, folder: Path, kind: str) -> dict[str, Any]:
    settings: dict[str, Any] = yaml.safe_load((ROOT / "examples" / "falcon-e" / "sft.yaml").read_text())
    for key in ("special_tokens", "eot_tokens", "chat_template", "loss_watchdog_threshold"):
        settings.pop(key)
    data = {"path": str(folder / f"{args.rows}-{args.sequence}.parquet"), "ds_type": "parquet", "type": None}
    settings |= {"base_model": str(folder), "datasets": [data], "sequence_len": args.sequence}
    settings |= {"dataset_prepared_path": str(folder / f"prepared-{args.rows}-{args.sequence}")}
    settings |= {"dataset_num_proc": 4, "output_dir": str(folder / "out"), "warmup_steps": 2}
    settings |= {"max_steps": 1000, "num_epochs": 1000, "save_strategy": "no", "save_steps": None}
    added = dict(KINDS[kind])
    if added.get("bitnet", {}) is not None:
        added["bitnet"] = settings["bitnet"] | {"export": [], "verify": False} | added.get("bitnet", {})
    added["plugins"] = settings["plugins"] + added.get("plugins", [])
    settings |= added
    if args.set:
        settings |= yaml.safe_load(args.set)
    if not torch.cuda.is_available():  # to try the script: DDP, float32
        settings |= {"fsdp_version": None, "fsdp_config": None, "bf16": False, "tf32": False}
    return {key: value for key, value in settings.items() if value is not None}


class Watch:
    """A Trainer callback that times steps, profiles one more, and ends the run."""

    def __init__(self, args: argparse.Namespace, seconds: float) -> None:
        self.args, self.seconds, self.enough = args, seconds, False
        self.times: list[float] = []
        self.loss = 0.0
        self.profile: Any = None
        self.profiled = 0.0

    def on_step_begin(self, *_: Any, **__: Any) -> None:
        if self.args.profile and self.enough:
            wanted = [torch.profiler.ProfilerActivity.CPU]
            wanted += [torch.profiler.ProfilerActivity.CUDA] if torch.cuda.is_available() else []
            self.profile = torch.profiler.profile(activities=wanted)
            self.profile.start()
            self.began = time.perf_counter()

    def on_step_end(self, *_: Any, **__: Any) -> None:
        if torch.cuda.is_available():
            torch.cuda.synchronize()
        now = time.perf_counter()
        self.times.append(now)
        if self.profile is not None:
            self.profiled = now - self.began
            self.profile.stop()
            raise Done
        late = len(self.times) > self.args.warmup + 2 and now > self.times[0] + self.seconds
        late |= len(self.times) > self.args.warmup + self.args.steps
        if dist.is_initialized():  # all leave at the same step
            flag = torch.tensor(float(late), device="cuda" if torch.cuda.is_available() else "cpu")
            dist.all_reduce(flag)
            late = bool(flag.item())
        self.enough = late
        if late and not self.args.profile:
            raise Done

    def on_log(self, args: Any, state: Any, control: Any, logs: Any = None, **_: Any) -> None:
        self.loss = float(logs.get("loss", self.loss))

    def milliseconds(self) -> float:
        """Median of the steps after the warmup, but for the profiled one."""
        times = self.times[self.args.warmup :]
        times = times[: -1 if self.profile is not None else None]
        return 1000 * statistics.median([b - a for a, b in itertools.pairwise(times)])


@contextmanager
def restored() -> Iterator[None]:
    """Environment, patched classes and accelerate's state are afterwards as they were."""
    from accelerate.state import AcceleratorState, GradientState
    from axolotl.integrations.base import PluginManager
    from axolotl.monkeypatch.attention.sdpa_varlen import unpatch_sdpa_varlen
    from transformers import Trainer
    from transformers.models.llama import modeling_llama

    environment, own = dict(os.environ), dict(vars(modeling_llama))
    accelerator = Trainer.create_accelerator_and_postprocess  # `fp8: true` replaces it
    classes = {value: dict(vars(value)) for value in own.values() if isinstance(value, type)}
    classes = {one: kept for one, kept in classes.items() if one.__module__ == modeling_llama.__name__}
    try:
        yield
    finally:
        os.environ.clear()
        os.environ.update(environment)
        vars(modeling_llama).update(own)
        for one, kept in classes.items():
            for name in ("forward", "__init__"):
                if name in kept:
                    setattr(one, name, kept[name])
        Trainer.create_accelerator_and_postprocess = accelerator
        unpatch_sdpa_varlen()
        for module_name, name in sdpa_varlen.SYMBOLS:
            module = import_module(module_name)
            function = getattr(module, name)
            setattr(module, name, getattr(function, "__wrapped__", function))
        AcceleratorState._reset_state()
        GradientState._reset_state()
        manager = PluginManager.get_instance()
        manager.plugins.clear()
        torch._dynamo.reset()
        gc.unfreeze()
        gc.collect()
        if torch.cuda.is_available():
            torch.cuda.empty_cache()


def run(args: argparse.Namespace, folder: Path, kind: str) -> Watch:
    from axolotl.train import train
    from transformers import Trainer, TrainerCallback

    from support.runs import prepare

    watch = Watch(args, args.seconds)
    build = Trainer.__init__

    def with_watch(self: Any, *given: Any, **more: Any) -> None:
        build(self, *given, **more)
        names = ("on_step_begin", "on_step_end", "on_log")
        clock = type("Clock", (TrainerCallback,), {name: _forward(watch, name) for name in names})
        self.add_callback(clock())
        if "mended" in kind:
            filter_losses(self)
            sdpa_varlen.ask_ahead(self)
            self.add_callback(CheckpointOnce())
            if "compiled" in kind:
                sdpa_compiled.ask_before_the_layers(self.model)
                self.add_callback(CompileLayers())

    Trainer.__init__ = with_watch
    try:
        with restored():
            if torch.cuda.is_available():
                torch.cuda.reset_peak_memory_stats()
            if "mended" in kind:  # what the plugin mends in Axolotl, for a run that it does not touch
                sdpa_varlen.ask_once_a_batch()
            cfg, data = prepare(recipe(args, folder, kind))
            try:
                train(cfg=cfg, dataset_meta=data)
            except Done as done:
                traceback.clear_frames(done.__traceback__)
            watch.peak = torch.cuda.max_memory_allocated() / 2**30 if torch.cuda.is_available() else 0.0  # type: ignore[attr-defined]
    finally:
        Trainer.__init__ = build
    return watch


def _forward(watch: Watch, name: str) -> Any:
    return lambda self, *given, **more: getattr(watch, name)(*given, **more)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--kinds", nargs="+", choices=KINDS, default=list(KINDS))
    parser.add_argument("--shape", choices=SHAPES, default="1B")
    parser.add_argument("--sequence", type=int, default=8192, help="tokens per micro-batch")
    parser.add_argument("--rows", choices=("documents", "conversations"), default="documents")
    parser.add_argument("--steps", type=int, default=8, help="timed steps")
    parser.add_argument("--warmup", type=int, default=3)
    parser.add_argument("--seconds", type=float, default=60, help="a kind's time for steps, at most")
    parser.add_argument("--budget", type=float, default=1e9, help="seconds after which no kind begins")
    parser.add_argument("--no-profile", dest="profile", action="store_false")
    parser.add_argument("--trace", action="store_true", help="keep the profiled steps' traces")
    parser.add_argument("--note", default="", help="a note that distinguishes the rows")
    parser.add_argument("--set", help="keys to put into the recipe, as YAML")
    parser.add_argument("--folder", type=Path, default=ROOT / "outputs" / "in_the_run")
    parser.add_argument("--out", type=Path, default=RESULTS / "in_the_run.csv")
    args = parser.parse_args()

    sys.path.insert(0, str(ROOT / "tests"))
    started = time.perf_counter()
    rank, gpus = int(os.environ.get("RANK", "0")), int(os.environ.get("WORLD_SIZE", "1"))
    folder = args.folder.resolve() / args.shape
    folder.mkdir(parents=True, exist_ok=True)
    ready = folder / f"{args.rows}-{args.sequence}.ready"
    if rank == 0:
        ready.unlink(missing_ok=True)
        save_base(folder, args.shape)
        enough = 4 * (
            args.warmup + args.steps + 4
        )  # micro-batches: no epoch, whose rows are packed anew, ends
        write_rows(folder, args.rows, args.sequence, enough * args.sequence * gpus)
        ready.touch()
    while not ready.exists():
        time.sleep(0.1)

    import transformers

    versions = f"torch {torch.__version__}, transformers {transformers.__version__}"
    for kind in args.kinds:
        late = torch.tensor(float(time.perf_counter() - started > args.budget))
        if dist.is_initialized():
            late = late.to("cuda" if torch.cuda.is_available() else "cpu")
            dist.all_reduce(late)
        if late.item():
            break
        row: dict[str, Any] = dict(shape=args.shape, gpus=gpus, sequence=args.sequence, rows=args.rows)
        row |= dict(kind=kind, versions=versions, date=datetime.date.today().isoformat(), note=args.note)
        row["gpu"] = torch.cuda.get_device_name() if torch.cuda.is_available() else "CPU"
        functions: dict[str, Any] = {}
        try:
            watch = run(args, folder, kind)
            seconds = watch.milliseconds() / 1000
            row |= {"ms_step": round(1000 * seconds, 1), "loss": round(watch.loss, 3)}
            row |= {"tokens_per_second": round(4 * gpus * args.sequence / seconds)}
            row |= {"peak_gib": round(watch.peak, 1)}  # type: ignore[attr-defined]
            if watch.profile is not None and rank == 0:
                figures, functions = summary(watch.profile, 1000 * watch.profiled, 1000 * seconds)
                row |= figures
                if args.trace:
                    watch.profile.export_chrome_trace(
                        str(args.out.parent / f"{kind.replace(' ', '-')}.json.gz")
                    )
        except Exception as error:  # a kind that cannot is a result too; all ranks meet the same
            traceback.print_exc()
            row["error"] = f"{type(error).__name__}: {error}"[:200]
        if rank == 0:
            print(json.dumps(row), flush=True)
            append_csv(args.out, COLUMNS, [row])
            with args.out.with_suffix(".jsonl").open("a") as file:
                file.write(json.dumps({"kind": kind, "shape": args.shape, **functions}) + "\n")


if __name__ == "__main__":
    main()
