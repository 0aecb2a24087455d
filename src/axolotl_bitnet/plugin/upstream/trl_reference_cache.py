"""TRL's cache of precomputed reference log-probabilities, made to distinguish ternary models from dense ones.

Changes ``trl.trainer.dpo_trainer.hash_module`` (run on TRL 1.9 and 1.14). Without that name
`precompute_ref_log_probs` is refused before training. Tests: tests/test_references.py,
tests/test_upstream_names.py.
"""

from __future__ import annotations

import functools
import hashlib
import json
from collections.abc import Callable
from importlib.metadata import version

from torch import nn

from ...model.entry import CONFIG_KEY
from .trl_reference import is_ternary


def key_precomputed_references() -> None:
    """Make TRL's cache of precomputed reference log-probabilities distinguish ternary models from dense ones.

    The cache file lies beside the prepared dataset, under a hash of the dataset and of the model's tensors. A
    ternary model has the tensors of the dense one that it was made from. Dense models keep their hash.

    Raises:
        RuntimeError: this TRL keys its cache in another way.
    """
    try:
        from trl.trainer import dpo_trainer

        original = dpo_trainer.hash_module
    except (ImportError, AttributeError):
        raise RuntimeError(
            f"`precompute_ref_log_probs` with `use_onebitllms`: TRL {version('trl')} has no hash_module to "
            "key its cache with, and could take log-probabilities of the dense model. Set it to false"
        ) from None
    if not hasattr(original, "tells_ternary"):
        dpo_trainer.hash_module = _telling_ternary(original)


def _telling_ternary(hash_module: Callable[[nn.Module], str]) -> Callable[[nn.Module], str]:
    @functools.wraps(hash_module)
    def hash_ternary(module: nn.Module) -> str:
        found = hash_module(module)
        if not is_ternary(module):
            return found
        names = json.dumps(getattr(getattr(module, "config", None), CONFIG_KEY, None), sort_keys=True)
        return hashlib.sha256(f"{found} {names}".encode()).hexdigest()

    hash_ternary.tells_ternary = True  # type: ignore[attr-defined]
    return hash_ternary
