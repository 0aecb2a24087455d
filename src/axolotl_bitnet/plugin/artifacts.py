"""The end of a run: make artifacts of the saved latents, verify that each is the trained model, and record
both in ``bitnet.json``."""

from __future__ import annotations

import re
import shutil
import tempfile
from collections.abc import Iterable
from itertools import count
from pathlib import Path
from typing import Any

from ..formats.latent import LatentCheckpoint
from ..formats.registry import FOLDERS, FORMATS, Row
from ..model.entry import CONFIG_KEY
from ..model.fingerprint import Fingerprint
from ..run_folder import ASIDE, MADE_HERE, PAGE, REPORT, RUN_FILE
from ..storage.atomic import CheckpointError, read_json, write_json
from ..storage.safetensors_stream import INDEX
from ..storage.weight_bytes import weight_bytes
from ..verify.engines import consumer_of
from ..verify.verify import VerificationError, VerificationReport, compare

_LEFTOVER = re.compile(rf"\.({'|'.join((*FOLDERS, REPORT, ASIDE))})\.(partial|old)-.*")  # of a killed writing
_WEIGHTS = re.compile(r"model(-\d+-of-\d+)?\.safetensors|model\.safetensors\.index\.json")
_METADATA = 1 << 26  # bytes in which a GGUF file's metadata is searched


def set_aside(output_dir: str | Path, weights: bool = True) -> list[str]:
    """Move a previous run's weights (if asked to) and artifacts out of the way, so that they can never be
    taken for this run's, nor mixed with them.

    They go to ``output_dir/_previous`` (``_previous-2``, ... if there is one) and are deleted by
    :func:`finish_run` when this run's are in place. Whatever carries no sign of this package is not touched.
    """
    folder = Path(output_dir)
    if not folder.is_dir():
        return []
    stale = [path for path in folder.iterdir() if weights and _WEIGHTS.fullmatch(path.name)]
    stale += [folder / row.path for row in FORMATS.values() if is_artifact(folder, row.path)]
    stale += [folder / RUN_FILE] * (folder / RUN_FILE).is_file()
    stale += [folder / REPORT] * _is_report(folder / REPORT)
    if stale:
        aside = _new_aside(folder)
        for path in sorted(stale, key=_keystone, reverse=True):
            moved = aside / path.relative_to(folder)
            moved.parent.mkdir(exist_ok=True)
            path.rename(moved)
            if path.parent != folder and not any(path.parent.iterdir()):
                path.parent.rmdir()
    return sorted({path.relative_to(folder).parts[0] for path in stale})


def refuse_taken(output_dir: str | Path, export: Iterable[str]) -> None:
    """Raise CheckpointError where an artifact would be written over something that no run made."""
    for name in export:
        path = Path(output_dir) / FORMATS[name].path
        if path.exists() and not is_artifact(Path(output_dir), FORMATS[name].path):
            raise CheckpointError(
                f"{path} is not an artifact of an earlier run, and `bitnet.export: [{name}]` would write "
                "there: move it away, set another output_dir, or take it out of `export`"
            )


def is_artifact(folder: Path, path: str) -> bool:
    """Whether an output folder's ``bitnet.json`` lists this artifact, or it carries our entry itself, as
    after a run that was killed."""
    place = folder / path
    if not place.exists():
        return False
    try:
        artifacts = read_json(folder / RUN_FILE).get("artifacts")
    except CheckpointError:
        artifacts = None
    entries = artifacts.values() if isinstance(artifacts, dict) else ()
    if any(isinstance(entry, dict) and entry.get("path") == path for entry in entries):
        return True
    if place.is_dir():
        try:
            return CONFIG_KEY in read_json(place / "config.json")
        except CheckpointError:
            return False
    with place.open("rb") as file:  # a GGUF file's metadata comes first
        return CONFIG_KEY.encode() in file.read(_METADATA)


def _is_report(folder: Path) -> bool:
    page = folder / PAGE
    if not page.is_file() or any(path != page and path.suffix != ".png" for path in folder.iterdir()):
        return False
    return b'name="generator" content="axolotl-bitnet"' in page.read_bytes()


def _new_aside(folder: Path) -> Path:
    """A new folder for a previous run's files: marked as ours from when it has its name."""
    taken = {path.name for path in folder.iterdir()}
    names = (f"{ASIDE}-{n}" if n > 1 else ASIDE for n in count(1))
    work = Path(tempfile.mkdtemp(prefix=f".{ASIDE}.partial-", dir=folder))
    work.chmod(0o755)
    (work / MADE_HERE).write_text("What an earlier run left. Deleted when a run in this folder succeeds.\n")
    return work.rename(folder / next(name for name in names if name not in taken))


def _delete_leftovers(folder: Path) -> None:
    """Delete a previous run's files, and what an interrupted write left. A folder of the first kind gets a
    name of the second before it is deleted, because its mark may be deleted before the rest."""
    for path in [path for path in folder.iterdir() if _LEFTOVER.fullmatch(path.name)]:
        shutil.rmtree(path, ignore_errors=True)
    for path in [path for path in folder.iterdir() if (path / MADE_HERE).is_file()]:
        shutil.rmtree(path.rename(folder / f".{ASIDE}.old-{path.name}"), ignore_errors=True)


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
        verify: compare them (with no artifact, the latents) with the fingerprint.

    Returns:
        The last artifact's report (all are alike); empty without verification.

    Raises:
        CheckpointError: no latents were saved, or they cannot be exported.
        VerificationError: an artifact is not the trained model; it is not left under its name.
        Exception: any other first failure. ``bitnet.json`` has the errors of all.
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
        verdicts[entry.name]["not_run_in"] = consumer_of(entry.name)

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
        for file in (folder / row.path for row in FORMATS.values() if Path(row.path).name != row.path):
            for path in file.parent.glob(f".{file.name}.partial-*"):
                path.unlink()
    if failures:
        for other in failures[1:]:
            failures[0].add_note(f"and: {other}")
        raise failures[0]
    _delete_leftovers(folder)
    return report


def made_in(output_dir: str | Path) -> dict[str, int]:
    """The artifacts of a run that are in place, and their sizes in bytes, as ``bitnet.json`` has them."""
    try:
        artifacts = read_json(Path(output_dir) / RUN_FILE)["artifacts"]
    except CheckpointError:
        return {}
    return {name: entry["bytes"] for name, entry in artifacts.items() if "path" in entry}
