"""What makes a dense model a good ternary one: recipes at equal tokens, the gap against tokens.

    python experiments/convert.py recipes MODEL DATA --out recipes.csv  # 400 steps, King James Bible
    python experiments/convert.py tokens MODEL DATA --out tokens.csv    # documentation, a curve

MODEL is a folder with SmolLM2-135M-Instruct as GGUF (Q4_1: the base of all figures is that 4-bit model),
DATA what convert_data.py wrote. Runs are spread over all GPUs, ``--each`` processes on one; a row is written
when a run has ended, and a run whose row is there is not run again. ``--seconds`` is a limit: no run begins
that would outlast it, and what runs then is killed.
On a CPU: ``--small`` (a random model of two layers, a few steps).
"""

from __future__ import annotations

import argparse
import json
import os
import subprocess
import sys
import tempfile
import time
import traceback
from dataclasses import asdict, fields, replace
from functools import partial
from pathlib import Path
from typing import Any

import torch
from convert_train import Run, free, load_lab, read_base, train
from shared import append_csv, read_csv

PLAIN = Run()
TAUGHT = Run(teacher="base")
BEST = replace(TAUGHT, start="stretch", lr=2e-3)
HALF = replace(BEST, weight=0.5)
SMALLER = replace(HALF, batch=4)
DOCS = 25_000_000 // 8192 * 8192
HALF_DOCS = 12_500_000 // 8192 * 8192

