"""Whether a checkpoint's tensors are those of the model that its config describes.

transformers builds that model without memory, on the meta device. A checkpoint whose architecture it does not
know, or whose tensors it renames on loading, is compared as far as the names agree.
"""

from __future__ import annotations

from typing import Any, cast

import torch
from torch import nn

from ..storage.atomic import CheckpointError
from .checkpoint import TernaryCheckpoint


def require_shapes(source: TernaryCheckpoint) -> None:
    """Hold names and shapes of all tensors against config.json.

    Raises:
        CheckpointError: a tensor has another shape, or is missing.
    """
    model = _model_of(source.config)
    if model is None:
        return
    config = source.companions / "config.json"
    parameters = dict(model.named_parameters(remove_duplicate=False))
    for key, entry in source.entries.items():
        if key in parameters and entry.shape != (shape := tuple(parameters[key].shape)):
            raise CheckpointError(
                f"{source.folder}: '{key}' has shape {list(entry.shape)}, but by {config} it has "
                f"{list(shape)}: weights and config are not of one model; put the config beside them that "
                "they were saved with"
            )
    if not source.entries.keys() <= model.state_dict().keys():
        return  # saved under other names
    there = {id(parameters[key]) for key in source.entries if key in parameters}  # tied ones are one object
    missing = [key for key, parameter in parameters.items() if id(parameter) not in there]
    if missing:
        raise CheckpointError(
            f"{source.folder} has no '{missing[0]}', which a model of {config} has: save the model again"
        )


def _model_of(config: dict[str, Any]) -> nn.Module | None:
    """The model on the meta device; None if transformers has no such class, or the config is not enough."""
    import transformers

    names = config.get("architectures") or [None]
    kind = getattr(transformers, str(names[0]), None)
    if not isinstance(kind, type) or not issubclass(kind, transformers.PreTrainedModel):
        return None
    described: Any = getattr(kind, "config_class", None)
    try:
        with torch.device("meta"):
            return cast(nn.Module, kind(described.from_dict(config)))
    except Exception:  # what a class makes of a config that is not whole is its own affair
        return None
