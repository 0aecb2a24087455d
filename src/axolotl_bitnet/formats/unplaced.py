"""Stored tensors that an architecture has no place for, such as the norms inside attention and MLP of
1bitLLM's models, which are Llamas by their config. transformers skips them with a line in its log, and the
model computes something else than its authors trained.

Names alone are compared, with a model on the meta device. A checkpoint that lacks one of the model's
parameters is saved under other names, which transformers maps on loading: it is not judged.
"""

from __future__ import annotations

import re
from collections.abc import Collection, Mapping
from typing import TYPE_CHECKING, Any, cast

from ..model.names import first_few, natural_order

if TYPE_CHECKING:
    from torch import nn

KEY = "unplaced"
"""Of the names in ``run.json``."""

_COMPUTED = r"rotary_emb\.inv_freq$|\.weight_scale"  # from the config; by a quantization


def unplaced(config: Mapping[str, Any], stored: Collection[str]) -> list[str]:
    """Names of stored tensors that the architecture has neither a parameter nor a buffer for.

    Args:
        config: a model's config.json.
        stored: names of its tensors.

    Returns:
        In the order of the layers. Empty where transformers does not know the architecture, and where it
        renames the tensors on loading.
    """
    from .folder_writer import absent_parameters, model_of  # imports torch, which a note does not need

    model = model_of(dict(config)) or _model_by_type(config)
    if model is None or absent_parameters(model, stored):
        return []
    known = {name for name, _ in model.named_parameters(remove_duplicate=False)}
    known |= {name for name, _ in model.named_buffers(remove_duplicate=False)}
    passed_over: Any = getattr(model, "_keys_to_ignore_on_load_unexpected", None) or ()
    rules = [_COMPUTED, *passed_over]
    names = [
        name for name in stored if name not in known and not any(re.search(rule, name) for rule in rules)
    ]
    return sorted(names, key=natural_order)


def note_of(names: Any) -> str | None:
    """A sentence about such tensors of a run's base; None without any, or if ``names`` is no list."""
    if not isinstance(names, list) or not names:
        return None
    return (
        f"Tensors of the base that its architecture has no place for are not loaded ({len(names)}: "
        f"{first_few([str(name) for name in names])}). What is trained is not the model that the base's "
        "files describe"
    )


def _model_by_type(config: Mapping[str, Any]) -> nn.Module | None:
    """The model that transformers builds of a config whose ``architectures`` names a third party's class."""
    import torch
    from transformers import CONFIG_MAPPING, AutoModelForCausalLM

    try:
        described = CONFIG_MAPPING[config["model_type"]].from_dict(dict(config))
        with torch.device("meta"):
            return cast("nn.Module", AutoModelForCausalLM.from_config(described, trust_remote_code=False))
    except Exception:  # an unknown type, or a config that is not whole
        return None
