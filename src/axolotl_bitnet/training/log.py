"""The log of a run, written by its first process alone.

A child of Axolotl's logger has its handler and level. Axolotl's own wrapper asks for the process group, which
is gone when the artifacts are made; so the rank comes from the environment.
"""

from __future__ import annotations

import logging
import os
from typing import Any

LOG = logging.getLogger("axolotl.bitnet")


def rank() -> int:
    """Of this process among those of all nodes."""
    return int(os.environ.get("RANK", "0"))


def is_main_process() -> bool:
    """Whether this is the first process of all nodes."""
    return rank() == 0


def info(message: str, *args: Any) -> None:
    if is_main_process():
        LOG.info(message, *args)


def warn(message: str) -> None:
    if is_main_process():
        LOG.warning("%s", message)
