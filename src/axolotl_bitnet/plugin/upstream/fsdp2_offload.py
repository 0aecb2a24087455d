"""Axolotl's device mesh connects GPUs only; CPU offload needs the CPUs connected too.

Calls ``axolotl.utils.distributed.init_distributed_state`` (run on 0.19 and 0.21) before the mesh is made.
Without that name accelerate, which it calls, connects the processes with its own timeout, and a warning says
so. Tests: tests/test_sharding.py, tests/test_upstream_names.py.
"""

from __future__ import annotations

from importlib.metadata import version
from typing import Any

from ...training.log import warn


def connect_for_offload(cfg: Any) -> None:
    """Under FSDP2 with `offload_params`, connect the processes for CPU tensors too.

    Axolotl's device mesh would connect them for GPUs only, and clipping gradients that lie on CPUs would fail
    ("No backend type associated with device type cpu"), with dense models too. Accelerate's state, made
    before it, knows from the environment that Axolotl has set by now.
    """
    if str(cfg.fsdp_version) != "2" or not cfg.fsdp_config or not cfg.fsdp_config.offload_params:
        return
    try:
        from axolotl.utils.distributed import init_distributed_state
    except ImportError:
        from accelerate import PartialState

        warn(
            f"Axolotl {version('axolotl')} has no init_distributed_state: accelerate connects the "
            "processes, and "
            "AXOLOTL_NCCL_TIMEOUT is not read"
        )
        PartialState()
        return
    init_distributed_state()
