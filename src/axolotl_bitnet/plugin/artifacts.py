"""The end of a run: make artifacts of what was saved, prove that each is what trained, and write it all down
in ``bitnet.json``."""

from __future__ import annotations

import re
import shutil
from collections.abc import Iterable
from itertools import count
from pathlib import Path
from typing import Any

from ..formats.latent import LatentCheckpoint
from ..formats.registry import FOLDERS, FORMATS, Row
from ..model.fingerprint import Fingerprint
from ..run_folder import ASIDE as _ASIDE
from ..run_folder import REPORT, RUN_FILE
from ..storage.atomic import CheckpointError, read_json, write_json
from ..storage.safetensors_stream import INDEX, weight_bytes
from ..verify.verify import VerificationError, VerificationReport, compare

_FOLDERS = "|".join((*FOLDERS, REPORT))
_LEFTOVER = re.compile(
    rf"{_ASIDE}(-\d+)?|\.({_FOLDERS})\.(partial|old)-.*"
)  # or of a writing that was killed
_WEIGHTS = re.compile(r"model(-\d+-of-\d+)?\.safetensors|model\.safetensors\.index\.json")


def set_aside(output_dir: str | Path, weights: bool = True) -> list[str]:
    """Move a previous run's weights (if asked to) and artifacts out of the way, so that they can never be
    taken for this run's, nor mixed with them.

    They go to ``output_dir/_previous`` (``_previous-2``, ... if there is one) and are deleted by
    :func:`finish_run` when this run's are in place.
    """
    folder = Path(output_dir)
    if not folder.is_dir():
        return []
    stale = [
        path
        for path in folder.iterdir()
        if (weights and _WEIGHTS.fullmatch(path.name)) or path.name in (*FOLDERS, RUN_FILE, REPORT)
    ]
    if stale:
        taken = {path.name for path in folder.iterdir()}
        names = (f"{_ASIDE}-{n}" if n > 1 else _ASIDE for n in count(1))
        aside = folder / next(name for name in names if name not in taken)
        aside.mkdir()
        for path in sorted(stale, key=_keystone, reverse=True):
            path.rename(aside / path.name)
    return sorted(path.name for path in stale)


def _keystone(path: Path) -> int:
    """An index goes before its shards, which are nothing without it; the fingerprint goes last."""
    return {INDEX: 2, RUN_FILE: 0}.get(path.name, 1)


def finish_run(
    output_dir: str | Path, trained: Fingerprint, export: Iterable[str], verify: bool
) -> VerificationReport:
    """Make and verify a run's artifacts from the latents it saved. One that fails costs no other.

    Args:
        output_dir: where the latents are; artifacts go into folders below it, ``bitnet.json`` beside them.
        trained: fingerprint of the live model at the end of training.
        export: artifacts to make, names of :data:`~axolotl_bitnet.formats.registry.FORMATS`.
        verify: hold them (with no artifact, the latents) against the fingerprint.

    Returns:
        The last artifact's report, empty without verification: all of them say the same.

    Raises:
        CheckpointError: no latents were saved, or they cannot be exported.
        VerificationError: what was saved is not what trained; the artifact is not left under its name.
        Exception: whatever else the first failure was. ``bitnet.json`` has the errors of all.
    """
    folder, wanted = Path(output_dir), set(export)
    record: dict[str, Any] = {
        "definition": trained.definition,
        "fingerprint": trained.to_json(),
        "artifacts": {},
    }
    write_json(folder / RUN_FILE, record)
    latents = LatentCheckpoint(folder)
    record |= {"converted": latents.names.converted, "dense": latents.names.dense}
    verdicts: dict[str, Any] = record["artifacts"]
    report = VerificationReport()
    failures: list[Exception] = []

    def check(found: Fingerprint, kind: str) -> None:
        nonlocal report
        report = compare(found, trained)
        verdicts[kind] = {"verified": report.ok, "mismatches": report.mismatches}
        if not report.ok:
            raise VerificationError(f"{kind}: {report.summary()}. The latents as saved are in {folder}")

    def make(entry: Row) -> None:
        def prove(work: Path) -> None:
            check(entry.format.open(work).fingerprint(), entry.name)

        proof = prove if verify else None
        entry.format.write(latents, folder / entry.path, overwrite=True, check=proof)
        verdicts.setdefault(entry.name, {"verified": None})
        verdicts[entry.name] |= {"path": entry.path, "bytes": weight_bytes(folder / entry.path)}

    try:
        for entry in (entry for name, entry in FORMATS.items() if name in wanted):
            try:
                make(entry)
            except Exception as error:
                verdicts.setdefault(entry.name, {"verified": False if verify else None})
                verdicts[entry.name]["error"] = str(error) or type(error).__name__
                failures.append(error)
        if not wanted and verify:
            check(latents.fingerprint(), "latents")
    finally:
        write_json(folder / RUN_FILE, record)
        for path in [path for name in FOLDERS for path in (folder / name).glob(".*.partial*")]:
            shutil.rmtree(path) if path.is_dir() else path.unlink()
    if failures:
        for other in failures[1:]:
            failures[0].add_note(f"and: {other}")
        raise failures[0]
    for path in folder.iterdir():
        if _LEFTOVER.fullmatch(path.name):
            shutil.rmtree(path, ignore_errors=True)
    return report


def made_in(output_dir: str | Path) -> dict[str, int]:
    """The artifacts of a run that are in place, and their sizes in bytes, as ``bitnet.json`` has them."""
    try:
        artifacts = read_json(Path(output_dir) / RUN_FILE)["artifacts"]
    except CheckpointError:
        return {}
    return {name: entry["bytes"] for name, entry in artifacts.items() if "path" in entry}
