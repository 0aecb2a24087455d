"""What a config will do, before anything is loaded: refusals, rates, layers, memory, artifacts' sizes.

Reads the YAML and the base's config.json. Imports neither Axolotl nor torch (unless GGUF or MLX is exported)
nor pydantic (if the `bitnet:` block is plainly right), so that it answers at once. The rules are those that
Axolotl runs (:mod:`axolotl_bitnet.plugin.refusals`), the rest is arithmetic.
"""

from __future__ import annotations

import json
import math
import os
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from ..formats.registry import FORMATS
from ..formats.sizes import artifact_bytes
from ..model.memory import Memory, Settings, moment_bytes, step_memory
from ..model.outline import Outline, UnknownShape, outline_of
from .refusals import fsdp_refusals, refusals
from .refusals.base import base_refusals, export_refusals

GPUS = (1, 2, 4, 8)
_PAIRS = ("dpo", "ipo", "orpo", "simpo")
_REFERENCE = ("dpo", "ipo", "kto")
_NO_LOGITS = ("cut_cross_entropy", "liger_fused_linear_cross_entropy")
"""Keys of losses that never have all logits in memory."""


def _one_of(*values: str) -> Callable[[Any], bool]:
    return lambda value: value in values


def _words(value: Any) -> bool:
    return isinstance(value, list) and all(isinstance(word, str) for word in value)


def _positive(value: Any) -> bool:
    return isinstance(value, int | float) and 0 < value < math.inf


_PLAIN: dict[str, Callable[[Any], bool]] = {
    "learning_rate_multiplier": _positive,
    "learning_rate_scope": _one_of("all", "ternary"),
    "latent_dtype": _one_of("float32", "bfloat16"),
    "skip_modules": _words,
    "backward": _one_of("bf16", "int8_dx", "int8"),
    "ramp_steps": lambda value: isinstance(value, int) and value >= 0,
    "teacher": lambda value: isinstance(value, str) and value != "",
    "teacher_temperature": _positive,
    "teacher_weight": lambda value: _positive(value) and value <= 1,
    "start": _one_of("base", "stretch"),
    "gather": _one_of("auto", "ternary", "native"),
    "export": lambda value: _words(value) and set(value) <= FORMATS.keys(),
    **dict.fromkeys(("fuse", "monitor", "verify"), lambda value: isinstance(value, bool)),
}
"""Values of the `bitnet:` block that are plainly right; pydantic checks all others."""


@dataclass(frozen=True)
class _Options:
    """The keys of the `bitnet:` block that decide something here, with their defaults."""

    learning_rate_multiplier: float = 1.0
    learning_rate_scope: str = "all"
    latent_dtype: str = "float32"
    teacher: str | None = None
    skip_modules: Sequence[str] = ()
    export: Sequence[str] = ("packed",)


@dataclass
class RunPlan:
    """What :func:`plan_run` found.

    Attributes:
        refused: why the run would not start: sentences.
        notes: what could not be planned, and why.
        rates: the effective learning rates, by what they reach.
        tokens: of a micro-batch.
        memory: by the number of GPUs.
        sharding: how weights are spread over several GPUs: "fsdp2" or "ddp".
        artifacts: bytes by name.
    """

    refused: list[str] = field(default_factory=list)
    notes: list[str] = field(default_factory=list)
    rates: dict[str, float] = field(default_factory=dict)
    outline: Outline | None = None
    tokens: int = 0
    sharding: str = ""
    memory: dict[int, Memory] = field(default_factory=dict)
    artifacts: dict[str, int] = field(default_factory=dict)


def plan_run(cfg: Mapping[str, Any], base: Mapping[str, Any] | None, folder: Path | None = None) -> RunPlan:
    """Plan a run.

    Args:
        cfg: Axolotl's config, as its YAML has it.
        base: the base model's config.json; None if there is none to read.
        folder: the base's files, if they are on this machine: the tokenizer decides whether GGUF is refused.
    """
    plan = RunPlan()
    if not cfg.get("use_onebitllms"):
        plan.refused.append("`use_onebitllms: true` is missing: this config trains a dense model. Add it")
        return plan
    plan.refused += refusals(cfg)
    sharded = cfg.get("fsdp_config") or cfg.get("fsdp")
    missing = {"fsdp_version": _fsdp_version()} if sharded and "fsdp_version" not in cfg else {}
    plan.refused += fsdp_refusals({**cfg, **missing})
    block = cfg.get("bitnet") or {}
    if problem := _block_problem(block):
        plan.refused.append(problem)
        return plan
    options = _Options(**{key: block[key] for key in vars(_Options()) if key in block})
    plan.rates = _rates(cfg, options)
    if base is None:
        return plan
    plan.refused += base_refusals(cfg, base)
    if any(name.startswith(("gguf", "mlx")) for name in options.export):  # asking these imports torch
        plan.refused += export_refusals(cfg, base, folder, options.export)
    try:
        outline, problems = outline_of(base, options.skip_modules)
    except UnknownShape as error:
        plan.notes.append(f"layers, memory and sizes are not planned: {error}")
        return plan
    plan.refused += problems
    plan.outline = outline
    if cfg.get("deepspeed"):
        plan.notes.append("memory is not planned under DeepSpeed")
    else:
        settings = settings_of(cfg, options, _frozen(cfg, options, outline, plan.notes))
        plan.tokens, plan.sharding = settings.tokens, settings.sharding
        plan.memory = {gpus: step_memory(outline, settings, gpus) for gpus in GPUS}
    latent = 2 if options.latent_dtype == "bfloat16" else 4
    plan.artifacts = artifact_bytes(outline, options.export, latent)
    return plan


