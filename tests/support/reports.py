"""For the tests of the report: folders as runs leave them, made up, and pages as a parser sees them."""

from __future__ import annotations

import json
import math
import re
from html.parser import HTMLParser
from pathlib import Path
from typing import Any

from axolotl_bitnet.report import write_report

VOID = {"meta", "link", "br", "img", "input", "hr"}

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


class Page(HTMLParser):
    """A page's elements and its text; raises where a tag does not close."""

    def __init__(self, path: Path) -> None:
        super().__init__()
        self.elements: list[tuple[str, dict[str, str]]] = []
        self.words: list[str] = []
        self.styles = ""
        self._open: list[str] = []
        self.source = path.read_text(encoding="utf-8")
        self.feed(self.source)
        self.close()
        assert not self._open, f"not closed: {self._open}"
        self.text = " ".join(" ".join(self.words).split())

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.elements.append((tag, {key: value or "" for key, value in attrs}))
        if tag not in VOID:
            self._open.append(tag)

    def handle_startendtag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.elements.append((tag, {key: value or "" for key, value in attrs}))

    def handle_endtag(self, tag: str) -> None:
        assert self._open.pop() == tag

    def handle_data(self, data: str) -> None:
        if self._open and self._open[-1] == "style":
            self.styles += data
        else:
            self.words.append(data)

    def all(self, tag: str) -> list[dict[str, str]]:
        return [attributes for name, attributes in self.elements if name == tag]

    @property
    def figures(self) -> set[str]:
        return {attributes["id"] for attributes in self.all("figure")}


def page_of(folder: Path) -> Page:
    return Page(write_report(folder))


def loads(page: Page) -> list[str]:
    """Whatever a browser would fetch, or run."""
    found = [f"<{tag}>" for tag, _ in page.elements if tag in ("script", "iframe", "object", "embed", "base")]
    for tag, attributes in page.elements:
        for key, value in attributes.items():
            inside = value.startswith(("#", "data:"))
            if key in ("src", "href", "srcset", "action", "data", "poster") and not inside:
                found.append(f"{tag} {key}={value}")
            if key.startswith("on") or value.strip().lower().startswith("javascript:"):
                found.append(f"{tag} {key}={value}")
            found += [url for url in re.findall(r"url\(([^)]*)", value) if not url.startswith("#")]
    return found + re.findall(r"url\([^#)][^)]*|@import[^;]*", page.styles)
