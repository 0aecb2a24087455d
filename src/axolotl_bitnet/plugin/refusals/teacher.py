"""`bitnet.teacher` and `bitnet.start` where a loss or a layout would ignore them."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

_OWN_LOSS = {
    "use_eaft": "computes a loss of its own from logits, which a teacher's run does not make",
    "use_dft": "computes a loss of its own from logits, which a teacher's run does not make",
    "label_smoothing_factor": "is a loss on labels from logits, which a teacher's run does not make",
    "reward_model": "trains a score, and a teacher answers with words",
    "process_reward_model": "trains a score, and a teacher answers with words",
    "diffusion_lm": "trains another objective than the next word",
    "processor_type": "trains on more than text, which the teacher's loss was not checked with",
}


def teacher_refusals(cfg: Mapping[str, Any]) -> list[str]:
    """Why this config's teacher or start cannot work: sentences, empty when they can or there is none."""
    bitnet = cfg.get("bitnet")
    options: Mapping[str, Any] = bitnet if isinstance(bitnet, Mapping) else {}
    found = []
    if cfg.get("kd_trainer"):
        found.append(
            "`kd_trainer` with `use_onebitllms`: Axolotl's distillation needs the teacher's answers on disk, "
            "lets packed conversations read each other, and cannot shard the head. Use "
            "`bitnet.teacher: base` (or a path) instead"
        )
    if options.get("teacher"):
        found += _teacher_alone(cfg)
    else:
        for key in ("teacher_temperature", "teacher_weight"):
            if options.get(key) not in (None, 1, 1.0):
                found.append(
                    f"`bitnet.{key}` without `bitnet.teacher`: there is no teacher. Add one or remove it"
                )
    if options.get("start") == "stretch":
        if cfg.get("deepspeed"):
            found.append(
                "`bitnet.start: stretch` with `deepspeed`, which keeps masters of the weights that would not "
                "be stretched. Use FSDP2 or DDP"
            )
        if cfg.get("reinit_weights"):
            found.append("`bitnet.start: stretch` with `reinit_weights`: random weights have nothing to keep")
        if cfg.get("rl"):
            found.append(
                "`bitnet.start: stretch` with `rl`: the reference model would not be stretched. Convert the "
                "model by supervised fine-tuning first, then run the preference method on its output"
            )
    return found


def teacher_fsdp_refusals(options: Mapping[str, Any]) -> list[str]:
    """The same of a run under FSDP1."""
    return [
        f"`bitnet.{key}: {value}` under FSDP1, which flattens weights into one: {why}. Set `fsdp_version: 2`"
        for key, value, why in (
            ("teacher", options.get("teacher"), "a teacher's loss finds no head there"),
            (
                "start",
                options.get("start") if options.get("start") == "stretch" else None,
                "no weight is one matrix there",
            ),
        )
        if value
    ]


def _teacher_alone(cfg: Mapping[str, Any]) -> list[str]:
    found = []
    method = getattr(cfg.get("rl"), "value", cfg.get("rl"))
    if method:
        found.append(
            f"`bitnet.teacher` with `rl: {method}`: a preference method ranks answers, a teacher's loss is "
            "per word. Train with the teacher by supervised fine-tuning first, then run the method on its "
            "output"
        )
    if cfg.get("deepspeed"):
        found.append(
            "`bitnet.teacher` with `deepspeed`: the teacher's weights would lie whole on every GPU, or, with "
            "ZeRO-3, not be there when they are read. Use FSDP2 or DDP"
        )
    if (cfg.get("context_parallel_size") or cfg.get("sequence_parallel_degree") or 1) > 1:
        found.append(
            "`context_parallel_size` above 1 with `bitnet.teacher`: labels are shifted after the sequence is "
            "cut, and the words at the cuts would be taught wrong. Use FSDP2 without it"
        )
    for key, why in _OWN_LOSS.items():
        if cfg.get(key):
            found.append(f"`{key}` with `bitnet.teacher`: it {why}. Remove one of the two")
    return found
