"""The hub: Axolotl pushes the latents, before anything can be made of them; the artifacts follow in one
commit.

They are beside the latents in the same repository, with the ``bitnet.json`` that they were verified by and
the model card with the commands that run them.
"""

from __future__ import annotations

import logging
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from huggingface_hub import HfApi

from ..formats.registry import FOLDERS
from ..run_folder import CARD, RUN_FILE

LOG = logging.getLogger("axolotl.bitnet")

_PATTERNS = [f"{folder}/*" for folder in FOLDERS]


@dataclass(frozen=True)
class Repository:
    """Where a trainer pushes to."""

    name: str
    revision: str | None
    token: str | None


def repository_of(trainer: Any) -> Repository | None:
    """The repository of a trainer that pushes; None for others, and on all processes but the first."""
    name = getattr(trainer, "hub_model_id", None)
    if not trainer.args.push_to_hub or name is None:
        return None
    return Repository(name, trainer.args.hub_revision, trainer.args.hub_token)


@contextmanager
def published(output_dir: str | Path, repository: Repository | None) -> Iterator[None]:
    """Push the artifacts that the body makes, those that it made before it failed too; and remove an earlier
    run's from the repository, whose latents are this run's already.
    """
    try:
        yield
    except Exception:
        if repository is not None:
            try:
                _push(Path(output_dir), repository)
            except Exception as error:
                LOG.error("%s may still hold an earlier run's artifacts: %s", repository.name, error)
        raise
    if repository is None:
        return
    try:
        _push(Path(output_dir), repository)
    except Exception:
        where = f" --revision {repository.revision}" if repository.revision else ""
        LOG.error(
            "the artifacts could not be pushed; they are complete in %s. To push them, run: "
            "hf upload %s %s .%s %s",
            output_dir,
            repository.name,
            output_dir,
            where,
            " ".join(
                [
                    *(f"--include '{pattern}'" for pattern in _PATTERNS),
                    *(f"--include {name}" for name in (RUN_FILE, CARD)),
                    *(f"--delete '{pattern}'" for pattern in _PATTERNS),
                ]
            ),
        )
        raise


def _push(output_dir: Path, repository: Repository) -> None:
    """One commit: the repository's artifacts become the folder's, or none where the folder has none."""
    HfApi().upload_folder(
        repo_id=repository.name,
        folder_path=output_dir,
        allow_patterns=[*_PATTERNS, RUN_FILE, CARD],
        delete_patterns=_PATTERNS,
        commit_message="Ternary model",
        revision=repository.revision,
        token=repository.token,
    )
