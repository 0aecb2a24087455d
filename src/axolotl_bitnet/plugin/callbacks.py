"""The callbacks of a ternary run: ramp, monitor, and what FSDP2 gathers."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import torch

from ..training.log import info
from .args import BitNetConfig


def watch(cfg: Any, trainer: Any, options: BitNetConfig, resumed: Path | None) -> list[Any]:
    """The callbacks of a run's ramp and monitor; what they have to say goes into the trainer's log."""
    from ..training.monitor.callback import Monitor
    from ..training.ramp import RampSchedule
    from ..training.trainer_evaluation import log_ternary_loss
    from ..training.trainer_log import log_through  # transformers: not where a config is only checked

    callbacks: list[Any] = []
    if options.ramp_steps:
        callbacks.append(RampSchedule(options.ramp_steps))
        log_ternary_loss(trainer)
    if options.monitor:
        callbacks.append(Monitor(resumed, torch.float32 if cfg.deepspeed else None))  # its masters' dtype
    log_through(trainer, *callbacks)
    return callbacks


def gathering(cfg: Any, trainer: Any, wish: str) -> list[Any]:
    """The callback that makes FSDP2 gather 2-bit codes, where that is asked for or possible; and says so."""
    if str(cfg.fsdp_version) != "2":
        return []
    reason = "bitnet.gather: native"
    if wish != "native":
        try:
            from ..training.fsdp2_gather import GatherTernary
        except ImportError as error:  # it reaches into FSDP2's own modules
            if wish == "ternary":
                raise RuntimeError(
                    f"`bitnet.gather: ternary` does not fit torch {torch.__version__}"
                ) from error
            reason = f"torch {torch.__version__} has no place for codes: {error}"
        else:
            info("FSDP2 gathers ternary weights as 2-bit codes")
            reference = getattr(trainer, "ref_model", None)
            references = [] if reference is None else [reference]
            return [GatherTernary(*references, required=wish == "ternary")]
    info("FSDP2 gathers weights as they are (%s)", reason)
    return []
