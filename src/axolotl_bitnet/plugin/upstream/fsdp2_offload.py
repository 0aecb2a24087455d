"""Axolotl's device mesh connects GPUs only; CPU offload needs the CPUs connected too.

Upstream name: ``axolotl.utils.distributed.init_distributed_state`` (0.19, 0.21).
"""

from __future__ import annotations

from typing import Any


def connect_for_offload(cfg: Any) -> None:
    """Under FSDP2 with `offload_params`, connect the processes for CPU tensors too.

    Axolotl's device mesh would connect them for GPUs only, and clipping gradients that lie on CPUs would fail
    ("No backend type associated with device type cpu"), with dense models too. Accelerate's state, made
    before it, knows from the environment that Axolotl has set by now.
    """
    if str(cfg.fsdp_version) == "2" and cfg.fsdp_config and cfg.fsdp_config.offload_params:
        from axolotl.utils.distributed import init_distributed_state

        init_distributed_state()
