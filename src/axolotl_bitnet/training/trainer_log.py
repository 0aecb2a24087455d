"""Our figures in the Trainer's log: in its history, and in every logger that it has.

Changes ``Trainer.log`` of transformers (run on 5.16 and 5.20). Without that name these figures are in no log,
and a warning names it. Tests: tests/test_monitor.py, tests/test_upstream_names.py.
"""

from __future__ import annotations

from typing import Any, Protocol

import transformers

from .log import warn


class Source(Protocol):
    def logs(self) -> dict[str, float]:
        """Figures of the last step, by the names they are logged under."""


def log_through(trainer: Any, *sources: Source) -> None:
    """Put figures of ``sources`` into the entries of a transformers Trainer's log that have a training loss.

    Not by a callback's ``on_log``: what that adds is in no history, and only in loggers that come later. Nor
    in entries of their own: trainers take one without a loss for an evaluation.
    """
    log = getattr(trainer, "log", None)
    if not sources:
        return
    if log is None:
        warn(
            f"transformers {transformers.__version__} has no Trainer.log: the figures of the ternary layers "
            "(bitnet/...) are not logged"
        )
        return

    def log_with_figures(logs: dict[str, float], *args: Any, **kwargs: Any) -> None:
        if "loss" in logs:
            for source in sources:
                logs |= source.logs()
        log(logs, *args, **kwargs)

    trainer.log = log_with_figures
