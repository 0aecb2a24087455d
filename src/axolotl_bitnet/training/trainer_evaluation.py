"""Second evaluations. During a ramp: at the lambda that trains and fully ternary, in one entry of the log.

Changes ``Trainer.evaluation_loop`` of transformers (run on 5.16 and 5.20), in runs with a ramp. Without that
name only the loss at the lambda that trains is logged, and a warning names it. Tests: tests/test_ramp_use.py,
tests/test_upstream_names.py.
"""

from __future__ import annotations

import copy
from collections.abc import Callable
from typing import Any

import transformers

from .log import warn
from .ramp import fully_ternary, ramping


def log_ternary_loss(trainer: Any) -> None:
    """Let a transformers Trainer evaluate twice during a ramp: at the lambda that trains (``eval_loss``) and
    fully ternary (``eval_ternary_loss``), in one entry of its log. After the ramp both are the same loss."""
    evaluation_loop = getattr(trainer, "evaluation_loop", None)
    if evaluation_loop is None:
        warn(
            f"transformers {transformers.__version__} has no Trainer.evaluation_loop: while the ramp is "
            "under "
            "way, the loss of the fully ternary model (eval_ternary_loss) is not logged"
        )
        return

    def evaluate_both(*args: Any, **kwargs: Any) -> Any:
        output = evaluation_loop(*args, **kwargs)
        ternary = evaluate_ternary(args, kwargs) if ramping(trainer.model) else output
        prefix = kwargs.get("metric_key_prefix", "eval")
        if (loss := ternary.metrics.get(f"{prefix}_loss")) is not None:
            output.metrics[f"{prefix}_ternary_loss"] = loss
        return output

    def evaluate_ternary(args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
        with fully_ternary(trainer.model):
            return evaluate_apart(trainer, evaluation_loop, args, kwargs)

    trainer.evaluation_loop = evaluate_both


def evaluate_apart(
    trainer: Any, evaluation_loop: Callable[..., Any], args: tuple[Any, ...], kwargs: dict[str, Any]
) -> Any:
    """A second evaluation, of another model than the one that trains, for its loss alone: the figures that
    trainers gather on the way stay those of the first."""
    gathered = [vars(trainer).get(name) for name in ("_metrics", "_stored_metrics")]
    kept = [(held, copy.deepcopy(held["eval"])) for held in gathered if held and "eval" in held]
    output = evaluation_loop(*args, **(kwargs | {"prediction_loss_only": True}))
    for held, figures in kept:
        held["eval"] = figures
    return output