RECIPES: dict[str, Run] = {
    "dense": Run(ternary=False, ramp=0.0, lr=5e-5),
    "ramp": PLAIN,
    "ramp-4k-lr2e-3": replace(PLAIN, lr=2e-3, batch=4),
    "ramp-4k-lr2e-3-stretch": replace(PLAIN, start="stretch", lr=2e-3, batch=4),
    "taught": TAUGHT,
    "best": BEST,  # the divergence alone, 8,192 tokens a step
    "best-no-stretch": replace(BEST, start=""),
    "best-lr1e-3": replace(BEST, lr=1e-3),
    "best-lr3e-3": replace(BEST, lr=3e-3),
    "best-tuned": replace(BEST, teacher="tuned"),
    "best-4k": replace(BEST, batch=4),
    "best-ramp30": replace(BEST, ramp=0.3),
    "best-muon": replace(BEST, optimizer="muon", lr=3e-3),
    "best-half-ce": HALF,
    "half-lr1e-3": replace(HALF, lr=1e-3),
    "half-lr3e-3": replace(HALF, lr=3e-3),
    "half-lr5e-3": replace(HALF, lr=5e-3),
    "half-4k": SMALLER,
    "half-4k-lr1e-3": replace(SMALLER, lr=1e-3),
    "half-4k-lr3e-3": replace(SMALLER, lr=3e-3),
    "half-2k": replace(HALF, batch=2),
    "half-2k-lr1e-3": replace(HALF, batch=2, lr=1e-3),
    "half-4k-ramp0": replace(SMALLER, ramp=0.0),
    "half-4k-ramp30": replace(SMALLER, ramp=0.3),
    "w0.3-4k": replace(SMALLER, weight=0.3),
    "w0.7-4k": replace(SMALLER, weight=0.7),
    "half-4k-T2": replace(SMALLER, temperature=2.0),
    "half-4k-no-stretch": replace(SMALLER, start=""),
    "half-4k-lacking": replace(SMALLER, start="lacking"),
    "half-4k-muon": replace(SMALLER, optimizer="muon", lr=3e-3),
    "half-4k-muon-1e-2": replace(SMALLER, optimizer="muon", lr=1e-2),
    "half-4k-soft": replace(SMALLER, soft=True, start="", ramp=0.6),
    "w0.7-4k-soft-lacking": replace(SMALLER, weight=0.7, soft=True, start="lacking", ramp=0.6),
    "half-4k-ce-first": replace(SMALLER, ce_first=0.5),
    "tuned-4k": replace(SMALLER, weight=1.0, teacher="tuned"),
    "tuned-half-4k": replace(SMALLER, teacher="tuned"),
    "tuned-4k-ramp30": replace(SMALLER, weight=1.0, teacher="tuned", ramp=0.3),
    "tuned-0.7-4k-ramp30": replace(SMALLER, weight=0.7, teacher="tuned", ramp=0.3),
    "w0.7-4k-ramp0": replace(SMALLER, weight=0.7, ramp=0.0),
    "w0.7-4k-ramp30": replace(SMALLER, weight=0.7, ramp=0.3),
    "w0.7-4k-ramp30-no-stretch": replace(SMALLER, weight=0.7, ramp=0.3, start=""),
    "w0.7-4k-ramp30-lacking": replace(SMALLER, weight=0.7, ramp=0.3, start="lacking"),
    "w0.7-4k-ramp30-T2": replace(SMALLER, weight=0.7, ramp=0.3, temperature=2.0),
    "w0.7-4k-ramp30-b0.99": replace(SMALLER, weight=0.7, ramp=0.3, beta2=0.99),
    "w0.7-4k-ramp30-b0.999": replace(SMALLER, weight=0.7, ramp=0.3, beta2=0.999),
    "written-400": replace(SMALLER, data="written", weight=1.0, ramp=0.3),
    "docs-400": replace(SMALLER, data="docs", weight=0.7, ramp=0.3),  # of the same number of tokens
}
TOKENS: dict[str, Run] = {
    "docs-half-2k": replace(HALF, batch=2, data="docs", tokens=DOCS),
    "docs-half-4k": replace(SMALLER, data="docs", tokens=DOCS),
    "docs-half-8k": replace(HALF, data="docs", tokens=DOCS),
    "docs-teacher": replace(RECIPES["dense"], data="docs", tokens=8_000_000 // 8192 * 8192),
    "docs-tuned-8k": replace(BEST, teacher="docs-tuned", data="docs", tokens=DOCS),
    "docs-tuned-half-8k": replace(HALF, teacher="docs-tuned", data="docs", tokens=DOCS),
    "docs-tuned-8k-b0.99": replace(BEST, teacher="docs-tuned", beta2=0.99, data="docs", tokens=DOCS),
    "docs-tuned-8k-features": replace(BEST, teacher="docs-tuned", features=1.0, data="docs", tokens=DOCS),
    # the teacher is the dense model after as many tokens
    "docs-dense-12m": replace(RECIPES["dense"], data="docs", tokens=HALF_DOCS),
    "docs-tuned-12m": replace(BEST, teacher="docs-dense-12m", data="docs", tokens=HALF_DOCS),
    "docs-tuned-25m": replace(BEST, teacher="docs-dense", data="docs", tokens=DOCS),
    "docs-tuned-25m-features": replace(BEST, teacher="docs-dense", features=1.0, data="docs", tokens=DOCS),
    "docs-ramp": replace(PLAIN, data="docs", tokens=DOCS),
    "docs-ramp-4k-lr2e-3": replace(PLAIN, lr=2e-3, batch=4, data="docs", tokens=DOCS),
    "docs-dense": replace(RECIPES["dense"], data="docs", tokens=DOCS),
}
TABLES = {"recipes": RECIPES, "tokens": TOKENS}
LEAVES = {  # weights for other runs
    "dense": "tuned",
    "docs-teacher": "docs-tuned",
    "docs-dense-12m": "docs-dense-12m",
    "docs-dense": "docs-dense",
}

FIGURES = (
    "before", "held_out", "accuracy", "agreement", "written", "loss", "flips", "zeros", "steps", "ms_step",
    "prepare_s", "seconds", "device", "error",
)  # fmt: skip
COLUMNS = ("run", *(field.name for field in fields(Run)), *FIGURES)
POINTS = ("run", "step", "tokens", "held_out", "accuracy", "agreement", "written", "loss")
SMALL = 3


def rounded(row: dict[str, Any]) -> dict[str, Any]:
    return {key: float(f"{value:.5g}") if isinstance(value, float) else value for key, value in row.items()}


def work(args: argparse.Namespace, runs: dict[str, Run]) -> int:
    """A process: its runs one after another, while there is time."""
    torch.set_num_threads(args.threads)
    torch._dynamo.config.recompile_limit = 256
    while not (args.work / "base").exists():
        time.sleep(0.2)
    lab = load_lab(args.work / "base", args.data, args.work, args.compiled, args.small)
    for name, run in runs.items():
        if args.small:
            run = replace(run, length=64, batch=min(run.batch, 2), tokens=SMALL * 64 * min(run.batch, 2))
        if time.time() + args.expect > args.until:
            print("no time for", name, flush=True)
            continue
        if not claimed(args.claims / name):
            continue
        while run.teacher in LEAVES.values() and not (args.work / f"{run.teacher}.pt").exists():
            time.sleep(0.5)
        began = time.monotonic()
        row: dict[str, Any] = {}
        every = 2_000_000 if args.table == "tokens" else 0
        for compiled in (True, False) if lab.compiled else (False,):
            lab.compiled = compiled
            try:
                row, model = train(lab, run, every, partial(add_point, args, name) if every else None)
                row.pop("error", None)
                break
            except Exception as error:
                traceback.print_exc()
                row = {"error": f"{type(error).__name__}: {error}"[:200].replace("\n", " ")}
        if "error" not in row:
            if kind := LEAVES.get(name):
                torch.save(model.state_dict(), args.work / f"{kind}.part")
                (args.work / f"{kind}.part").replace(args.work / f"{kind}.pt")
            if args.keep and name.startswith(tuple(args.keep.split(","))):
                model.save_pretrained(args.work / name)
            del model
        row |= {"steps": run.steps, "seconds": time.monotonic() - began}
        row["device"] = torch.cuda.get_device_name() if torch.cuda.is_available() else "cpu"
        append_csv(args.out, COLUMNS, [rounded({"run": name, **asdict(run), **row})])
        print(json.dumps(rounded({"run": name, "seed": run.seed, **row})), flush=True)
        free()
        if "CUDA" in row.get("error", ""):
            return 3
    return 0


def claimed(mark: Path) -> bool:
    """Whether this process is the first to take a run."""
    try:
        mark.touch(exist_ok=False)
    except FileExistsError:
        return False
    return True


def add_point(args: argparse.Namespace, name: str, point: dict[str, Any]) -> None:
    path = args.out.with_name(f"{args.out.stem}_curve.csv")
    append_csv(path, POINTS, [rounded({"run": name, **{key: point.get(key, "") for key in POINTS[1:]}})])


def plan(args: argparse.Namespace) -> dict[str, Run]:
    """By a name of its own each run that is asked for, seeds after the first marked in the name."""
    table = TABLES[args.table]
    for text in args.define:  # NAME:OTHER:key=value,...
        name, other, settings = text.split(":")
        kinds = {field.name: type(field.default) for field in fields(Run)}
        changed = {}
        for pair in filter(None, settings.split(",")):
            key, value = pair.split("=")
            changed[key] = json.loads(value) if kinds[key] is bool else kinds[key](value)
        table[name] = replace({**RECIPES, **TOKENS}[other], **changed)
    found = {}
    for asked in (args.runs or ",".join(table)).split(","):
        name, _, seed = asked.partition("@")
        found[asked] = replace(table[name], seed=int(seed or 1))
    return found


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("table", choices=TABLES)
    parser.add_argument("model", type=Path)
    parser.add_argument("data", type=Path)
    parser.add_argument("--work", type=Path, default=Path("convert-work"))
    parser.add_argument("--out", type=Path, default=Path("convert.csv"))
    parser.add_argument("--runs", default="", help="NAME or NAME@SEED, separated by commas; default: all")
    parser.add_argument("--define", action="append", default=[], metavar="NAME:LIKE:key=value,...")
    parser.add_argument("--keep", default="", help="save the models of runs that begin so, in --work")
    parser.add_argument("--seconds", type=float, default=1e9)
    parser.add_argument("--expect", type=float, default=40, help="seconds of a run, for that limit")
    parser.add_argument("--each", type=int, default=2, help="processes on one GPU")
    parser.add_argument("--threads", type=int, default=4)
    parser.add_argument("--compiled", type=int, default=1)
    parser.add_argument("--small", action="store_true")
    parser.add_argument("--until", type=float, default=0.0, help=argparse.SUPPRESS)  # of a worker
    parser.add_argument("--claims", type=Path, help=argparse.SUPPRESS)  # of a worker
    args = parser.parse_args()
    runs = plan(args)
    if args.until:
        return work(args, runs)
    done = {row["run"] for row in read_csv(args.out) if not row["error"]} if args.out.exists() else set()
    waiting = [name for name in runs if name not in done]
    args.work.mkdir(parents=True, exist_ok=True)
    until = time.time() + args.seconds
    seen = os.environ.get("CUDA_VISIBLE_DEVICES")
    gpus = seen.split(",") if seen else [str(index) for index in range(torch.cuda.device_count() or 1)]
    slots = len(gpus) * args.each
    claims = tempfile.mkdtemp(prefix="claims-", dir=args.work)
    processes = []
    for slot in range(min(slots, len(waiting))):
        rest = sys.argv[1:]  # of an option given twice, the last holds
        settled = (f"--runs={','.join(waiting)}", f"--until={until}", f"--claims={claims}")
        command = [sys.executable, __file__, *rest, *settled]
        gpu = {"CUDA_VISIBLE_DEVICES": gpus[slot % len(gpus)]}
        processes.append(subprocess.Popen(command, env=os.environ | gpu))
    read_base(args.model, args.work)  # while they import torch
    while any(process.poll() is None for process in processes):
        time.sleep(0.2)
        if time.time() > until:
            for process in processes:
                process.kill()
    return 0


if __name__ == "__main__":
    raise SystemExit(main())
