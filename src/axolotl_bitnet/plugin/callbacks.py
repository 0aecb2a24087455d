"""The callbacks of a ternary run: start, teacher, ramp, monitor, and what FSDP2 gathers."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import torch

from ..training.log import info
from .args import BitNetConfig
from .teacher import load_teacher
from .upstream.sdpa_compiled import ask_before_the_layers


def watch(
    cfg: Any, trainer: Any, options: BitNetConfig, resumed: Path | None, record: dict[str, Any]
) -> list[Any]:
    """The callbacks of a run's start, teacher, ramp and monitor, in the order in which they begin; their
    figures go into the trainer's log. ``record`` is what checkpoints keep of the run."""
    from ..training.monitor.callback import Monitor
    from ..training.ramp import RampSchedule
    from ..training.speed import Speed
    from ..training.stretch import Stretch
    from ..training.teacher import Teaching, log_teacher_loss
    from ..training.trainer_evaluation import log_ternary_loss
    from ..training.trainer_log import log_through  # transformers: not where a config is only checked

    callbacks: list[Any] = []
    figures: list[Any] = []
    if options.start == "stretch":
        callbacks.append(Stretch(trainer, cfg.sequence_len or 2048, record))
    if options.teacher:
        teacher = load_teacher(cfg, options, trainer)
        log_teacher_loss(trainer, teacher)
        callbacks.append(Teaching(teacher))
        figures.append(teacher)
    if options.ramp_steps:
        ramp = RampSchedule(options.ramp_steps)
        log_ternary_loss(trainer)
        callbacks.append(ramp)
        figures.append(ramp)
    if options.monitor:
        monitor = Monitor(resumed, torch.float32 if cfg.deepspeed else None)  # its masters' dtype
        speed = Speed(trainer)
        callbacks += [monitor, speed]
        figures += [monitor, speed]
    log_through(trainer, *figures)
    return callbacks


def compiling(cfg: Any, trainer: Any, callbacks: list[Any]) -> list[Any]:
    """The callback that compiles layers, a teacher's too, for a run with ``torch_compile``. Accelerate would
    compile the whole model, and is told not to; under FSDP1 and DeepSpeed it does as before."""
    if not cfg.torch_compile or cfg.deepspeed or (cfg.fsdp_config and str(cfg.fsdp_version) != "2"):
        return []
    from accelerate.utils import DynamoBackend

    from ..training.compiled_attention_rng import without_random_state
    from ..training.layer_compile import CompileLayers
    from ..training.teacher import Teaching

    trainer.accelerator.state.dynamo_plugin.backend = DynamoBackend.NO
    teachers = [each.teacher.model for each in callbacks if isinstance(each, Teaching)]
    ask_before_the_layers(trainer.model, *teachers)
    without_random_state()
    settings = {"backend": cfg.torch_compile_backend, "mode": cfg.torch_compile_mode}
    return [CompileLayers(*teachers, **{key: value for key, value in settings.items() if value})]


def gathering(cfg: Any, trainer: Any, wish: str) -> list[Any]:
    """The callback that makes FSDP2 gather 2-bit codes, where that is asked for or possible; the log has
    which."""
    if str(cfg.fsdp_version) != "2":
        return []
    reason = "bitnet.gather: native"
    if wish != "native":
        try:
            from ..training.fsdp2_together import shard_together
            from ..training.gather_callback import GatherTernary
        except ImportError as error:  # it reaches into FSDP2's own modules
            if wish == "ternary":
                raise RuntimeError(
                    f"`bitnet.gather: ternary` does not fit torch {torch.__version__}"
                ) from error
            reason = f"torch {torch.__version__} has no place for codes: {error}"
        else:
            info(
                "FSDP2 gathers ternary weights as 2-bit codes, an eighth of the bytes (bitnet.gather: %s)",
                wish,
            )
            shard_together(trainer.accelerator)
            reference = getattr(trainer, "ref_model", None)
            references = [] if reference is None else [reference]
            keep = cfg.rl not in ("grpo", "gdpo")  # TRL reads weights amid a step, and expects shards
            return [GatherTernary(*references, required=wish == "ternary", keep=keep)]
    info("FSDP2 gathers whole weights (%s)", reason)
    return []
