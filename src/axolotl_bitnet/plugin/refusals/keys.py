"""Single keys of Axolotl that cannot be combined with ternary training."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

# Optimizers that build parameter groups of their own and ignore Axolotl's lr_groups.
_OWN_GROUPS = ("muon", "dion", "galore", "apollo", "lomo", "flash_")


def key_refusals(cfg: Mapping[str, Any]) -> list[str]:
    """Single keys that cannot be combined with ternary training."""
    found: list[str] = []
    if cfg.get("adapter"):
        found.append(
            f"`adapter: {cfg['adapter']}` with `use_onebitllms`: an adapter trains dense deltas beside "
            "frozen weights, which cannot be merged into ternary codes. Remove `adapter` for full fine-tuning"
        )
    for key in ("load_in_4bit", "load_in_8bit"):
        if cfg.get(key):
            found.append(
                f"`{key}: true` with `use_onebitllms`: latents must be floating point to be trained. "
                "Set it to false"
            )
    if cfg.get("qat"):
        found.append("`qat` with `use_onebitllms`: both would quantize the same layers. Remove `qat`")
    if cfg.get("fp8"):
        found.append(
            "`fp8: true` with `use_onebitllms`: fp8 would replace the layers that must become ternary. "
            "Remove `fp8`"
        )
    if cfg.get("flash_attn_fuse_mlp"):
        found.append(
            "`flash_attn_fuse_mlp: true` with `use_onebitllms`: the fused MLP reads weights without calling "
            "their layers and would compute them dense. Remove it"
        )
    bitnet = cfg.get("bitnet")
    if isinstance(bitnet, Mapping) and bitnet.get("learning_rate_scope") == "ternary":
        found += _scope_refusals(cfg)
    return found


def _scope_refusals(cfg: Mapping[str, Any]) -> list[str]:
    scope = "`bitnet.learning_rate_scope: ternary`"
    optimizer = str(getattr(cfg.get("optimizer"), "value", cfg.get("optimizer")) or "")
    scheduler = str(getattr(cfg.get("lr_scheduler"), "value", cfg.get("lr_scheduler")) or "")
    found = []
    if any(name in optimizer for name in _OWN_GROUPS):
        found.append(
            f"{scope} with `optimizer: {optimizer}`, which makes its own parameter groups. Use scope `all`"
        )
    if cfg.get("loraplus_lr_ratio"):
        found.append(
            f"{scope} with `loraplus_lr_ratio`: Axolotl allows only one of the two. Remove the ratio"
        )
    if scheduler == "one_cycle":
        found.append(
            f"{scope} with `lr_scheduler: one_cycle`, which gives all groups one rate. Use another scheduler"
        )
    return found
