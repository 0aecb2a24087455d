"""The callback that keeps what the report needs, and the report at the end of a run.

An error in the report is logged, and the run goes on.
"""

from __future__ import annotations

import logging
from collections.abc import Mapping, Sequence
from copy import deepcopy
from pathlib import Path
from typing import Any

from transformers import TrainerCallback

from ..formats.unplaced import KEY
from ..report import ReportError, write_report
from ..report.record import begun, now
from ..run_folder import RUN_LOG
from ..storage.atomic import write_json

LOG = logging.getLogger("axolotl.bitnet")


_BY_THE_COMMAND = {"axolotl_config_path", "debug", "debug_num_examples", "debug_text_only", "shard"}
"""Keys that `axolotl train` adds to every config."""


def given(cfg: Mapping[str, Any]) -> dict[str, Any]:
    """A copy of a config as the user gave it, in its file and on the command line."""
    return {
        key: deepcopy(value) for key, value in cfg.items() if value is not None and key not in _BY_THE_COMMAND
    }


class RunLog(TrainerCallback):
    """Writes ``run.json`` into the output folder: the config and versions as training begins, the log when it
    ends.

    Args:
        config: as the user gave it.
        unplaced: tensors of the base that were not loaded (:mod:`~axolotl_bitnet.formats.unplaced`).
    """

    def __init__(self, config: Mapping[str, Any], unplaced: Sequence[str] = ()) -> None:
        self.config = config
        self.unplaced = list(unplaced)
        self._record: dict[str, Any] = {}

    def on_train_begin(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        self._record = begun(self.config, args.world_size, state.global_step or None)
        self._record[KEY] = self.unplaced
        self._write(args, state)

    def on_train_end(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        self._record |= {"finished": now(), "log": state.log_history}
        self._write(args, state)

    def _write(self, args: Any, state: Any) -> None:
        if not state.is_world_process_zero:
            return
        try:
            Path(args.output_dir).mkdir(parents=True, exist_ok=True)
            write_json(Path(args.output_dir) / RUN_LOG, self._record)
        except (OSError, TypeError, ValueError) as error:
            LOG.warning("%s could not be written, the report will lack it: %s", RUN_LOG, error)


def report_run(output_dir: str | Path) -> None:
    """Write the report of a run that has ended, well or not; log where it is, or why there is none."""
    try:
        LOG.info("report: %s", write_report(output_dir))
    except ReportError as error:
        LOG.warning("no report: %s", error)
    except Exception:
        LOG.warning("no report; the model is not affected", exc_info=True)
