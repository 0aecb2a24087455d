"""The SFT recipe on 1, 2, 4, 8 GPUs: tokens per second, how well that scales, memory, bytes gathered.

Takes examples/falcon-e/sft.yaml as it is, but for a base with random weights of Falcon-E's shape, random
tokens and few steps, and trains it in Axolotl: dense (bf16 nn.Linear), ternary with FSDP2's own all-gather
(native), ternary with codes gathered (ternary); on every number of GPUs asked for. A run is a row of the CSV,
written at once; what has a row is not run again. A run ends after its last step: nothing is saved.

    python benchmarks/scaling.py --gpus 1 2 --kinds dense native ternary
    python benchmarks/scaling.py --gpus 8 --kinds ternary --replicate 2
    python benchmarks/scaling.py --gpus 8 --kinds dense ternary --shape 10B --sequence 8192
"""

from __future__ import annotations

import argparse
import json
import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import torch
import yaml
from common import RESULTS, read_csv, write_csv

ROOT = Path(__file__).resolve().parents[1]
KINDS = ("dense", "native", "ternary")
SHAPES: dict[str, dict[str, int]] = {
    "tiny": dict(hidden_size=64, intermediate_size=128, num_hidden_layers=2, num_attention_heads=4,
                 num_key_value_heads=2, head_dim=16),
    "1B": dict(hidden_size=2048, intermediate_size=9216, num_hidden_layers=24, num_attention_heads=16,
               num_key_value_heads=2, head_dim=128),
    "3B": dict(hidden_size=2048, intermediate_size=13312, num_hidden_layers=32, num_attention_heads=16,
               num_key_value_heads=2, head_dim=128),
    "10B": dict(hidden_size=3072, intermediate_size=23040, num_hidden_layers=40, num_attention_heads=12,
                num_key_value_heads=4, head_dim=256),
}  # fmt: skip
VOCABULARY = 32768
COLUMNS = (
    "shape", "gpus", "replicate", "kind", "sequence", "ms_step", "tokens_per_second", "peak_gib",
    "gathered_mb_step", "loss", "error",
)  # fmt: skip


def save_base(folder: Path, shape: str) -> None:
    """A base of random weights, with the tiny recipe's tokenizer; once."""
    from transformers import AutoTokenizer, LlamaConfig, LlamaForCausalLM

    if not (folder / "config.json").exists():
        config = LlamaConfig(
            **SHAPES[shape],
            vocab_size=VOCABULARY,
            max_position_embeddings=32768,
            tie_word_embeddings=False,
            dtype="bfloat16",
        )
        torch.manual_seed(0)
        with torch.device("cuda" if torch.cuda.is_available() else "cpu"):
            model = LlamaForCausalLM(config).to(torch.bfloat16)
        model.save_pretrained(folder)
        del model
        AutoTokenizer.from_pretrained(ROOT / "examples" / "falcon-e" / "tiny" / "model").save_pretrained(
            folder
        )
        torch.cuda.empty_cache()


def prepare(folder: Path, shape: str, sequence: int, rows: int) -> None:
    """A base, and rows of random tokens."""
    from datasets import Dataset

    save_base(folder, shape)
    ids = torch.randint(3, VOCABULARY, (rows, sequence), generator=torch.Generator().manual_seed(1)).tolist()
    ones = [[1] * sequence] * rows
    Dataset.from_dict({"input_ids": ids, "attention_mask": ones, "labels": ids}).to_parquet(
        folder / f"data-{sequence}.parquet"
    )


