"""The same run in every layout: losses and fingerprint, compared with those of one process.

    python benchmarks/layouts.py --processes 2 single single-2-micro ddp fsdp2-full zero3
    python benchmarks/layouts.py ddp fsdp2-full --bitnet '{"teacher": "base", "ramp_steps": 6}'

Derives a config from the tiny recipe for each layout (float32, one base, the same data, batches of 16), runs
it in Axolotl and writes ``layouts.csv``: a row a layout, with its largest difference of loss to ``single``
and how many codes differ. ``single-2-micro``, two micro-batches in one process, shows what the order of
summation alone does. A layout that fails gets a row with the error; configs and logs are in the folder.
Without GPUs only the first three run. Axolotl averages each micro-batch's loss by itself, so all samples here
have the same number of answer tokens; with others, layouts would weigh tokens differently.
"""

from __future__ import annotations

import argparse
import csv
import json
import os
import subprocess
import sys
import time
from concurrent.futures import ThreadPoolExecutor, as_completed
from pathlib import Path
from typing import Any

import torch
import yaml
from safetensors import safe_open
from transformers import AutoConfig, AutoModelForCausalLM, AutoTokenizer

from axolotl_bitnet.ternary import ternarize

ROOT = Path(__file__).resolve().parents[1]
TINY = ROOT / "examples" / "falcon-e" / "tiny"
BATCH = 16


def fsdp(version: int, **keys: Any) -> dict[str, Any]:
    base: dict[str, Any] = {
        "auto_wrap_policy": "TRANSFORMER_BASED_WRAP",
        "state_dict_type": "FULL_STATE_DICT",
    }
    base |= {"transformer_layer_cls_to_wrap": "LlamaDecoderLayer"}
    base |= {"reshard_after_forward": True} if version == 2 else {"use_orig_params": True}
    return {"fsdp_version": version, "fsdp_config": base | keys}


def zero(stage: int) -> dict[str, Any]:
    section = {"stage": stage} | ({"stage3_gather_16bit_weights_on_model_save": True} if stage == 3 else {})
    auto = ("train_batch_size", "train_micro_batch_size_per_gpu", "gradient_accumulation_steps")
    settings = {"zero_optimization": section, "zero_allow_untested_optimizer": True}
    return {"deepspeed": settings | dict.fromkeys((*auto, "gradient_clipping"), "auto")}


LAYOUTS: dict[str, dict[str, Any]] = {
    "single": {},
    "single-2-micro": {"gradient_accumulation_steps": 2},
    "ddp": {},
    "fsdp1": fsdp(1),
    "fsdp1-flat": fsdp(1, use_orig_params=False),
    "fsdp1-efficient": fsdp(1, cpu_ram_efficient_loading=True, sync_module_states=True),
    "fsdp2-full": fsdp(2),
    "fsdp2-sharded": fsdp(2, state_dict_type="SHARDED_STATE_DICT"),
    "fsdp2-noreshard": fsdp(2, reshard_after_forward=False),
    "fsdp2-efficient": fsdp(2, cpu_ram_efficient_loading=True),
    "fsdp2-offload": fsdp(2, offload_params=True),
    "fsdp2-native": fsdp(2) | {"bitnet": {"learning_rate_multiplier": 10, "gather": "native"}},
    "fsdp2-checkpointing": fsdp(2, activation_checkpointing=True),
    "fsdp2-compile": fsdp(2) | {"torch_compile": True},
    "fsdp2-accumulation": fsdp(2) | {"gradient_accumulation_steps": 2},
    "single-bf16": {"bf16": True},
    "fsdp2-bf16": fsdp(2) | {"bf16": True},
    "zero1": zero(1),
    "zero2": zero(2),
    "zero3": zero(3),
}


def worker(settings: str, result: str) -> None:
    """One process of a run: what `axolotl train` does, and the losses unrounded."""
    sys.path.insert(0, str(ROOT / "tests"))
    from support import runs

    torch.manual_seed(0)  # for weights that are made at random, on a CPU
    run = runs.train(json.loads(Path(settings).read_text()))
    if int(os.environ.get("RANK", "0")) == 0:
        log = run.trainer.state.log_history
        Path(result).write_text(json.dumps([entry["loss"] for entry in log if "loss" in entry]))


def prepare(out: Path) -> None:
    """A base with fixed random weights (Axolotl's own are unseeded) and data with answers of three digits."""
    torch.manual_seed(0)
    config = AutoConfig.from_pretrained(TINY / "model")
    AutoModelForCausalLM.from_config(config).save_pretrained(out / "base")
    AutoTokenizer.from_pretrained(TINY / "model").save_pretrained(out / "base")
    rows = (TINY / "train.jsonl").read_text().splitlines()
    rows = [row for row in rows if len(json.loads(row)["messages"][-1]["content"]) == 3]
    (out / "data.jsonl").write_text("\n".join(rows[:640]))


