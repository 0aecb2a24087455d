"""The page's words and figures: the verdict, the tiles, artifacts and their sizes."""

from __future__ import annotations

import math
import shlex
from collections.abc import Mapping
from datetime import timedelta
from typing import Any

from ..formats.registry import FORMATS
from ..formats.unplaced import KEY, note_of
from ..storage.weight_bytes import weight_bytes
from .draw import show
from .run_files import Run, number

PROVEN, UNPROVEN, WRONG, FAILED = "verified", "not verified", "NOT the trained model", "not made"


def verdict(run: Run) -> dict[str, str]:
    """The verification's outcome over all artifacts: ``kind`` (good, bad, open), ``word``, ``text``."""
    words = {name: _word(name, entry) for name, entry in _entries(run).items()}
    if bad := [name for name, word in words.items() if word == WRONG]:
        text = f"{', '.join(bad)}: not the model that trained. The latents as saved are in the output folder."
        return {"kind": "bad", "word": "Not the trained model", "text": text}
    good = [name for name, word in words.items() if word == PROVEN]
    weights = sum(layer.weights for layer in run.layers.values())
    layers = sum(layer.shape is not None for layer in run.layers.values())
    proof = f"{', '.join(good)}: {weights:,} codes and {layers} scales are the trained ones, exactly."
    if failed := [name for name, word in words.items() if word == FAILED]:
        text = f"{', '.join(failed)}: the reason is below. {proof if good else ''}"
        return {"kind": "bad", "word": "Not made", "text": text.strip()}
    if good:
        return {"kind": "good", "word": "Verified", "text": proof}
    text = "The artifacts were not compared with the trained model." if words else "There are no artifacts."
    return {"kind": "open", "word": "Not verified", "text": text}


def _word(name: str, entry: dict[str, Any]) -> str:
    """The verdict on one artifact."""
    verified, error, mismatches = entry.get("verified"), entry.get("error"), entry.get("mismatches")
    if error and not mismatches:
        return FAILED
    if isinstance(verified, bool):
        return PROVEN if verified else WRONG
    return UNPROVEN if name != "latents" else "what trained"


def artifacts(run: Run) -> list[dict[str, Any]]:
    """A row for the latents and for each artifact: name, path, size, times smaller, verdict, problems."""
    latents = weight_bytes(run.folder)
    rows: list[dict[str, Any]] = []
    entries = _entries(run)
    if latents:
        rows.append(_artifact("latents", str(run.folder), latents, 0, entries.get("latents", {})))
    for name, entry in entries.items():
        if name == "latents":
            continue
        path = entry.get("path")
        where = str(run.folder / path) if isinstance(path, str) else ""
        rows.append(_artifact(name, where, number(entry.get("bytes")), latents, entry))
    return rows


def _artifact(
    name: str, path: str, size: float | None, latents: int, entry: dict[str, Any]
) -> dict[str, Any]:
    mismatches = entry.get("mismatches")
    return {
        "name": name,
        "path": path,
        "size": mebibytes(size) if size else "",
        "ratio": f"{latents / size:.1f}× smaller" if size and latents > size else "",
        "verdict": _word(name, entry),
        "problems": [str(line) for line in mismatches] if isinstance(mismatches, list) else [],
        "error": str(entry.get("error") or ""),
    }


def summary(run: Run) -> str:
    """One line under the title: what was trained how, on what, when."""
    config = run.config
    parts = []
    if config.get("base_model"):
        start = "random weights of the shape of " if config.get("reinit_weights") else ""
        parts.append(f"{_method(config)} of {start}{config['base_model']}")
    if run.record.get("machine"):
        parts.append(f"on {run.record['machine']}")
    line = " ".join(parts)
    when = run.record.get("finished") or run.record.get("started")
    if when:
        word = "finished" if run.record.get("finished") else "begun, not known to have finished,"
        line = f"{line} · {word} {str(when).replace('T', ' ').replace('+00:00', ' UTC')}"
    return line.strip(" ·")


def _method(config: Mapping[str, Any]) -> str:
    if config.get("rl"):
        return str(config["rl"]).upper()
    data = config.get("datasets")
    kinds = [entry.get("type") for entry in data if isinstance(entry, dict)] if isinstance(data, list) else []
    if config.get("pretraining_dataset") or (kinds and all(kind == "completion" for kind in kinds)):
        return "pretraining" if config.get("reinit_weights") else "continued pretraining"
    return "supervised fine-tuning"


