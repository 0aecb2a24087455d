"""The hub: Axolotl pushes the latents, before they can be packed; the packed model follows in one commit.

``packed/`` lies beside the latents in the same repository, with the ``bitnet.json`` that it was verified by.
"""

from __future__ import annotations

import logging
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from huggingface_hub import HfApi

from ..checkpoint.artifacts import PACKED
from ..checkpoint.verify import RUN_FILE

LOG = logging.getLogger("axolotl.bitnet")


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
    """Push the artifacts that the body makes; if it fails, take an earlier run's from the repository.

    Its latents are this run's already, and must not stand beside another run's packed model.
    """
    try:
        yield
    except Exception:
        if repository is not None:
            try:
                _push(Path(output_dir), repository)
            except Exception as error:
                LOG.error("%s may still hold an earlier run's %s: %s", repository.name, PACKED, error)
        raise
    if repository is None:
        return
    try:
        _push(Path(output_dir), repository)
    except Exception:
        where = f" --revision {repository.revision}" if repository.revision else ""
        LOG.error(
            "the packed model could not be pushed; it is complete in %s. To push it, run: "
            "hf upload %s %s .%s --include '%s/*' --include %s --delete '%s/*'",
            Path(output_dir) / PACKED,
            repository.name,
            output_dir,
            where,
            PACKED,
            RUN_FILE,
            PACKED,
        )
        raise


def _push(output_dir: Path, repository: Repository) -> None:
    """One commit: the repository's packed model becomes the folder's, or none where the folder has none."""
    HfApi().upload_folder(
        repo_id=repository.name,
        folder_path=output_dir,
        allow_patterns=[f"{PACKED}/*", RUN_FILE],
        delete_patterns=[f"{PACKED}/*"],
        commit_message="Packed ternary model",
        revision=repository.revision,
        token=repository.token,
    )
