"""Axolotl runs for the tests: a tiny local model, a few steps, on the CPU.

As a program it does one run in a process of its own: ``python -m support.runs CONFIG.json RESULT.json``, and
with ``--hide`` as if this package were not installed.
"""

from __future__ import annotations

import gc
import json
import os
import sys
from collections.abc import Iterator
from contextlib import AbstractContextManager, contextmanager, nullcontext
from dataclasses import dataclass
from pathlib import Path
from typing import Any
from unittest.mock import patch

from support import TINY

PLUGIN = "axolotl_bitnet.BitNetPlugin"


@dataclass
class Run:
    """A finished run: axolotl's trainer, its model, the config as it was in the end."""

    trainer: Any
    model: Any
    cfg: Any

    @property
    def losses(self) -> list[float]:
        return [entry["loss"] for entry in self.trainer.state.log_history if "loss" in entry]

    def logged(self, key: str) -> list[float]:
        return [entry[key] for entry in self.trainer.state.log_history if key in entry]


def config(folder: Path, base: Path, **overrides: Any) -> dict[str, Any]:
    """A supervised run of three steps on the tiny data; None removes a key."""
    settings: dict[str, Any] = {
        "base_model": str(base),
        "plugins": [PLUGIN],
        "use_onebitllms": True,
        "chat_template": "tokenizer_default",
        "datasets": [
            {
                "path": str(TINY / "heldout.jsonl"),
                "ds_type": "json",
                "type": "chat_template",
                "field_messages": "messages",
            }
        ],
        "dataset_prepared_path": str(folder / "prepared"),
        "output_dir": str(folder / "out"),
        "sequence_len": 64,
        "micro_batch_size": 4,
        "gradient_accumulation_steps": 1,
        "max_steps": 3,
        "learning_rate": 1e-3,
        "optimizer": "adamw_torch",
        "lr_scheduler": "constant",
        "bf16": False,
        "fp16": False,
        "tf32": False,
        "logging_steps": 1,
        "save_strategy": "no",
        "dataset_num_proc": 0,  # one starts a pool
        "seed": 7,
    }
    settings |= overrides
    return {key: value for key, value in settings.items() if value is not None}


def preference(folder: Path, base: Path, **overrides: Any) -> dict[str, Any]:
    """A DPO run of three steps on the tiny pairs."""
    pairs = {
        "path": str(TINY / "dpo.jsonl"),
        "ds_type": "json",
        "split": "train",
        "type": "chat_template.default",
        "field_messages": "messages",
    }
    return config(folder, base, **({"rl": "dpo", "datasets": [pairs]} | overrides))


def prepare(settings: dict[str, Any]) -> tuple[Any, Any]:
    """Load a config and its data as `axolotl train` does, which writes the prepared data to disk."""
    from axolotl.cli.config import load_cfg
    from axolotl.common.datasets import load_datasets, load_preference_datasets
    from axolotl.integrations.base import PluginManager
    from axolotl.utils.dict import DictDefault

    cfg = load_cfg(DictDefault(settings))
    with data_saved_in_this_process():
        PluginManager.get_instance().load_datasets(cfg, preprocess=False)
        return cfg, load_preference_datasets(cfg=cfg) if cfg.rl else load_datasets(cfg=cfg)


@contextmanager
def data_saved_in_this_process() -> Iterator[None]:
    """Axolotl saves prepared data from a pool, even of one; its processes import `datasets` anew: seconds."""
    from datasets import Dataset

    save = Dataset.save_to_disk

    def alone(dataset: Any, path: str, num_proc: int | None = None, **options: Any) -> None:
        save(dataset, path, **options)

    with patch.object(Dataset, "save_to_disk", alone):
        yield


def _no_report() -> AbstractContextManager[Any]:
    from axolotl_bitnet.plugin import run_log

    return patch.object(run_log, "write_report", lambda _: "not drawn")


def train(settings: dict[str, Any], report: bool = False) -> Run:
    """Do what `axolotl train` does, in this process; its report is drawn (seconds) only where asked for."""
    from axolotl.train import train as axolotl_train

    # Axolotl collects garbage all the time, which takes longer than a step.
    with patch.object(gc, "collect", return_value=0), nullcontext() if report else _no_report():
        try:
            cfg, data = prepare(settings)
            model, _, trainer = axolotl_train(cfg=cfg, dataset_meta=data)
        finally:
            _forget_compiling()
    return Run(trainer, model, cfg)


def _forget_compiling() -> None:
    """With `torch_compile` Axolotl sets variables of the environment for good, and Accelerate remembers."""
    if set_for_good := [name for name in os.environ if name.startswith("ACCELERATE_DYNAMO_")]:
        from accelerate.state import AcceleratorState

        for name in set_for_good:
            del os.environ[name]
        AcceleratorState._reset_state()


def _hide_this_package() -> None:
    """Make the entry points of this package invisible, as if it were not installed."""
    import importlib.metadata as metadata

    original = metadata.entry_points

    def without(**select: Any) -> Any:
        found = original(**select)
        if not select:  # all groups at once, as another type
            return found
        return metadata.EntryPoints(point for point in found if not point.value.startswith("axolotl_bitnet"))

    metadata.entry_points = without


def main(settings: str, result: str, *flags: str) -> None:
    import hashlib

    if "--hide" in flags:
        _hide_this_package()
    run = train(json.loads(Path(settings).read_text()), report="--hide" in flags)  # a dense run has none
    weights = hashlib.sha256()
    for name, tensor in sorted(run.model.state_dict().items()):
        weights.update(name.encode() + tensor.detach().cpu().contiguous().float().numpy().tobytes())
    modules = sorted(name for name in sys.modules if name.split(".")[0] in ("axolotl_bitnet", "onebitllms"))
    summary = {"losses": run.losses, "weights": weights.hexdigest(), "modules": modules}
    Path(result).write_text(json.dumps(summary))


if __name__ == "__main__":
    main(*sys.argv[1:])