def tiles(run: Run) -> list[tuple[str, str]]:
    """The figures that readers need first: (what, value)."""
    loss, ternary = _last(run, "eval_loss"), _last(run, "eval_ternary_loss")
    found: list[tuple[str, str | None]] = [
        ("training loss", _last(run, "loss")),
        ("evaluation loss", loss),
        ("ternary evaluation loss", ternary if ternary != loss else None),
        ("reward margin", _last(run, "rewards/margins")),
        ("pairs ranked right", _last(run, "rewards/accuracies", "%")),
        ("mean reward", _last(run, "reward")),
        ("codes flipped", _last(run, "bitnet/flips_total", "%")),
        ("codes that are zero", _zeros(run)),
        ("ternary weights", _count(sum(layer.weights for layer in run.layers.values()))),
        ("steps", _count(max((number(entry.get("step")) or 0 for entry in run.log), default=0))),
        ("training time", _time(run)),
        ("peak GPU memory", _most(run, "memory/max_allocated (GiB)", "GiB")),
    ]
    return [(what, value) for what, value in found if value]


def facts(run: Run) -> dict[str, str]:
    """Versions, machine and provenance, by name."""
    found = {"machine": str(run.record.get("machine") or "")}
    versions = run.record.get("versions")
    found |= {str(k): str(v) for k, v in versions.items()} if isinstance(versions, dict) else {}
    if definition := run.bitnet.get("definition"):
        found["ternary definition"] = str(definition)
    fingerprint = run.bitnet.get("fingerprint")
    if isinstance(fingerprint, dict) and fingerprint.get("digest"):
        found["fingerprint"] = str(fingerprint["digest"])
    if run.record.get("resumed_at"):
        found["resumed at step"] = str(run.record["resumed_at"])
    if run.log_from:
        found["log read from"] = run.log_from
    return {key: value for key, value in found.items() if value}


def unloaded(run: Run) -> list[str]:
    """Tensors of the base that the run did not load, in a sentence, if there are any."""
    note = note_of(run.record.get(KEY))
    return [f"{note}."] if note else []


def mebibytes(size: float) -> str:
    return f"{size / 2**30:.2f} GiB" if size >= 2**30 else f"{size / 2**20:.1f} MiB"


def _entries(run: Run) -> dict[str, dict[str, Any]]:
    found = run.bitnet.get("artifacts")
    if not isinstance(found, dict):
        return {}
    return {str(name): entry for name, entry in found.items() if isinstance(entry, dict)}


def _values(run: Run, key: str) -> list[float]:
    return [n for entry in run.log if (n := number(entry.get(key))) is not None and math.isfinite(n)]


def _last(run: Run, key: str, unit: str = "") -> str | None:
    values = _values(run, key)
    return show(values[-1], unit) if values else None


def _most(run: Run, key: str, unit: str) -> str | None:
    most = max(_values(run, key), default=0.0)
    return show(most, unit) if most else None


def _zeros(run: Run) -> str | None:
    known = [
        (layer.zeros, layer.weights)
        for layer in run.layers.values()
        if layer.zeros is not None and not layer.was_zero
    ]
    total = sum(weights for _, weights in known)
    return show(sum(zeros * weights for zeros, weights in known) / total, "%") if total else None


def _count(number: float) -> str | None:
    for size, word in ((1e9, "G"), (1e6, "M")):
        if number >= size:
            return f"{number / size:.3g} {word}"
    return f"{number:,.0f}" if number else None


def _time(run: Run) -> str | None:
    seconds = _values(run, "train_runtime")
    if not seconds or run.record.get("resumed_at"):  # the Trainer times the last part alone
        return None
    return str(timedelta(seconds=round(seconds[-1])))


def commands(run: Run) -> list[dict[str, str]]:
    """``title`` and ``text`` of what to type, for the artifacts there are, then for checking and going on."""
    found = []
    entries: Any = run.bitnet.get("artifacts")
    for name, entry in (entries if isinstance(entries, dict) else {}).items():
        path = entry.get("path") if isinstance(entry, dict) else None
        if not isinstance(path, str) or entry.get("verified") is False:
            continue
        where = str(run.folder / path)
        if row := FORMATS.get(str(name)):
            for way in row.ways_to_run(where):
                found.append({"title": f"{name}, in {way.engine} ({way.device})", "text": way.text})
            check = f"axolotl-bitnet verify {shlex.quote(where)}"
            found.append({"title": f"Is {name} still the model that trained?", "text": check})
    if run.bitnet:
        text = f"base_model: {run.folder}\nplugins:\n  - axolotl_bitnet.BitNetPlugin\nuse_onebitllms: true"
        found.append({"title": "Train on from the latents: in the next config", "text": text})
    return found
