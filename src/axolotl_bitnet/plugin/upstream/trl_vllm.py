"""GRPO's rollouts in vLLM: what TRL pushes there must be the ternary weights, not the latents.

vLLM computes whatever weights it is given as dense ones. So a BitLinear's weight is pushed as ``codes / s``
and everything else as it is, under the names, shapes and dtypes that TRL would push. vLLM does not quantize
activations to 8 bits: its probabilities are near the policy's, not equal to them, and TRL's importance
sampling corrects for the difference.

Changes ``sync_weights``, and ``_iter_named_params`` (run on TRL 1.14) or ``_push_param_to_vllm`` (1.9), of a
trainer's ``vllm_generation``. Without these names `trl.use_vllm` is refused before training. Tests:
tests/test_rollouts.py, tests/test_upstream_names.py.
"""

from __future__ import annotations

import inspect
from collections.abc import Iterator
from types import MethodType
from typing import Any

from torch import Tensor, nn

from ... import ops
from ...layers.bitlinear import BitLinear
from ...model.fingerprint import clean_name
from ...ternary import dequantize

_UNKNOWN = (
    "`trl.use_vllm` with `use_onebitllms`: this TRL pushes weights in a way that is not known here, and vLLM "
    "would generate from the latents. Set it to false"
)


def dense_ternary(weight: Tensor) -> Tensor:
    """``codes / s`` of latents (rows, columns), in their own dtype and on their device."""
    codes, s, _ = ops.ternarize(weight.detach())
    return dequantize(codes, s, weight.dtype)


def push_dense_ternary(generation: Any, policy: nn.Module) -> None:
    """Make every weight sync of a TRL ``VLLMGeneration`` push dense ternary weights, on this instance only.

    Raises:
        RuntimeError: here, if this TRL pushes weights in a way that is not known, or reloads the base's
            latents after the push; on a sync that missed a ternary weight, before anything is generated.
    """
    known = ("enable_sleep_mode", "sync_weights")
    if any(not hasattr(generation, name) for name in known):
        raise RuntimeError(_UNKNOWN)
    names = {
        f"{clean_name(name)}.weight"
        for name, module in policy.named_modules()
        if isinstance(module, BitLinear)
    }
    if generation.enable_sleep_mode and not hasattr(generation, "_llm_weights_sleeping"):
        raise RuntimeError(
            "`trl.vllm_enable_sleep_mode` with `use_onebitllms`: this TRL wakes vLLM up with the base's "
            "weights from disk, after the trained ones were pushed. Set it to false, or use TRL 1.14 or later"
        )
    pushed: set[str] = set()

    def as_pushed(name: str, value: Tensor) -> Tensor:
        if name not in names:
            return value
        pushed.add(name)
        return dense_ternary(value)

    # Axolotl 0.19 replaces sync_weights on the class by one that reads the parameters past every method
    sync = MethodType(inspect.unwrap(type(generation).sync_weights), generation)
    if hasattr(generation, "_iter_named_params"):  # TRL 1.14
        walk = generation._iter_named_params

        def iterate() -> Iterator[tuple[str, Tensor]]:
            for name, value in walk():
                yield name, as_pushed(name, value)

        generation._iter_named_params = iterate
    elif hasattr(generation, "_push_param_to_vllm"):  # TRL 1.9
        push = generation._push_param_to_vllm
        generation._push_param_to_vllm = lambda name, value: push(name, as_pushed(name, value))
    else:
        raise RuntimeError(_UNKNOWN)

    def sync_weights() -> None:
        pushed.clear()
        sync()
        if passed_by := sorted(names - pushed):
            raise RuntimeError(
                f"{len(passed_by)} ternary weights did not reach vLLM as codes / s (first: {passed_by[0]}): "
                "it would generate from another model than the policy. Please report this configuration"
            )

    generation.sync_weights = sync_weights
