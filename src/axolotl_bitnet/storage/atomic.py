"""Files and folders of checkpoints: whole or not at all, and errors that name them."""

from __future__ import annotations

import errno
import json
import os
import shutil
import tempfile
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import Any

REMEDIES = {
    errno.ENOSPC: "free some space, or name a folder on another disk",
    errno.EDQUOT: "free some of your quota, or name a folder on another disk",
    errno.EFBIG: "the system limits the size of files here (ulimit -f): name another folder",
    errno.EROFS: "the disk is read-only: name another folder",
    errno.EACCES: "you may not write into its folder: name another one",
    errno.EPERM: "you may not write into its folder: name another one",
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
    """Within, an error of the disk names what could not be written and what to do.

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


def require_apart(source: Path, target: Path) -> None:
    """Make sure that writing ``target`` cannot delete ``source``.

    Raises:
        CheckpointError: the target is the source, or a folder around it.
    """
    origin, wanted = source.resolve(), target.resolve()
    if wanted == origin or wanted in origin.parents:
        raise CheckpointError(f"{target} would replace its own source {source}: name another target")


@contextmanager
def whole_folder(target: str | Path, replaces: Callable[[Path], bool] | None = None) -> Iterator[Path]:
    """A folder that appears at ``target`` when it is complete, and not at all on an error.

    Args:
        target: the folder to be.
        replaces: replace a folder in which this is true of every entry; None replaces nothing.

    Yields:
        A temporary folder beside the target; it is renamed at the end.

    Raises:
        CheckpointError: the target exists, and is not to be replaced, or holds something else; or the disk is
            full or cannot be written.
    """
    target = Path(target)
    require_free_folder(target, replaces)
    with disk_errors(target), _parents(target):
        work = Path(tempfile.mkdtemp(prefix=f".{target.name}.partial-", dir=target.parent))
        try:
            work.chmod(0o755)  # mkdtemp's 0700 would travel with the model
            yield work
            require_free_folder(target, replaces)  # what was put there in the meantime
            _replace_folder(target, work)
        except BaseException:
            shutil.rmtree(work, ignore_errors=True)
            raise


@contextmanager
def _parents(target: Path) -> Iterator[None]:
    """Within, the folders around ``target`` are there; on an error, those made for it are removed."""
    made = [folder for folder in target.parents if not folder.exists()]  # the innermost first
    target.parent.mkdir(parents=True, exist_ok=True)
    try:
        yield
    except BaseException:
        with suppress(OSError):  # one that something else was put in stays
            for folder in made:
                folder.rmdir()
        raise


def require_free_folder(target: Path, replaces: Callable[[Path], bool] | None = None) -> None:
    """Make sure that :func:`whole_folder`, called with the same arguments, may give a folder this name.

    Raises:
        CheckpointError: the target exists, and is not to be replaced, or holds something else.
    """
    if not target.exists() and not target.is_symlink():
        return
    if replaces is None:
        raise CheckpointError(f"{target} exists: name another folder, or overwrite it (--overwrite)")
    if target.is_symlink() or not target.is_dir():
        kind = "a link" if target.is_symlink() else "a file"
        raise CheckpointError(f"{target} is {kind}, which no folder replaces: name a folder")
    others = sorted(path.name for path in target.iterdir() if not replaces(path))
    if others:
        more = f" and {len(others) - 4} more" if len(others) > 4 else ""
        raise CheckpointError(
            f"{target} holds {', '.join(others[:4])}{more}, which would be lost: only a folder that holds "
            "nothing but this package's files is replaced. Name another folder, or move these away"
        )


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
def whole_file(target: Path, overwrite: bool, magic: bytes) -> Iterator[Path]:
    """A file that appears at ``target`` when all of it is on the disk, and not at all on an error.

    Args:
        target: the file to be.
        overwrite: replace a file that begins as this one will, or is empty.
        magic: how it begins.

    Raises:
        CheckpointError: the target is a folder, exists, or is a file of another kind.
    """
    require_free_file(target, overwrite, magic)
    with _parents(target):
        descriptor, name = tempfile.mkstemp(prefix=f".{target.name}.partial-", dir=target.parent)
        os.close(descriptor)
        work = Path(name)
        try:
            work.chmod(0o644)  # mkstemp's 0600 would travel with the model
            yield work
            with work.open("r+b") as file:  # Windows flushes only what may be written
                os.fsync(file.fileno())
            work.replace(target)
        except BaseException:
            work.unlink(missing_ok=True)
            raise


def require_free_file(target: Path, overwrite: bool, magic: bytes) -> None:
    """Make sure that :func:`whole_file`, called with the same arguments, may give a file this name.

    Raises:
        CheckpointError: the target is a folder, exists, or is a file of another kind.
    """
    if target.is_dir():
        raise CheckpointError(f"{target} is a folder: name a file in it")
    if not target.exists():
        return
    if not overwrite:
        raise CheckpointError(f"{target} exists: name another file, or overwrite it (--overwrite)")
    with target.open("rb") as file:
        begins = file.read(len(magic))
    if begins not in (magic, b""):
        raise CheckpointError(f"{target} is a file of another kind, which would be lost: name another file")
