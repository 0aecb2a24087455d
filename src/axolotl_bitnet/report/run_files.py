"""Everything that is known of a run, from the files it left; each of them may be missing."""

from __future__ import annotations

import re
from dataclasses import dataclass, field
from datetime import datetime
from pathlib import Path
from typing import Any

from ..run_folder import CHECKPOINT, MONITOR_FILE, RUN_FILE, RUN_LOG, STATE
from ..storage.atomic import CheckpointError, read_json
from ..storage.trainer_checkpoint import checkpoints
from .record import redact


class ReportError(ValueError):
    """There can be no report; the message has what to do."""


@dataclass
class TrainedLayer:
    """One ternary matrix: its state at the end (fingerprint) and its changes (monitor)."""

    name: str
    shape: tuple[int, int] | None = None
    zeros: float | None = None
    scale: float | None = None
    scale_start: float | None = None
    flips: float | None = None

    @property
    def weights(self) -> int:
        return self.shape[0] * self.shape[1] if self.shape else 0

    @property
    def was_zero(self) -> bool:
        """Whether all its latents were zero at the start: it shows nothing about the others."""
        if self.zeros != 1:
            return False
        from ..ternary import EPSILON  # imports torch, which few pages need

        return self.scale_start is None or self.scale_start <= EPSILON

    @property
    def drift(self) -> float | None:
        """Relative change of the scale."""
        if self.scale is None or not self.scale_start:
            return None
        return self.scale / self.scale_start - 1


@dataclass
class Run:
    """A run as it is in its files.

    Attributes:
        folder: as it was named.
        record: ``run.json``: config, versions, machine, times.
        log: the Trainer's log, an entry a line of it.
        log_from: the file that the log is from.
        bitnet: ``bitnet.json``: fingerprint, artifacts and verdicts.
        layers: by name.
        notes: what is missing or unreadable, a sentence each.
    """

    folder: Path
    record: dict[str, Any] = field(default_factory=dict)
    log: list[dict[str, Any]] = field(default_factory=list)
    log_from: str = ""
    bitnet: dict[str, Any] = field(default_factory=dict)
    layers: dict[str, TrainedLayer] = field(default_factory=dict)
    notes: list[str] = field(default_factory=list)

    @property
    def config(self) -> dict[str, Any]:
        """Without secrets, whoever wrote the record."""
        return _mapping(redact(_mapping(self.record.get("config"))))


def read_run(output_dir: str | Path) -> Run:
    """Gather a run's files.

    Raises:
        ReportError: the folder is not a run's.
    """
    run = Run(Path(output_dir))
    if not run.folder.is_dir():
        raise ReportError(f"{run.folder} is not a folder: name a run's output_dir")
    run.record = _read(run, RUN_LOG, "the config and the versions are not known")
    run.bitnet = _read(run, RUN_FILE, "the run did not come to its end, or was not a ternary one")
    _read_log(run)
    if not (run.record or run.bitnet or run.log):
        raise ReportError(
            f"{run.folder} holds no run: none of {RUN_LOG}, {RUN_FILE}, {STATE} or {CHECKPOINT}*/{STATE} "
            "is in it. Name the output_dir of a run"
        )
    _read_layers(run)
    return run


def _read(run: Run, name: str, without: str) -> dict[str, Any]:
    path = run.folder / name
    if not path.exists():
        run.notes.append(f"There is no {name}: {without}.")
        return {}
    try:
        return read_json(path)
    except CheckpointError as error:
        run.notes.append(f"{error}: {without}.")
        return {}


def _read_log(run: Run) -> None:
    """The whole log where the run came to its end, else what the last checkpoint has of it."""
    if log := _entries(run.record.get("log")):
        run.log, run.log_from = log, RUN_LOG
        return
    for folder in (run.folder, *checkpoints(run.folder)):
        path = folder / STATE
        try:
            log = _entries(read_json(path).get("log_history"))
        except CheckpointError as error:
            if path.exists():
                run.notes.append(f"{error}.")
            continue
        if log and _belongs(path, run.record):
            run.log, run.log_from = log, str(path.relative_to(run.folder))
            if folder != run.folder:
                run.notes.append(f"The log is that of {folder.name}: what came after is not known.")
            return
    run.notes.append("No log was found: there are no curves.")


def _belongs(path: Path, record: dict[str, Any]) -> bool:
    """Whether a file is of this run, not of an earlier one in the same folder."""
    if not record or record.get("resumed_at"):
        return True
    try:
        return path.stat().st_mtime >= datetime.fromisoformat(record["started"]).timestamp()
    except (KeyError, TypeError, ValueError):
        return True


def _read_layers(run: Run) -> None:
    tensors = _mapping(_mapping(run.bitnet.get("fingerprint")).get("tensors"))
    for name, entry in tensors.items():
        layer = run.layers.setdefault(name, TrainedLayer(name))
        shape = _mapping(entry).get("shape")
        if isinstance(shape, list) and len(shape) == 2 and all(isinstance(n, int) for n in shape):
            layer.shape = (shape[0], shape[1])
        zeros = number(_mapping(entry).get("zeros"))
        layer.zeros = zeros / layer.weights if zeros is not None and layer.weights else None
        layer.scale = number(_mapping(entry).get("scale"))
    if not (run.folder / MONITOR_FILE).exists():
        return
    if not _belongs(run.folder / MONITOR_FILE, run.record):
        run.notes.append(f"{MONITOR_FILE} is an earlier run's: how each layer moved is not known.")
        return
    monitor = _read(run, MONITOR_FILE, "how each layer moved is not known")
    for name, entry in _mapping(monitor.get("layers")).items():
        layer = run.layers.setdefault(name, TrainedLayer(name))
        seen = {key: number(value) for key, value in _mapping(entry).items()}
        layer.zeros = layer.zeros if layer.zeros is not None else seen.get("zeros")
        layer.scale_start, layer.flips = seen.get("scale_start"), seen.get("flips_total")
        layer.scale = seen.get("scale") or layer.scale  # in the monitor's own unit


def row_and_column(name: str) -> tuple[str, str]:
    """A layer's place in a grid: `model.layers.3.self_attn.q_proj` is (`layers.3`, `q_proj`).

    Further numbers, as experts have, fall together in one column.
    """
    parts = name.split(".")
    first = next((i for i, part in enumerate(parts) if part.isdecimal()), None)
    if first is None or first == len(parts) - 1:
        return ".".join(parts[:-1]) or name, parts[-1]
    rest = [re.sub(r"^\d+$", "*", part) for part in parts[first + 1 :]]
    column = ".".join(rest[-2:] if "*" in rest[-2:] else rest[-1:])
    return ".".join(part for part in parts[: first + 1] if part != "model"), column


def number(value: Any) -> float | None:
    """A JSON number as a float; None for anything else (true is none)."""
    return float(value) if isinstance(value, (int, float)) and not isinstance(value, bool) else None


def _mapping(value: Any) -> dict[str, Any]:
    return value if isinstance(value, dict) else {}


def _entries(value: Any) -> list[dict[str, Any]]:
    return [entry for entry in value if isinstance(entry, dict)] if isinstance(value, list) else []
