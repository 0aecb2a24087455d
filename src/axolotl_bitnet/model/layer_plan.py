"""Which linear layers become ternary.

Every nn.Linear of the language model does, except the output head, what the user names, vision and audio
towers, and MoE routers. Planning touches no weight, so a model on the meta device will do. The plan is
written to the model's config, and that list is the only one that packing and verification use.
"""

from __future__ import annotations

import logging
import re
from collections.abc import Container, Iterable
from dataclasses import dataclass, field
from importlib.metadata import version
from typing import Any

import torch
from torch import nn

from ..layers.bitlinear import BitLinear
from ..ops import ROWS_PER_BYTE
from ..ternary import DEFINITION
from .entry import RAMP_KEY
from .outline import matches

LOG = logging.getLogger("axolotl.bitnet")

_HEADS = {"lm_head", "embed_out", "score", "classifier"}


_ROUTERS = {"gate", "router", "wg", "shared_expert_gate"}


_TOWERS = re.compile(r"vision|visual|image|audio|speech|multi_?modal|mm_projector|connector|aligner")


class ConversionError(ValueError):
    """The model cannot become ternary as asked; the message names the module and what to do."""


@dataclass(frozen=True)
class Plan:
    """Names of the linear layers: those that become (or are) BitLinear, and those that stay dense."""

    converted: list[str]
    dense: list[str]
    saved_as: dict[str, str] = field(default_factory=dict)
    """Beginnings of converted names, and what the checkpoint's files call them, where the two differ."""

    def to_entry(self) -> dict[str, Any]:
        """Our entry in config.json: ``definition`` (version of the codes' definition), ``converted``,
        ``dense``, and ``saved_as`` if there is any."""
        entry = {"definition": DEFINITION, "converted": list(self.converted), "dense": list(self.dense)}
        return entry | ({"saved_as": dict(self.saved_as)} if self.saved_as else {})

    @classmethod
    def from_entry(cls, entry: Any) -> Plan | None:
        """The plan that an entry holds; None if it holds none, or names no layer.

        Raises:
            ValueError: it holds anything but names of layers.
        """
        if not isinstance(entry, dict) or not entry.get("converted"):
            return None
        converted, dense, saved_as = entry["converted"], entry.get("dense", []), entry.get("saved_as", {})
        lists = isinstance(converted, list) and isinstance(dense, list) and isinstance(saved_as, dict)
        if not lists or not all(isinstance(name, str) for name in [*converted, *dense, *saved_as.values()]):
            raise ValueError("it holds other things than names of layers")
        return cls(list(converted), list(dense), dict(saved_as))

    def stem(self, name: str, stored: Container[str]) -> str:
        """What a checkpoint whose tensors are ``stored`` calls a converted layer."""
        if f"{name}.weight" in stored:
            return name
        for start in sorted(self.saved_as, key=len, reverse=True):
            if name == start or name.startswith(f"{start}."):
                return self.saved_as[start] + name[len(start) :]
        return name


def unfinished_ramp(entry: Any) -> str | None:
    """Why a model with this entry in its config is not ternary yet, and what to do; None if it is."""
    value = entry.get(RAMP_KEY) if isinstance(entry, dict) else None
    if value is None:
        return None
    value = value if isinstance(value, int | float) else float("nan")
    return (
        f"the ramp had come to lambda = {value:.3g} when this was saved: the model is between the dense and "
        "the ternary one, and its codes are another model. Train until lambda is 1: resume from the last "
        "checkpoint with more steps (max_steps, num_epochs), or train again with fewer ramp_steps"
    )


def too_short(ramp_steps: int, max_steps: int) -> str:
    """What is wrong with a run that ends before its ramp."""
    return (
        f"`bitnet.ramp_steps: {ramp_steps}` and a run of {max_steps} steps: it would end before the model is "
        "ternary. Set ramp_steps lower (a tenth of the steps), or train longer"
    )


def plan_conversion(model: nn.Module, skip_modules: Iterable[str] = ()) -> Plan:
    """Decide which linear layers become ternary, without touching the model (a meta-device model will do)."""
    patterns = list(skip_modules)
    unused = set(patterns)
    head = _output_head(model)
    plan = Plan(converted=[], dense=[])
    problems: list[str] = []

    def skipped(name: str) -> bool:
        hits = {pattern for pattern in patterns if matches(name, pattern)}
        unused.difference_update(hits)
        return bool(hits)

    dense_roots: list[str] = []  # modules that bypass their layers, and were skipped: dense as a whole
    for name, module in model.named_modules():
        if problem := _bypass(name, module):
            if skipped(name):
                dense_roots.append(f"{name}.")
            else:
                problems.append(problem)
        elif not _is_linear(module):
            continue
        elif (
            skipped(name)
            or module is head
            or _stays_dense(name)
            or any(name.startswith(root) for root in dense_roots)
        ):
            if isinstance(module, BitLinear):
                problems.append(f"{name} is ternary already and cannot be left dense: reload the model")
            plan.dense.append(name)
        elif problem := _unfit(name, module):
            problems.append(problem)
        else:
            plan.converted.append(name)

    if unused:
        problems.append(
            f"skip_modules matches no linear layer: {sorted(unused)}. model.named_modules() lists the names"
        )
    if not plan.converted and not problems:
        problems.append(
            f"{type(model).__name__} has no nn.Linear to convert (only {len(plan.dense)} that stay dense)"
        )
    if problems:
        shown = "\n  ".join(problems[:8])
        more = f"\n  ... and {len(problems) - 8} more" if len(problems) > 8 else ""
        raise ConversionError(f"{type(model).__name__} cannot be made ternary:\n  {shown}{more}")
    return plan