def launch(name: str, processes: int, out: Path, bitnet: dict[str, Any]) -> None:
    on_cpu = not torch.cuda.is_available()
    count = 1 if name.startswith("single") else processes
    settings = yaml.safe_load((TINY / "sft.yaml").read_text())
    settings["datasets"][0]["path"] = str(out / "data.jsonl")
    settings |= {"base_model": str(out / "base"), "dataset_prepared_path": str(out / "prepared")}
    settings |= {"output_dir": str(out / name), "max_steps": 20, "logging_steps": 1, "dataset_num_proc": 1}
    settings |= {"learning_rate": 2e-5, "lr_scheduler": "constant", "warmup_ratio": 0.0}
    settings |= {"reinit_weights": on_cpu}  # Axolotl loads the base of several processes onto GPUs by number
    settings |= LAYOUTS[name]
    settings["bitnet"] |= bitnet
    settings["micro_batch_size"] = BATCH // count // settings["gradient_accumulation_steps"]
    path = out / f"{name}.json"
    path.write_text(json.dumps(settings, indent=1))
    command = ["timeout", "--kill-after=10", "150", sys.executable]  # ends the workers too
    if count > 1:
        command += ["-m", "torch.distributed.run", "--standalone", "--nproc_per_node", str(count)]
    command += [__file__, "--worker", str(path), str(out / f"{name}.losses.json")]
    environment = os.environ | {"AXOLOTL_DO_NOT_TRACK": "1", "DO_NOT_TRACK": "1", "HF_HUB_OFFLINE": "1"}
    environment |= {"ACCELERATE_USE_CPU": "true"} if on_cpu else {}
    first = os.environ.get("CUDA_VISIBLE_DEVICES", "0").split(",")[0]
    environment |= {} if count > 1 else {"CUDA_VISIBLE_DEVICES": first}  # two would be nn.DataParallel
    with (out / f"{name}.log").open("w") as log:
        subprocess.run(command, stdout=log, stderr=log, check=True, env=environment)


def codes(folder: Path, names: list[str]) -> torch.Tensor:
    found: dict[str, torch.Tensor] = {}
    for path in folder.glob("*.safetensors"):
        with safe_open(path, "pt") as file:
            for key in file.keys():  # noqa: SIM118 - not a dict
                if key.removesuffix(".weight") in names:
                    found[key] = ternarize(file.get_tensor(key))[0].flatten()
    return torch.cat([found[name] for name in sorted(found)])


def row_of(name: str, out: Path) -> dict[str, Any]:
    losses, expected = (json.loads((out / f"{one}.losses.json").read_text()) for one in (name, "single"))
    record = json.loads((out / name / "bitnet.json").read_text())
    ours, theirs = (codes(out / one, record["converted"]) for one in (name, "single"))
    row = {"layout": name, "first_loss": losses[0], "last_loss": losses[-1]}
    row["largest_difference"] = max(abs(a - b) for a, b in zip(losses, expected, strict=True))
    row |= {"codes_differing": int((ours != theirs).sum()), "codes": ours.numel()}
    row["digest"] = record["fingerprint"]["digest"][:16]
    return row | {"verified": record["artifacts"]["packed"]["verified"]}


def measured(name: str, args: argparse.Namespace, out: Path) -> dict[str, Any]:
    start = time.perf_counter()
    try:
        launch(name, args.processes, out, args.bitnet)
        row = row_of(name, out)
    except Exception as error:  # the next layout shall run
        log = out / f"{name}.log"
        said = [line for line in log.read_text().splitlines() if "Error" in line] if log.exists() else []
        row = {"layout": name, "error": (said or [repr(error)])[0][-300:]}
    return row | {"seconds": round(time.perf_counter() - start, 1)}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("layouts", nargs="+", choices=[*LAYOUTS, "all"])
    parser.add_argument("--processes", type=int, default=2)
    parser.add_argument("--together", type=int, default=1, help="layouts that run at the same time")
    parser.add_argument("--bitnet", type=json.loads, default={}, help="more keys of `bitnet`, as JSON")
    parser.add_argument("--out", type=Path, default=ROOT / "outputs" / "layouts")
    args = parser.parse_args()
    out = args.out.resolve()
    prepare(out)
    names = list(LAYOUTS) if "all" in args.layouts else list(dict.fromkeys(args.layouts))
    rows = [measured("single", args, out)]
    print(rows[-1], flush=True)
    with ThreadPoolExecutor(args.together) as pool:
        runs = [pool.submit(measured, name, args, out) for name in names if name != "single"]
        for run in as_completed(runs):
            rows.append(run.result())
            print(rows[-1], flush=True)
            with (out / "layouts.csv").open("w", newline="") as file:
                writer = csv.DictWriter(file, dict.fromkeys(key for row in rows for key in row))
                writer.writeheader()
                writer.writerows(rows)


if __name__ == "__main__":
    worker(*sys.argv[2:]) if sys.argv[1:2] == ["--worker"] else main()
