"""The ternary gap: a model trained ternary and its dense twin, by Axolotl, on the same tokens.

From random weights (examples/falcon-e/pretrain-tiny.yaml) and from a dense base (cpt.yaml, without FSDP). The
last tenth of the text is held out. Dense twins keep float32 weights, as latents are, or bfloat16 ones, as
Axolotl keeps them by itself.

    python experiments/pretrain_gap.py TEXT --base SMOLLM_FOLDER --seconds 300
"""

from __future__ import annotations

import argparse
import json
import time
from pathlib import Path
from typing import Any

import yaml
from axolotl_run import Run, run_all
from shared import RESULTS

RECIPES = Path(__file__).resolve().parents[1] / "examples" / "falcon-e"
PRETRAIN = (  # kind, effective rate; what matters most first
    ("ternary", 1e-3),
    ("dense-float32", 1e-3),
    ("dense-bfloat16", 1e-3),
    ("ternary-ramp", 1e-3),
    ("ternary", 2e-3),
    ("dense-float32", 2e-3),
    ("ternary", 4e-3),
)
CPT = (  # the study's best rates of each
    ("ternary", 1e-3),
    ("ternary-ramp", 1e-3),
    ("dense-float32", 5e-5),
    ("dense-bfloat16", 5e-5),
    ("ternary-ramp", 5e-4),
    ("ternary", 5e-4),
)
DOCUMENT = 100_000  # characters


def write_text(text: Path, folder: Path) -> tuple[Path, Path]:
    """Documents for training and for evaluation, as jsonl."""
    content = text.read_text(encoding="utf-8")
    edge = len(content) * 9 // 10
    folder.mkdir(parents=True, exist_ok=True)
    files = []
    for name, part in (("train", content[:edge]), ("held-out", content[edge:])):
        documents = [part[start : start + DOCUMENT] for start in range(0, len(part), DOCUMENT)]
        files.append(folder / f"{name}.jsonl")
        files[-1].write_text("".join(json.dumps({"text": document}) + "\n" for document in documents))
    return files[0], files[1]


def settings_of(
    recipe: str, kind: str, rate: float, files: tuple[Path, Path], **changes: Any
) -> dict[str, Any]:
    """The recipe with this text, ternary or dense, at this effective rate."""
    settings: dict[str, Any] = yaml.safe_load((RECIPES / recipe).read_text(encoding="utf-8"))
    data = settings["datasets"][0]
    settings["datasets"] = [data | {"path": str(files[0])}]
    settings["test_datasets"] = [data | {"path": str(files[1]), "split": "train"}]
    for key in (
        "val_set_size",
        "fsdp_version",
        "fsdp_config",
        "accelerator_config",
        "loss_watchdog_threshold",
    ):
        settings.pop(key, None)
    settings.pop("loss_watchdog_patience", None)
    if kind.startswith("dense"):
        del settings["use_onebitllms"], settings["bitnet"], settings["plugins"]
        settings["learning_rate"] = rate
        settings["float32_weights"] = kind == "dense-float32"
    else:
        settings["learning_rate"] = rate / settings["bitnet"]["learning_rate_multiplier"]
        if kind == "ternary-ramp":
            settings["bitnet"]["ramp_steps"] = changes["max_steps"] // 10
    return settings | changes


def main() -> None:
    parser = argparse.ArgumentParser(description="The ternary gap at equal tokens.")
    parser.add_argument("text", type=Path)
    parser.add_argument("--base", type=Path, help="a dense Llama: continue its pretraining too")
    parser.add_argument("--only", choices=("pretrain", "cpt"), help="one of the two")
    parser.add_argument("--pretrain-steps", type=int, default=600, help="of 65,536 bytes")
    parser.add_argument("--cpt-steps", type=int, default=300, help="of 8,192 tokens")
    parser.add_argument("--first", type=int, help="only so many runs of each")
    parser.add_argument("--per-gpu", type=int, default=1)
    parser.add_argument("--seconds", type=float, default=1e9)
    parser.add_argument("--small", action="store_true", help="to try the script on a CPU")
    parser.add_argument("--work", type=Path, default=Path("/tmp/gap"))
    parser.add_argument("--out", type=Path, default=RESULTS / "pretrain_gap.csv")
    args = parser.parse_args()

    deadline = time.monotonic() + args.seconds
    files = write_text(args.text, args.work)
    runs = []
    on_cpu = {"bf16": False, "optimizer": "adamw_torch"} if args.small else {}
    for task, recipe, plan, steps in (
        ("cpt", "cpt.yaml", CPT, args.cpt_steps),
        ("pretrain", "pretrain-tiny.yaml", PRETRAIN, args.pretrain_steps),
    ):
        if args.only not in (None, task) or (task == "cpt" and args.base is None):
            continue
        length, batch = (64, 2) if args.small else (1024, 64) if task == "pretrain" else (2048, 4)
        for kind, rate in plan[: args.first]:
            name = f"{task}-{kind}-{rate:g}"
            base = RECIPES / "pretrain-tiny" if task == "pretrain" else args.base
            settings = settings_of(
                recipe,
                kind,
                rate,
                files,
                base_model=str(base),
                special_tokens=None,
                max_steps=steps,
                eval_steps=max(1, steps // 6),
                sequence_len=length,
                micro_batch_size=batch,
                eval_batch_size=batch,
                gradient_accumulation_steps=1,
                save_strategy="no",
                save_steps=None,
                save_total_limit=None,
                logging_steps=min(10, steps),
                dataset_prepared_path=str(args.work / f"prepared-{task}"),
                dataset_num_proc=1,
                output_dir=str(args.work / name),
                **on_cpu,
            )
            given = {key: value for key, value in settings.items() if value is not None}
            runs.append(Run(name, given, length * batch))
    run_all(runs, args.out, args.work, args.per_gpu, deadline)


if __name__ == "__main__":
    main()