def _is_linear(module: nn.Module) -> bool:
    # transformers' own packed layer is no nn.Linear, but must not pass for "nothing to do here"
    return isinstance(module, nn.Linear) or type(module).__name__ == "BitLinear"


def _is_auto_bitlinear(module: nn.Module) -> bool:
    return type(module).__name__ == "AutoBitLinear" and isinstance(module, nn.Linear)


def _unfit(name: str, module: nn.Module) -> str | None:
    """Why this linear layer cannot be converted, or None."""
    kind = type(module)
    if kind is not nn.Linear and kind is not BitLinear and not _is_auto_bitlinear(module):
        if kind.__name__ == "BitLinear":
            return f"{name} is packed to 2 bits: training needs latents; take the bf16 or 'prequantized' base"
        kind_name = f"{kind.__module__}.{kind.__name__}"
        return f"{name} is a {kind_name}, not a plain nn.Linear: add it to skip_modules to leave it so"
    if _is_auto_bitlinear(module):
        if getattr(module, "rms_norm", None) is not None:
            return (
                f"{name} normalizes inside the layer (use_rms_norm), for which the packed format has no place"
            )
        if not module.online_quant:
            return f"{name} holds codes beside a weight_scale: start from the bf16 latents"
    if "forward" in vars(module) and not hasattr(module, "_old_forward"):
        return f"{name} has a forward of its own on the instance, which would hide BitLinear's: remove it"
    out_features = int(module.out_features)  # type: ignore[arg-type]
    if out_features % ROWS_PER_BYTE:
        return (
            f"{name} has out_features = {out_features}, not a multiple of {ROWS_PER_BYTE}, "
            "and could not be packed: add it to skip_modules"
        )
    return None


def _bypass(name: str, module: nn.Module) -> str | None:
    """Why the weights inside this module would not go through BitLinear's forward, or None."""
    kind = type(module).__name__
    if kind.endswith("Experts") or name.rsplit(".", 1)[-1] == "experts":
        fused = [key for key, parameter in module.named_parameters(recurse=False) if parameter.dim() == 3]
        if fused:
            return (
                f"{name} ({kind}) fuses its experts into 3-D tensors ({', '.join(fused)}), past nn.Linear: "
                f"add '{name}' to skip_modules to leave the experts dense"
            )
    if isinstance(getattr(module, "conv1d", None), nn.Module) and isinstance(
        getattr(module, "out_proj", None), nn.Linear
    ):
        return (
            f"{name} ({kind}) is a state-space mixer whose fused kernel reads out_proj.weight by itself: "
            f"add '{name}' to skip_modules to leave the mixer dense"
        )
    return None


def _stays_dense(name: str) -> bool:
    parts = name.split(".")
    return parts[-1] in _HEADS | _ROUTERS or any(_TOWERS.search(part) for part in parts)


def _saved_as(model: nn.Module, names: list[str]) -> dict[str, str]:
    """Where transformers saves these layers under other names than the model's, as it does with the towers of
    vision-language models: beginnings of names, and what they become.

    Raises:
        ConversionError: it saves one merged with others, or in pieces, which could not be packed.
    """
    if not hasattr(model, "save_pretrained"):
        return {}
    try:
        from transformers.core_model_loading import revert_weight_conversion
    except ImportError:
        LOG.warning(
            "transformers %s has no revert_weight_conversion: layers are assumed to be saved under the names "
            "that the model gives them. If they are not (as in Llava), packing fails and names the first",
            version("transformers"),
        )
        return {}

    renamed = {}
    for name in names:
        saved = revert_weight_conversion(model, {f"{name}.weight": torch.empty(4, 4, device="meta")})
        (key, *more) = saved
        if more or not key.endswith(".weight"):
            raise ConversionError(
                f"{name} is saved as {', '.join(saved)}, which could not be packed: add it to skip_modules"
            )
        ours, theirs = name.split("."), key.removesuffix(".weight").split(".")
        while len(ours) > 1 and len(theirs) > 1 and ours[-1] == theirs[-1]:
            ours.pop()
            theirs.pop()
        if ours != theirs:
            renamed[".".join(ours)] = ".".join(theirs)
    return renamed


def _output_head(model: nn.Module) -> Any:
    getter = getattr(model, "get_output_embeddings", None)
    return getter() if getter is not None else None
