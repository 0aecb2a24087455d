"""One run with Axolotl's kd plugin, in a process of its own: plugins extend the training arguments only
before these are first imported.

``python -m support.distilling CONFIG.json RESULT.json BATCH.safetensors``"""

from __future__ import annotations

import json
import sys
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import save_file

from support.runs import train


def main(settings: str, result: str, first_batch: str) -> None:
    from axolotl.integrations.kd.trainer import AxolotlKDTrainer

    torch._dynamo.config.disable = True  # the plugin compiles its loss, which takes longer than the run
    compute_loss = AxolotlKDTrainer.compute_loss

    def watched(self: Any, model: Any, inputs: Any, *args: Any, **kwargs: Any) -> Any:
        if not Path(first_batch).exists():
            save_file({name: tensor.contiguous() for name, tensor in inputs.items()}, first_batch)
        return compute_loss(self, model, inputs, *args, **kwargs)

    AxolotlKDTrainer.compute_loss = watched
    run = train(json.loads(Path(settings).read_text(encoding="utf-8")))
    summary = {"losses": run.losses, "trainer": type(run.trainer).__name__}
    Path(result).write_text(json.dumps(summary), encoding="utf-8")


if __name__ == "__main__":
    main(*sys.argv[1:])
