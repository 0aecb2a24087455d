"""Folders as runs leave them, made up, for the tests of the report."""

from __future__ import annotations

import json
import math
from pathlib import Path
from typing import Any

SHAPES = {
    "self_attn.q_proj": (64, 64),
    "self_attn.k_proj": (32, 64),
    "self_attn.v_proj": (32, 64),
    "self_attn.o_proj": (64, 64),
    "mlp.gate_proj": (128, 64),
    "mlp.up_proj": (128, 64),
    "mlp.down_proj": (64, 128),
}


def names(layers: int) -> list[str]:
    return [f"model.layers.{i}.{name}" for i in range(layers) for name in SHAPES]


def shape(name: str) -> tuple[int, int]:
    return SHAPES.get(".".join(name.split(".")[3:]), (8, 8))


def log(steps: int = 40, monitor: bool = True) -> list[dict[str, Any]]:
    """What the Trainer logs, with evaluations, and with the monitor's values if asked for."""
    entries = []
    for step in range(1, steps + 1):
        entry: dict[str, Any] = {
            "step": step,
            "epoch": step / steps,
            "loss": 2 + 3 * math.exp(-step / 9),
            "ppl": 9.0,
            "grad_norm": 1.5,
            "learning_rate": 1e-3 * step / steps,
            "memory/max_allocated (GiB)": 13.5,
            "tokens/train_per_sec_per_gpu": 41000.0,
        }
        if monitor:
            entry |= {
                "bitnet/flips": 0.01 / step,
                "bitnet/flips_total": 0.001 * step,
                "bitnet/zeros": 0.31,
                "bitnet/scale_drift": 0.0005 * step,
                "bitnet/scale_drift/q_proj": -0.0002 * step,
                "bitnet/frozen": 0.02,
                "bitnet/oscillation": 0.1,
            }
        entries.append(entry)
        if step % 10 == 0:
            entries.append({"step": step, "eval_loss": 2.5, "eval_ternary_loss": 2.75})
    return [*entries, {"step": steps, "train_runtime": 312.4, "train_loss": 2.7}]


def record(entries: list[dict[str, Any]], **changes: Any) -> dict[str, Any]:
    """A run.json."""
    return {
        "started": "2026-05-04T10:00:00+00:00",
        "finished": "2026-05-04T10:05:12+00:00",
        "resumed_at": None,
        "machine": "NVIDIA H200",
        "versions": {"python": "3.12.4", "axolotl": "0.21.0"},
        "config": {"base_model": "org/base", "bitnet": {"learning_rate_multiplier": 10}},
        "log": entries,
    } | changes


def proof(layers: list[str], **changes: Any) -> dict[str, Any]:
    """A bitnet.json with a verified packed artifact."""
    tensors = {
        name: {
            "shape": list(shape(name)),
            "codes": "0" * 16,
            "scale": 30.0,
            "zeros": math.prod(shape(name)) // 4,
        }
        for name in layers
    }
    packed = {"verified": True, "mismatches": [], "path": "packed", "bytes": 1 << 20}
    return {
        "definition": 1,
        "fingerprint": {"digest": "ab" * 32, "definition": 1, "tensors": tensors},
        "artifacts": {"packed": packed},
    } | changes


def moved(layers: list[str]) -> dict[str, Any]:
    """A monitor.json."""
    values = {"zeros": 0.25, "scale_start": 20.0, "scale": 30.0, "flips_total": 0.125}
    return {"layers": {name: dict(values) for name in layers}}


def write(folder: Path, **files: Any) -> Path:
    """``write(folder, run={...})`` writes ``run.json``; a text is written as it is."""
    folder.mkdir(parents=True, exist_ok=True)
    for name, data in files.items():
        text = data if isinstance(data, str) else json.dumps(data)
        (folder / f"{name}.json").write_text(text, encoding="utf-8")
    return folder


def whole(folder: Path, layers: int = 3) -> Path:
    """A run of which everything is known."""
    return write(folder, run=record(log()), bitnet=proof(names(layers)), monitor=moved(names(layers)))
