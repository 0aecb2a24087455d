"""Whether a training checkpoint (`checkpoint-N`) is whole, by its files alone; nothing is unpickled.

The Trainer writes weights, optimizer, scheduler and random states and, last, ``trainer_state.json``, so a
folder without it is an interrupted save. Each set of files has such a last one: shards their index, a
distributed checkpoint its ``.metadata`` (torch renames it into place after every rank has written). Where an
old checkpoint of the same step is written over, these files would be there already, so :func:`forget` removes
them first. Later damage, a copy cut short or a full disk, is found by the files' own headers.
"""

from __future__ import annotations

import re
import zipfile
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from ..run_folder import CHECKPOINT, STATE
from .atomic import CheckpointError, read_json

_FOLDER = re.compile(rf"{CHECKPOINT}(\d+)")
_SHARDED = {"pytorch_model_fsdp_0": "weights", "optimizer_0": "optimizer"}
_METADATA = ".metadata"
_FULL_MODEL = "pytorch_model_fsdp.bin"


def checkpoints(output_dir: str | Path) -> list[Path]:
    """The `checkpoint-N` folders of a run, the latest step first."""
    folder = Path(output_dir)
    numbered = [(m, path) for path in folder.glob(f"{CHECKPOINT}*") if (m := _FOLDER.fullmatch(path.name))]
    return [path for _, path in sorted(numbered, key=lambda pair: int(pair[0][1]), reverse=True)]


def problems(folder: str | Path, ranks: int | None = None) -> list[str]:
    """Why training cannot be resumed from a checkpoint as it was saved; empty if it can.

    Args:
        folder: a `checkpoint-N`: one process, DDP, FSDP2 (full or sharded) or DeepSpeed ZeRO-1/2.
        ranks: number of processes that wrote it, if known; each has its random states in it.

    Returns:
        One line per problem, each naming the file.
    """
    folder = Path(folder)
    if not folder.is_dir():
        return ["there is no such folder"]
    found = [*_state(folder), *_weights(folder), *_optimizer(folder), *_random(folder, ranks)]
    for name in ("config.json", "tokens_state.json"):
        if (folder / name).exists():
            found += _json(folder / name)
    if (folder / "scaler.pt").exists():
        found += _archive(folder / "scaler.pt")
    return found


def trainer_state(folder: str | Path) -> dict[str, Any]:
    """What the Trainer wrote last: steps, logs, callbacks.

    Raises:
        CheckpointError: it is missing or cannot be parsed.
    """
    return read_json(Path(folder) / STATE)


def forget(folder: str | Path) -> None:
    """Remove the files that mark a checkpoint as whole, before another is written over it."""
    from .safetensors_stream import INDEX  # imports torch, which listing checkpoints does not need

    folder = Path(folder)
    for name in (STATE, INDEX, *(f"{part}/{_METADATA}" for part in _SHARDED)):
        (folder / name).unlink(missing_ok=True)


def _state(folder: Path) -> Iterator[str]:
    if not (folder / STATE).is_file():
        yield f"{STATE} is missing: it is written last, so the save was interrupted"
        return
    try:
        step = trainer_state(folder).get("global_step")
    except CheckpointError as error:
        yield str(error)
        return
    if not isinstance(step, int):
        yield f"{STATE} has no global_step"


def _weights(folder: Path) -> Iterator[str]:
    from .safetensors_stream import INDEX, SINGLE, CheckpointReader

    sharded, full = folder / "pytorch_model_fsdp_0", folder / _FULL_MODEL
    if sharded.exists():
        yield from _distributed(sharded)
        return
    if full.exists():
        yield from _archive(full)
        if not (folder / SINGLE).exists() and not (folder / INDEX).exists():
            return
    try:
        CheckpointReader(folder)  # opens every file; safetensors compares the header with the size
    except CheckpointError as error:
        yield str(error)


def _optimizer(folder: Path) -> Iterator[str]:
    sharded = folder / "optimizer_0"
    if sharded.exists():
        yield from _distributed(sharded)
    elif (folder / "latest").exists():
        yield from _deepspeed(folder)
        if not (folder / "scheduler.pt").exists():
            return  # a schedule of DeepSpeed's own is among its states
    else:
        name = "optimizer.bin" if (folder / _FULL_MODEL).exists() else "optimizer.pt"
        if not (folder / name).exists() and not (folder / "scheduler.pt").exists():
            yield (
                f"it holds the model only ({name} and scheduler.pt are missing), as `save_only_model: true` "
                f"saves it. To train on from it, start a new run with base_model: {folder}"
            )
            return
        yield from _archive(folder / name)
    yield from _archive(folder / "scheduler.pt")


def _deepspeed(folder: Path) -> Iterator[str]:
    named = (folder / "latest").read_text(encoding="utf-8", errors="replace").strip()
    files = sorted((folder / named).glob("*.pt")) if named and Path(named).name == named else []
    if not files:
        yield f"latest names '{named}', which holds no states"
    for path in files:
        yield from _archive(path)


def _random(folder: Path, ranks: int | None) -> Iterator[str]:
    files = sorted(folder.glob("rng_state*.pth"))
    if ranks is not None:
        files = [
            folder / (f"rng_state_{rank}.pth" if ranks > 1 else "rng_state.pth") for rank in range(ranks)
        ]
    if not files:
        yield "rng_state.pth is missing"
    for path in files:
        yield from _archive(path)


def _distributed(folder: Path) -> Iterator[str]:
    if not (folder / _METADATA).is_file():
        yield f"{folder.name}/{_METADATA} is missing: it is written last, so the save was interrupted"
    if not any(path.stat().st_size for path in folder.glob("*.distcp")):
        yield f"{folder.name} holds no shards"


def _archive(path: Path) -> Iterator[str]:
    """torch.save writes a zip archive, whose directory of contents is its end."""
    try:
        with zipfile.ZipFile(path) as archive:
            if not archive.namelist():
                yield f"{path.name} is empty"
    except FileNotFoundError:
        yield f"{path.name} is missing"
    except (OSError, zipfile.BadZipFile) as error:
        yield f"{path.name} is cut short or damaged ({error})"


def _json(path: Path) -> Iterator[str]:
    try:
        read_json(path)
    except CheckpointError as error:
        yield str(error)
