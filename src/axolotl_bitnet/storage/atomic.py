"""Files and folders of checkpoints: whole or not at all, and errors that name them."""

from __future__ import annotations

import errno
import json
import os
import shutil
import tempfile
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

REMEDIES = {
    errno.ENOSPC: "free some space, or name a folder on another disk",
    errno.EDQUOT: "free some of your quota, or name a folder on another disk",
    errno.EFBIG: "the system limits the size of files here (ulimit -f): name another folder",
    errno.EROFS: "the disk is read-only: name another folder",
    errno.EACCES: "its folder may not be written by you: name another one",
    errno.EPERM: "its folder may not be written by you: name another one",
    errno.ENOTDIR: "a part of this path is a file: name another folder",
    errno.EEXIST: "a part of this path is a file: name another folder",
    errno.EIO: "the disk failed: name a folder on another one",
}


class CheckpointError(ValueError):
    """A checkpoint cannot be read or written; the message names the file and what to do."""


def require_space(folder: Path, needed: int) -> None:
    """Make sure that a disk can take what is about to be written.

    Raises:
        CheckpointError: ``needed`` bytes do not fit into what is free for this user.
    """
    free = shutil.disk_usage(folder).free
    if free < needed:
        raise CheckpointError(
            f"no space for it in {folder}: {needed:,} bytes are needed ({needed / 2**30:.2f} GiB), "
            f"{free:,} are free ({free / 2**30:.2f} GiB)"
        )


@contextmanager
def disk_errors(target: Path) -> Iterator[None]:
    """Within, an error of the disk says what could not be written and what to do.

    Raises:
        CheckpointError: instead of such an OSError.
    """
    try:
        yield
    except OSError as error:
        short = error.errno is None and "requested and" in str(error)  # numpy's tofile forgets the number
        number = errno.ENOSPC if short else error.errno
        if number not in REMEDIES:
            raise
        cause = str(error) if short else error.strerror
        raise CheckpointError(f"{target} cannot be written ({cause}): {REMEDIES[number]}") from error


@contextmanager
def whole_folder(target: str | Path, overwrite: bool = False) -> Iterator[Path]:
    """A folder that appears at ``target`` when everything in it is written, and not at all on an error.

    Yields:
        A temporary folder beside the target; it is renamed at the end.

    Raises:
        CheckpointError: the target exists, and ``overwrite`` was not asked for; or the disk is full or
            cannot be written.
    """
    target = Path(target)
    if target.exists() and not overwrite:
        raise CheckpointError(f"{target} exists: name another folder, or overwrite it (--overwrite)")
    with disk_errors(target):
        target.parent.mkdir(parents=True, exist_ok=True)
        work = Path(tempfile.mkdtemp(prefix=f".{target.name}.partial-", dir=target.parent))
        try:
            work.chmod(0o755)  # mkdtemp's 0700 would travel with the model
            yield work
            _replace_folder(target, work)
        except BaseException:
            shutil.rmtree(work, ignore_errors=True)
            raise


def _replace_folder(target: Path, work: Path) -> None:
    """Give ``work`` the name ``target``; what had it is deleted afterwards, or gets it back on an error."""
    if not target.exists():
        work.rename(target)
        return
    old = work.with_name(work.name.replace(".partial-", ".old-"))
    target.rename(old)
    try:
        work.rename(target)
    except BaseException:
        old.rename(target)
        raise
    shutil.rmtree(old, ignore_errors=True)


def read_json(path: str | Path) -> dict[str, Any]:
    """A JSON object from a file.

    Raises:
        CheckpointError: there is none, or it cannot be parsed.
    """
    try:
        data = json.loads(Path(path).read_text(encoding="utf-8"))
    except FileNotFoundError:
        raise CheckpointError(f"{path} does not exist") from None
    except (OSError, ValueError) as error:
        raise CheckpointError(f"{path} cannot be read: {error}") from error
    if not isinstance(data, dict):
        raise CheckpointError(f"{path} holds no JSON object")
    return data


def write_json(path: str | Path, data: dict[str, Any]) -> None:
    """Write a JSON object, whole or not at all."""
    path = Path(path)
    work = path.with_name(f".{path.name}.partial")
    work.write_text(json.dumps(data, indent=2, ensure_ascii=False) + "\n", encoding="utf-8")
    work.replace(path)


@contextmanager
def whole_file(target: Path, overwrite: bool) -> Iterator[Path]:
    """A file that appears at ``target`` when all of it is on the disk, and not at all on an error."""
    if target.is_dir():
        raise CheckpointError(f"{target} is a folder: name a file in it")
    if target.exists() and not overwrite:
        raise CheckpointError(f"{target} exists: name another file, or overwrite it (--overwrite)")
    target.parent.mkdir(parents=True, exist_ok=True)
    descriptor, name = tempfile.mkstemp(prefix=f".{target.name}.partial-", dir=target.parent)
    os.close(descriptor)
    work = Path(name)
    try:
        work.chmod(0o644)  # mkstemp's 0600 would travel with the model
        yield work
        with work.open("rb") as file:
            os.fsync(file.fileno())
        work.replace(target)
    except BaseException:
        work.unlink(missing_ok=True)
        raise
