"""Latent weights: their precision, and the learning rate that moves them.

In bfloat16 an AdamW step of 1e-5 is below half a unit in the last place of almost every weight, and nothing
moves. So latents are kept in float32 by default, whatever dtype the model computes in; their codes are the
same in both.
"""

from __future__ import annotations

import re
from collections.abc import Callable, Iterable, Mapping

import torch
from torch import Tensor, nn

from ..layers.bitlinear import BitLinear
from ..model.fingerprint import clean_name


def upcast_trainable(model: nn.Module) -> int:
    """Give every trainable parameter float32 data, in place (all of them: FSDP2 needs one dtype per unit).

    Must run before the optimizer is built. Returns the number of elements that were upcast.
    """
    upcast = 0
    for parameter in model.parameters():
        if parameter.requires_grad and parameter.is_floating_point() and parameter.dtype != torch.float32:
            parameter.data = parameter.data.to(torch.float32)
            upcast += parameter.numel()
    return upcast


@torch.no_grad()
def restore_low_bits(
    model: nn.Module, stored: Mapping[str, Callable[[], Tensor]], loaded_as: torch.dtype
) -> int:
    """Bring back what loading a float32 base in a shorter dtype cut off.

    Args:
        model: the policy, its trainable parameters already float32.
        stored: the base's float32 tensors by parameter name, as functions that read them.
        loaded_as: the dtype the base was loaded in.

    Returns:
        The number of tensors restored. A tensor that is no longer the stored one rounded (resized embeddings,
        rescaled or re-initialized weights) is left alone.
    """
    restored = 0
    for name, parameter in model.named_parameters():
        read = stored.get(clean_name(name))
        if read is None or parameter.is_meta or parameter.dtype != torch.float32:
            continue
        full = read().to(parameter.device)
        if full.shape == parameter.shape and torch.equal(full.to(loaded_as), parameter.to(loaded_as)):
            parameter.copy_(full)
            restored += 1
    return restored


@torch.no_grad()
def match_reference(policy: nn.Module, reference: nn.Module) -> None:
    """Give a preference method's reference model the policy's values and dtype in all but its ternary
    weights.

    Otherwise one would run its norms and embeddings in float32 and the other in bfloat16, and rewards would
    not start at zero. Ternary weights quantize to the same codes in either dtype, so they keep theirs.
    """
    ternary = {
        f"{name}.weight" for name, module in reference.named_modules() if isinstance(module, BitLinear)
    }
    values = {clean_name(name): parameter for name, parameter in policy.named_parameters()}
    for name, parameter in reference.named_parameters():
        value = values.get(clean_name(name))
        if name not in ternary and value is not None and value.shape == parameter.shape:
            parameter.data = value.detach().clone().to(parameter.device)


def ternary_name_patterns(model: nn.Module) -> list[str]:
    """Short strings that occur in the parameter names of BitLinear weights, and in those of no other
    parameter.

    For Axolotl's ``lr_groups``, which searches names for a string. Short, because wrappers insert words into
    names.
    """
    ternary = [f"{name}.weight" for name, module in model.named_modules() if isinstance(module, BitLinear)]
    others = [name for name, _ in model.named_parameters() if name not in set(ternary)]
    patterns: dict[str, None] = {}
    for name in ternary:
        short = re.split(r"\.\d+\.", name)[-1]
        patterns[name if _occurs(short, others) else short] = None
    return list(patterns)


def _occurs(text: str, names: Iterable[str]) -> bool:
    return any(text in name for name in names)
