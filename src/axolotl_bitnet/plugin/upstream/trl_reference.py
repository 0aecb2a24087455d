"""Reference models of the preference methods: always ternary, and equal to the policy before the first step.

DPO and IPO get the reference that Axolotl loads through the plugin's hooks, like the policy. For KTO and GRPO
Axolotl loads one as well and drops it, and TRL loads another from the base's path: dense, another model than
the policy ever was. Here the first takes the place of the second.

Changes ``ref_model`` of TRL's trainers, and of its SyncRefModelCallback (run on TRL 1.9 and 1.14). Without
the names that it takes a dense reference is refused before training. Tests: tests/test_references.py,
tests/test_upstream_names.py.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import nn

from ...formats.recognize import recognize
from ...layers.bitlinear import BitLinear


def is_ternary(model: nn.Module) -> bool:
    """Whether any layer of the model is a BitLinear."""
    return any(isinstance(module, BitLinear) for module in model.modules())


def settle_reference(trainer: Any, loaded: nn.Module | None) -> nn.Module | None:
    """Give a TRL trainer a ternary reference model in place of a dense one.

    Must run before training, while the trainer's policy is what was loaded.

    Args:
        trainer: has ``ref_model`` if its method uses one.
        loaded: the second model that Axolotl loaded through the plugin's hooks.

    Returns:
        The reference in use; None where the method has none (or only its precomputed log-probabilities).

    Raises:
        RuntimeError: the reference is dense and cannot be replaced here.
    """
    dense = getattr(trainer, "ref_model", None)
    if dense is None or is_ternary(dense):
        return dense
    problem = _why_not(trainer, loaded)
    if loaded is None or problem:
        raise RuntimeError(
            f"the reference model of {type(trainer).__name__} is dense and the policy ternary: rewards would "
            f"compare two different models. It cannot be replaced: {problem}"
        )
    trainer.ref_model = trainer.accelerator.prepare_model(loaded.eval(), evaluation_mode=True)
    for callback in trainer.callback_handler.callbacks:
        if getattr(callback, "ref_model", None) is dense:  # TRL's SyncRefModelCallback
            callback.ref_model = trainer.ref_model
            for parameter in loaded.parameters():  # bfloat16 would round away what is mixed in
                parameter.data = parameter.data.to(torch.float32)
    return loaded


def _why_not(trainer: Any, loaded: nn.Module | None) -> str | None:
    if loaded is None or not is_ternary(loaded):
        return "Axolotl loaded no ternary reference beside it"
    prepare = getattr(getattr(trainer, "accelerator", None), "prepare_model", None)
    if prepare is None or not hasattr(getattr(trainer, "callback_handler", None), "callbacks"):
        return "this trainer has no accelerator.prepare_model, or no callback_handler.callbacks"
    for attribute, name in (("is_fsdp_enabled", "FSDP"), ("is_deepspeed_enabled", "DeepSpeed")):
        if getattr(trainer, attribute, False):
            return f"under {name} it is sharded already. Use DDP or one process"
    return None


def refuse_dense_judges(trainer: Any) -> None:
    """Raise ValueError when a reward model of GRPO was trained ternary and is loaded dense.

    Latents computed as dense weights are another model than the one that was trained to judge.
    """
    for judge in getattr(trainer, "reward_funcs", None) or []:
        config: Any = getattr(judge, "config", None)
        if isinstance(judge, nn.Module) and config and recognize(config.to_dict()).kind == "latents":
            raise ValueError(
                f"`trl.reward_funcs`: {config.name_or_path} holds the latents of a ternary reward model, and "
                "TRL computes them as dense weights. Name its packed/ folder instead"
            )


def refuse_dense_reference(cfg: Any, trainer: Any) -> None:
    """`axolotl evaluate` builds a preference trainer without a reference, and TRL then loads a dense one.

    Raises:
        ValueError: rewards would compare two different models.
    """
    reference = getattr(trainer, "ref_model", None)
    if reference is None or any(isinstance(module, BitLinear) for module in reference.modules()):
        return
    method = getattr(cfg.rl, "value", cfg.rl)
    raise ValueError(
        f"`axolotl evaluate` with `rl: {method}` and `use_onebitllms`: it gives the trainer no reference "
        "model, and TRL loads the latents as a dense one. Training logs the rewards (`val_set_size`, "
        "`eval_strategy`); for the loss on text evaluate a config without `rl`"
    )
