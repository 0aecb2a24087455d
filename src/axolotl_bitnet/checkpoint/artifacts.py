"""The end of a run: pack what was saved, prove that it is what trained, and write it all down in
``bitnet.json``."""

from __future__ import annotations

import re
import shutil
from collections.abc import Iterable
from itertools import count
from pathlib import Path
from typing import Any

from ..fingerprint import Fingerprint
from .latent import LatentCheckpoint
from .packed import PackedCheckpoint, pack_checkpoint
from .stream import INDEX, write_json
from .verify import RUN_FILE, VerificationError, VerificationReport, compare

PACKED = "packed"
REPORT = "report"
_ASIDE = "_previous"  # uploads to a hub leave out names that begin with an underscore
_LEFTOVER = re.compile(rf"{_ASIDE}(-\d+)?|\.({PACKED}|{REPORT})\.(partial|old)-.*")  # or of a writing killed
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
        if (weights and _WEIGHTS.fullmatch(path.name)) or path.name in (PACKED, RUN_FILE, REPORT)
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
    """Make and verify a run's artifacts from the latents it saved.

    Args:
        output_dir: where the latents are; artifacts go into folders below it, ``bitnet.json`` beside them.
        trained: fingerprint of the live model at the end of training.
        export: artifacts to make.
        verify: hold them (with no artifact, the latents) against the fingerprint.

    Raises:
        CheckpointError: no latents were saved, or they cannot be packed.
        VerificationError: what was saved is not what trained; no artifact is left under its name.
    """
    folder = Path(output_dir)
    record: dict[str, Any] = {
        "definition": trained.definition,
        "fingerprint": trained.to_json(),
        "artifacts": {},
    }
    write_json(folder / RUN_FILE, record)
    latents = LatentCheckpoint(folder)
    record |= {"converted": latents.names.converted, "dense": latents.names.dense}
    report = VerificationReport()

    def check(found: Fingerprint, kind: str) -> None:
        nonlocal report
        report = compare(found, trained)
        record["artifacts"][kind] = {"verified": report.ok, "mismatches": report.mismatches}
        if not report.ok:
            raise VerificationError(f"{kind}: {report.summary()}. The latents as saved are in {folder}")

    try:
        if PACKED in export:
            pack_checkpoint(
                folder,
                folder / PACKED,
                overwrite=True,
                check=(lambda work: check(PackedCheckpoint(work).fingerprint(), PACKED)) if verify else None,
            )
            record["artifacts"].setdefault(PACKED, {"verified": None})
            record["artifacts"][PACKED] |= {"path": PACKED, "bytes": weight_bytes(folder / PACKED)}
        elif verify:
            check(latents.fingerprint(), "latents")
    finally:
        write_json(folder / RUN_FILE, record)
    for path in folder.iterdir():
        if _LEFTOVER.fullmatch(path.name):
            shutil.rmtree(path, ignore_errors=True)
    return report


def weight_bytes(folder: str | Path) -> int:
    """Size of a folder's safetensors files in bytes."""
    return sum(path.stat().st_size for path in Path(folder).glob("*.safetensors"))