def recipe(args: argparse.Namespace, folder: Path, gpus: int, kind: str) -> dict[str, Any]:
    settings: dict[str, Any] = yaml.safe_load((ROOT / "examples" / "falcon-e" / "sft.yaml").read_text())
    for key in ("special_tokens", "eot_tokens", "chat_template", "loss_watchdog_threshold"):
        settings.pop(key)
    data = {"path": str(folder / f"data-{args.sequence}.parquet"), "ds_type": "parquet", "type": None}
    settings |= {"base_model": str(folder), "datasets": [data], "sequence_len": args.sequence}
    settings |= {"dataset_prepared_path": str(folder / f"prepared-{args.sequence}"), "dataset_num_proc": 4}
    settings |= {"output_dir": str(folder / f"out-{gpus}-{kind}"), "max_steps": args.steps, "warmup_steps": 2}
    settings |= {"save_strategy": "no", "save_steps": None}
    if kind == "dense":
        settings |= {"use_onebitllms": False, "bitnet": None, "learning_rate": 5e-4}
    else:
        settings["bitnet"] |= {"gather": kind, "export": [], "verify": False}
    if args.replicate > 1:
        settings |= {"dp_replicate_size": args.replicate, "dp_shard_size": gpus // args.replicate}
    if not torch.cuda.is_available():  # to try the script: DDP, float32
        settings |= {"fsdp_version": None, "fsdp_config": None, "bf16": False, "tf32": False}
        settings |= (
            {"bitnet": None} if kind == "dense" else {"bitnet": settings["bitnet"] | {"gather": "auto"}}
        )
    return {key: value for key, value in settings.items() if value is not None}


def worker(config: str, result: str) -> None:
    """A process of a run, with every step's time and the bytes that this rank gathers."""
    import time

    import torch.distributed as dist

    sys.path.insert(0, str(ROOT / "tests"))
    from transformers import Trainer, TrainerCallback

    from support import runs

    gathered = 0
    gather = dist.all_gather_into_tensor

    def counted(output: torch.Tensor, part: torch.Tensor, *rest: Any, **more: Any) -> Any:
        nonlocal gathered
        gathered += output.nbytes - part.nbytes
        return gather(output, part, *rest, **more)

    dist.all_gather_into_tensor = counted
    times: list[float] = []
    bytes_at: list[int] = []
    losses: list[float] = []

    class Clock(TrainerCallback):
        def on_step_end(self, *args: Any, **kwargs: Any) -> None:
            if torch.cuda.is_available():
                torch.cuda.synchronize()
            times.append(time.perf_counter())
            bytes_at.append(gathered)

        def on_log(self, args: Any, state: Any, control: Any, logs: Any = None, **kwargs: Any) -> None:
            losses.extend([float(logs["loss"])] if "loss" in logs else [])

        def on_train_end(self, *args: Any, **kwargs: Any) -> None:
            if os.environ.get("RANK", "0") == "0":
                half = len(times) // 2
                steps = len(times) - 1 - half
                peak = torch.cuda.max_memory_allocated() / 2**30 if torch.cuda.is_available() else 0.0
                found = {
                    "seconds": (times[-1] - times[half]) / steps,
                    "peak_gib": peak,
                    "gathered_mb": (bytes_at[-1] - bytes_at[half]) / steps / 1e6,
                    "loss": losses[-1],
                }
                Path(result).write_text(json.dumps(found))
            if dist.is_initialized():
                dist.barrier()
            os._exit(0)  # saving the weights would take longer than the steps

    build = Trainer.__init__

    def with_clock(self: Any, *args: Any, **kwargs: Any) -> None:
        build(self, *args, **kwargs)
        self.add_callback(Clock())

    Trainer.__init__ = with_clock
    runs.train(json.loads(Path(config).read_text()))


def _place(args: argparse.Namespace, gpus: int, kind: str) -> dict[str, Any]:
    return dict(shape=args.shape, gpus=gpus, replicate=args.replicate, kind=kind, sequence=args.sequence)


def measure(args: argparse.Namespace, folder: Path, gpus: int, kind: str) -> dict[str, Any]:
    settings = recipe(args, folder, gpus, kind)
    path, result = folder / f"{gpus}-{kind}.json", folder / f"{gpus}-{kind}.result.json"
    path.write_text(json.dumps(settings))
    result.unlink(missing_ok=True)
    row: dict[str, Any] = dict.fromkeys(COLUMNS, "") | _place(args, gpus, kind)
    command = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc_per_node", str(gpus)]
    command = ["timeout", "--kill-after=10", str(args.timeout), *command]
    command += [__file__, "--worker", str(path), str(result)]
    environment = os.environ | ({} if torch.cuda.is_available() else {"ACCELERATE_USE_CPU": "true"})
    with (folder / f"{gpus}-{kind}.log").open("w") as log:
        subprocess.run(command, stdout=log, stderr=log, env=environment)
    if not result.exists():
        lines = (folder / f"{gpus}-{kind}.log").read_text().splitlines()
        return row | {"error": next((line for line in lines if "Error" in line), "no result")[:200]}
    found = json.loads(result.read_text())
    tokens = args.sequence * gpus * settings["gradient_accumulation_steps"]
    return row | {
        "ms_step": round(1000 * found["seconds"], 1),
        "tokens_per_second": round(tokens / found["seconds"]),
        "peak_gib": round(found["peak_gib"], 1),
        "gathered_mb_step": round(found["gathered_mb"]),
        "loss": round(found["loss"], 3),
    }


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--gpus", type=int, nargs="+", default=[1, 2, 4, 8])
    parser.add_argument("--kinds", nargs="+", choices=KINDS, default=list(KINDS))
    parser.add_argument("--shape", choices=SHAPES, default="3B")
    parser.add_argument("--sequence", type=int, default=32768, help="the recipe's; tokens per micro-batch")
    parser.add_argument("--replicate", type=int, default=1, help="HSDP: so many replicas of the shards")
    parser.add_argument("--steps", type=int, default=7)
    parser.add_argument("--timeout", type=int, default=240, help="seconds per run")
    parser.add_argument("--folder", type=Path, default=ROOT / "outputs" / "scaling")
    parser.add_argument("--out", type=Path, default=RESULTS / "scaling.csv")
    args = parser.parse_args()
    folder = args.folder.resolve() / args.shape
    folder.mkdir(parents=True, exist_ok=True)
    prepare(folder, args.shape, args.sequence, rows=4 * max(args.gpus) * args.steps)
    rows: list[dict[str, Any]] = read_csv(args.out) if args.out.exists() else []
    for gpus in args.gpus:
        for kind in args.kinds:
            place = {key: str(value) for key, value in _place(args, gpus, kind).items()}
            if any(place.items() <= {k: str(v) for k, v in row.items()}.items() for row in rows):
                continue  # a row with an error was cut off, or failed: delete it to try again
            rows.append(measure(args, folder, gpus, kind))
            print(rows[-1], flush=True)
            write_csv(args.out, rows)


if __name__ == "__main__":
    worker(*sys.argv[2:]) if sys.argv[1:2] == ["--worker"] else main()