def _frozen(cfg: Mapping[str, Any], options: _Options, outline: Outline, notes: list[str]) -> int:
    """Parameters of the second model: a reference, or a teacher. A note, if its size is not known."""
    if str(cfg.get("rl") or "") in _REFERENCE or options.teacher == "base":
        return outline.parameters
    if options.teacher is None:
        return 0
    shape, where = base_config({"base_model": options.teacher})
    try:
        if shape is None:
            raise UnknownShape(where)
        return outline_of(shape)[0].parameters
    except UnknownShape as error:
        notes.append(f"the teacher's memory is not planned: {error}")
        return 0


def settings_of(cfg: Mapping[str, Any], options: _Options, frozen: int = 0) -> Settings:
    """What decides the memory of a step."""
    method = str(cfg.get("rl") or "")
    rows = int(cfg.get("micro_batch_size") or 1) * (2 if method in _PAIRS else 1)
    sharding = cfg.get("fsdp_config") or {}
    latent = 2 if options.latent_dtype == "bfloat16" else 4
    optimizer = str(cfg.get("optimizer") or "adamw_torch_fused")
    compiled = cfg.get("torch_compile") is True
    loss = "preference" if method in _PAIRS else "compiled" if compiled and not method else "plain"
    if options.teacher or any(cfg.get(key) for key in _NO_LOGITS):
        loss = "chunked"
    return Settings(
        tokens=rows * int(cfg.get("sequence_len") or 512),
        latent_bytes=latent,
        moment_bytes=moment_bytes(optimizer, latent),
        foreach=optimizer == "adamw_torch",
        checkpointing=bool(cfg.get("gradient_checkpointing") or sharding.get("activation_checkpointing")),
        accumulates=int(cfg.get("gradient_accumulation_steps") or 1) > 1,
        sharding="fsdp2" if sharding else "ddp",
        frozen=frozen,
        compiled=compiled,
        loss=loss,
    )


def _block_problem(block: Any) -> str | None:
    """Why the `bitnet:` block is wrong, in the words of its schema."""
    plain = isinstance(block, Mapping) and all(key in _PLAIN and _PLAIN[key](block[key]) for key in block)
    if plain:
        return None
    from .args import BitNetConfig  # pydantic takes half a second

    try:
        BitNetConfig.model_validate(block)
    except ValueError as error:
        return f"`bitnet:` {_short(error)}"
    return None


def _rates(cfg: Mapping[str, Any], options: _Options) -> dict[str, float]:
    """Effective learning rates."""
    if cfg.get("learning_rate") is None:
        return {}
    base = float(cfg["learning_rate"])
    effective = base * options.learning_rate_multiplier
    if options.learning_rate_scope == "all":
        return {"all parameters": effective}
    return {"ternary weights": effective, "everything else": base}


def base_config(cfg: Mapping[str, Any], folder: Path | None = None) -> tuple[dict[str, Any] | None, str]:
    """The base's config.json, and where it was found or why it was not.

    Looks in a folder, in the hub's cache on this machine, then (unless HF_HUB_OFFLINE) on the hub: that one
    file, no weights.
    """
    name = str(cfg.get("base_model") or "")
    for path in [folder or Path(name), *_cached(name, str(cfg.get("revision_of_model") or "main"))]:
        if (path / "config.json").is_file():
            return json.loads((path / "config.json").read_text(encoding="utf-8")), str(path)
    if folder is None and name.count("/") == 1 and os.environ.get("HF_HUB_OFFLINE", "0") in ("", "0"):
        try:
            from huggingface_hub import hf_hub_download

            found = hf_hub_download(name, "config.json", revision=cfg.get("revision_of_model"))
            return json.loads(Path(found).read_text(encoding="utf-8")), found
        except Exception as error:
            return None, f"{name}: {_short(error)}"
    return None, f"{folder or name} is no folder with a config.json, nor in the hub's cache on this machine"


def _cached(name: str, revision: str) -> Sequence[Path]:
    home = Path(os.environ.get("HF_HOME", Path.home() / ".cache" / "huggingface"))
    cache = Path(os.environ.get("HF_HUB_CACHE", home / "hub")) / f"models--{name.replace('/', '--')}"
    reference = cache / "refs" / revision
    commit = reference.read_text(encoding="utf-8").strip() if reference.is_file() else revision
    return [cache / "snapshots" / commit]


def _fsdp_version() -> int:
    """The `fsdp_version` that Axolotl assumes where it is missing."""
    from importlib.metadata import PackageNotFoundError, version

    try:
        major, minor, *_ = version("axolotl").split(".")
    except (PackageNotFoundError, ValueError):
        return 2
    return 2 if (int(major), int(minor)) >= (0, 21) else 1


def _short(error: Exception) -> str:
    return " ".join(str(error).split())[:300]
