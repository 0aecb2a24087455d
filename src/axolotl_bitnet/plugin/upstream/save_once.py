"""The final weights are saved by one process: Axolotl lets the first process of every node save them.

On a disk that the nodes share, another node would write weights while the first process packs them.

Changes ``local_rank`` of Axolotl's config, by which its final save chooses (run on 0.19 and 0.21). Without
that key nothing is changed, and a run on several nodes warns. Tests: tests/test_launchers.py,
tests/test_upstream_names.py.
"""

from __future__ import annotations

import os
from importlib.metadata import version
from typing import Any

from ...training.log import is_main_process, rank, warn


def save_once(cfg: Any) -> bool:
    """Keep the first processes of other nodes from saving the final weights.

    Returns:
        Whether this process is one of those.
    """
    several = int(os.environ.get("LOCAL_WORLD_SIZE", "1")) < int(os.environ.get("WORLD_SIZE", "1"))
    if cfg.local_rank is None and several:
        warn(
            f"Axolotl {version('axolotl')} has no local_rank in its config: every node may save the final "
            f"weights. If the nodes share {cfg.output_dir}, check the model with `axolotl-bitnet verify` "
            "when "
            "all of them have ended"
        )
    if cfg.local_rank != 0 or is_main_process():
        return False
    cfg.local_rank = rank()
    return True
