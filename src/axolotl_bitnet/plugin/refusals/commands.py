"""Axolotl's other commands on a ternary config: what each would do to the latents, and what to run instead.

`train`, `preprocess`, `inference`, `evaluate` and `merge-sharded-fsdp-weights` do the right thing. The others
load the saved latents without the plugin, as a dense model. The config does not hold which command reads it;
click's context does, for every command but those started by a launcher.
"""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

import click

from ...run_folder import PACKED

_INSTEAD = "`axolotl-bitnet pack {out} {packed}` makes the 2-bit model"


_REFUSED = {
    "quantize": "it would quantize the dense latents, which are not the model that trained. " + _INSTEAD,
    "merge-lora": "full fine-tuning has no adapter to merge; the latents are in {out}. " + _INSTEAD,
    "export": "it would convert the latents as a dense model, which is not the one that trained. "
    + _INSTEAD
    + "; `axolotl-bitnet --help` lists the other formats",
    "vllm-serve": "it would serve the base's latents as a dense model. " + _INSTEAD + ", for transformers",
}


_BLOCKS = {"quantization": "quantize", "merge_lora": "merge-lora"}
"""Keys that one of these commands alone reads, or sets: they identify it from Python too, without click."""


def command_refusals(cfg: Mapping[str, Any]) -> list[str]:
    """Why the command that reads this ternary config cannot do its work: sentences, empty when it can."""
    out = str(cfg.get("output_dir") or "OUTPUT_DIR")
    packed = str(Path(out) / PACKED)
    context = click.get_current_context(silent=True)
    asked = [context.info_name] if context is not None and context.info_name in _REFUSED else []
    if (cfg.get("trl") or {}).get("use_vllm"):  # for rollouts: training pushes its weights before the first
        asked = [command for command in asked if command != "vllm-serve"]
    asked += [command for key, command in _BLOCKS.items() if cfg.get(key)]
    found = [
        f"`axolotl {command}` with `use_onebitllms`: {_REFUSED[str(command)].format(out=out, packed=packed)}"
        for command in dict.fromkeys(asked)
    ]
    dense = (None, "", cfg.get("output_dir"), cfg.get("hub_model_id"))
    if cfg.get("lm_eval_tasks") and cfg.get("lm_eval_model") in dense:
        found.append(
            "`lm_eval_tasks` with `use_onebitllms`: `axolotl lm-eval` reads this file without the plugin and "
            f"would score the latents as a dense model. Add `lm_eval_model: {packed}`"
        )
    return found
