"""Configs of runs with a preference method or a reward model, on a few rows of the tiny pairs."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from transformers import AutoTokenizer

from axolotl_bitnet.layers.bitlinear import BitLinear
from axolotl_bitnet.ternary import ternarize
from support import TINY
from support.runs import config, preference

ROWS = 24
STEPS = 10


def save_base(tiny_model: Callable[..., torch.nn.Module], folder: Path, **overrides: Any) -> Path:
    """A tiny random Llama on disk, with the demo's tokenizer."""
    tokenizer = AutoTokenizer.from_pretrained(TINY / "model")
    tiny_model("Llama", vocab_size=-(-len(tokenizer) // 32) * 32, **overrides).save_pretrained(folder)
    tokenizer.save_pretrained(folder)
    return folder


def settings_of(method: str, folder: Path, base: Path, **overrides: Any) -> dict[str, Any]:
    """The config of a run of ``STEPS`` steps: an `rl:` method, or a key like `reward_model`."""
    keys: dict[str, Any] = {"max_steps": STEPS, "learning_rate": 3e-3, "sequence_len": 48}
    keys["datasets"] = [_rows_of(method, folder)]
    keys["remove_unused_columns"] = False
    if method in ("reward_model", "process_reward_model"):
        return config(folder, base, **(keys | {method: True} | overrides))
    if method == "orpo":
        keys["orpo_alpha"] = 0.1
    if method == "simpo":
        keys |= {"rl_beta": 0.1, "cpo_alpha": 1.0, "simpo_gamma": 0.5}
    if method in ("grpo", "gdpo"):
        keys["trl"] = grpo_block()
    return preference(folder, base, **(keys | {"rl": method} | overrides))


def grpo_block(**overrides: Any) -> dict[str, Any]:
    block = {
        "beta": 0.1,
        "num_generations": 4,
        "max_completion_length": 5,
        "reward_funcs": ["support.rewards.low_tokens"],
    }
    return block | overrides


def _rows_of(method: str, folder: Path) -> dict[str, Any]:
    """The dataset entry of a method, its file written in the form that the method wants."""
    pairs = [json.loads(line) for line in (TINY / "dpo.jsonl").read_text().splitlines()[:ROWS]]
    kinds: dict[str, tuple[Any, Callable[[int, str, str, str], dict[str, Any]]]] = {
        "kto": (
            {"field_prompt": "prompt", "field_completion": "completion", "field_label": "label"},
            lambda i, ask, good, bad: {
                "prompt": ask,
                "completion": bad if i % 2 else good,
                "label": i % 2 == 0,
            },
        ),
        "grpo": (None, lambda i, ask, good, bad: {"prompt": ask}),
        "reward_model": (
            "bradley_terry.chat_template",
            lambda i, ask, good, bad: {"system": "", "input": ask, "chosen": good, "rejected": bad},
        ),
        "process_reward_model": (
            "stepwise_supervised",
            lambda i, ask, good, bad: {"prompt": ask, "completions": [good, bad], "labels": [True, False]},
        ),
        "orpo": (
            "chat_template.argilla",
            lambda i, ask, good, bad: {
                "prompt": ask,
                "chosen": [_turn("user", ask), _turn("assistant", good)],
                "rejected": [_turn("user", ask), _turn("assistant", bad)],
            },
        ),
        "pairs": (
            "chat_template.default",
            lambda i, ask, good, bad: {
                "messages": [_turn("user", ask)],
                "chosen": _turn("assistant", good),
                "rejected": _turn("assistant", bad),
            },
        ),
    }
    kind = {"gdpo": "grpo"}.get(method, method)
    row_type, make = kinds.get(kind, kinds["pairs"])
    rows = [
        make(i, pair["messages"][0]["content"], pair["chosen"]["content"], pair["rejected"]["content"])
        for i, pair in enumerate(pairs)
    ]
    path = folder / f"{method}.jsonl"
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    entry = {"path": str(path), "ds_type": "json", "split": "train", "type": row_type}
    if method == "process_reward_model":
        entry["step_separator"] = " "
    if kinds.get(kind) is None:
        entry["field_messages"] = "messages"
    return {key: value for key, value in entry.items() if value is not None}


def _turn(role: str, content: str) -> dict[str, str]:
    return {"role": role, "content": content}


def codes_of_model(model: torch.nn.Module) -> dict[str, torch.Tensor]:
    """The codes of every BitLinear, by its name."""
    return {
        name: ternarize(module.weight.detach())[0]
        for name, module in model.named_modules()
        if isinstance(module, BitLinear)
    }


def flipped(model: torch.nn.Module, other: torch.nn.Module) -> int:
    """The number of codes in which two ternary models differ."""
    ours, theirs = codes_of_model(model), codes_of_model(other)
    assert ours.keys() == theirs.keys() and ours
    return sum(int((ours[name] != theirs[name]).sum()) for name in ours)
