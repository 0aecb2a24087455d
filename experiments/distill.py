"""A ternary student with and without its dense original as a teacher, with and without a ramp, by Axolotl, on
the same tokens.

The teacher is a dense model fine-tuned on the task (continuing a passage of the text); its weights are the
students' latents. The last tenth of the text is held out; everyone's loss on it is the plain one, on the
answers alone.

    python experiments/distill.py MODEL_FOLDER TEXT --seconds 300
"""

from __future__ import annotations

import argparse
import json
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import study_data
import torch
import yaml
from axolotl_run import COLUMNS, Run, run_all
from safetensors.torch import load_file
from shared import RESULTS, append_csv, read_csv
from study_step import DEVICE, Flat, lm_loss, plain_token_losses
from study_train import Setting, evaluate, train
from transformers import AutoModelForCausalLM, AutoTokenizer

from axolotl_bitnet import convert_to_bitlinear

RECIPES = Path(__file__).resolve().parents[1] / "examples" / "falcon-e"
CHATML = (
    "{% for message in messages %}<|im_start|>{{ message['role'] }}\n{{ message['content'] }}<|im_end|>\n"
    "{% endfor %}{% if add_generation_prompt %}<|im_start|>assistant\n{% endif %}"
)


def make_teacher(args: argparse.Namespace, batches: study_data.Batches, folder: Path) -> None:
    """The dense model after an ordinary fine-tuning, as a folder."""
    model = AutoModelForCausalLM.from_pretrained(args.model, dtype=torch.float32)
    setting = Setting(task="sft", model="dense", lr=args.teacher_lr, steps=args.teacher_steps)
    weights = args.work / "teacher.safetensors"
    result, _ = train(model, setting, batches, "graph", None, weights)
    print("teacher", {key: result[key] for key in ("eval_before", "eval_loss", "seconds")}, flush=True)
    into = Flat(model, torch.float32)
    for kind, tensor in load_file(weights).items():
        into.tensors[kind].data.copy_(tensor)
    model.bfloat16().save_pretrained(folder)
    tokenizer = AutoTokenizer.from_pretrained(args.model)
    tokenizer.chat_template = CHATML
    tokenizer.save_pretrained(folder)


def held_out_loss(folder: Path, batches: study_data.Batches, ternary: bool) -> float:
    model = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32).to(DEVICE)
    if ternary:
        convert_to_bitlinear(model)

    def loss(*inputs: Any) -> Any:
        return lm_loss(plain_token_losses, *inputs)

    return evaluate(loss, model, None, batches)["eval_loss"]


def students(args: argparse.Namespace, teacher: Path, conversations: Path, taught: Path) -> list[Run]:
    plain = {
        "path": str(conversations),
        "ds_type": "json",
        "type": "chat_template",
        "field_messages": "messages",
    }
    runs = []
    for rate, ramp in ((1e-3, 0.0), (1e-3, 0.1), (5e-4, 0.0)):
        for taught_by in (True, False):
            name = f"{'with' if taught_by else 'without'}-teacher-{rate:g}{'-ramp' if ramp else ''}"
            settings = yaml.safe_load((RECIPES / "distill.yaml").read_text(encoding="utf-8"))
            settings["datasets"][0]["path"] = str(taught)
            if not taught_by:
                settings["datasets"] = [plain]
                settings["plugins"] = settings["plugins"][:1]
                settings = {key: value for key, value in settings.items() if not key.startswith("kd_")}
            length = 512 if args.small else 2048
            settings["bitnet"]["ramp_steps"] = int(ramp * args.steps)
            settings |= {
                "base_model": str(teacher),
                "output_dir": str(args.work / name),
                "dataset_prepared_path": str(args.work / f"prepared-{taught_by}"),
                "dataset_num_proc": args.processes,
                "learning_rate": rate / settings["bitnet"]["learning_rate_multiplier"],
                "sequence_len": length,
                "num_epochs": 100,
                "max_steps": args.steps,
            }
            if args.small:
                settings |= {
                    "bf16": False,
                    "micro_batch_size": 1,
                    "optimizer": "adamw_torch",
                    "dataloader_num_workers": 0,
                }
            runs.append(Run(name, settings, length * settings["micro_batch_size"]))
    return runs


def write_conversations(text: Path, out: Path, limit: int | None) -> None:
    """As study_data has them: a verse, and the next eight."""
    lines = [line.strip() for line in text.read_text(encoding="utf-8").splitlines() if line.strip()]
    verses = [study_data.REFERENCE.sub("", line) for line in lines[: len(lines) * 9 // 10]]
    with out.open("w", encoding="utf-8") as file:
        for i in list(range(0, len(verses) - 9, 9))[:limit]:
            turns = ("Continue the passage: " + verses[i], " ".join(verses[i + 1 : i + 9]))
            roles = ("user", "assistant")
            messages = [{"role": role, "content": turn} for role, turn in zip(roles, turns, strict=True)]
            file.write(json.dumps({"messages": messages}) + "\n")


def main() -> None:
    parser = argparse.ArgumentParser(description="A ternary student with and without a dense teacher.")
    parser.add_argument("model", type=Path)
    parser.add_argument("text", type=Path)
    parser.add_argument("--steps", type=int, default=200, help="of 8,192 tokens, or 512")
    parser.add_argument("--teacher-steps", type=int, default=200)
    parser.add_argument("--teacher-lr", type=float, default=1e-4)
    parser.add_argument("--top-k", type=int, default=16)
    parser.add_argument("--processes", type=int, default=12)
    parser.add_argument("--per-gpu", type=int, default=2)
    parser.add_argument("--seconds", type=float, default=1e9)
    parser.add_argument("--small", action="store_true", help="512 tokens a step, float32: on a CPU")
    parser.add_argument("--conversations", type=int, help="only so many, to try the script")
    parser.add_argument("--work", type=Path, default=Path("/tmp/distill"))
    parser.add_argument("--out", type=Path, default=RESULTS / "distill.csv")
    args = parser.parse_args()

    deadline = time.monotonic() + args.seconds
    args.work.mkdir(parents=True, exist_ok=True)
    conversations, taught = args.work / "conversations.jsonl", args.work / "teacher.parquet"
    write_conversations(args.text, conversations, args.conversations)
    batches = study_data.load(args.text, AutoTokenizer.from_pretrained(args.model), args.small)["sft"]
    teacher = args.work / "teacher"
    if not (teacher / "config.json").exists():
        make_teacher(args, batches, teacher)
    length = ["--sequence-len", "512" if args.small else "2048"]
    command = [sys.executable, str(RECIPES / "distill_teacher.py"), str(teacher), str(conversations)]
    if not taught.exists():
        subprocess.run([*command, str(taught), "--top-k", str(args.top_k), *length], check=True)
    runs = students(args, teacher, conversations, taught)
    run_all(runs, args.out, args.work, args.per_gpu, deadline)
    finals = [("teacher", teacher, False), ("untrained student", teacher, True)]
    finals += [(run.name, args.work / run.name, True) for run in runs]
    rows = read_csv(args.out) if args.out.exists() else []
    known = {row["run"] for row in rows if row["step"] == "held out"}
    for name, folder, ternary in finals:
        if name not in known and list(folder.glob("*.safetensors")):  # else it was cut off
            loss = held_out_loss(folder, batches, ternary)
            print(name, loss, flush=True)
            append_csv(args.out, COLUMNS, [dict(run=name, step="held out", eval_loss=loss)])


if __name__ == "__main__":
    main()
