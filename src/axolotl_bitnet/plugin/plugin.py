"""The Axolotl plugin: hooks only, in the order in which Axolotl calls them.

It does nothing without ``use_onebitllms: true``: Axolotl 0.21 loads it in every run. Axolotl's core has a
path of its own for that key, taken right after the weights are loaded; the key is hidden from it between two
hooks.
"""

from __future__ import annotations

import os
from functools import partial
from pathlib import Path
from typing import Any

import torch
from axolotl.integrations.base import BasePlugin

from ..formats.recognize import recognize
from ..formats.unplaced import note_of
from ..model.convert import convert_to_bitlinear
from ..model.entry import CONFIG_KEY
from ..model.fingerprint import Fingerprint, fingerprint_model
from ..model.preflight import preflight
from ..storage.atomic import CheckpointError
from ..storage.safetensors_stream import CheckpointReader
from ..ternary import DEFINITION
from ..training.checkpoint_once import CheckpointOnce
from ..training.keep_weight_codes import KeepWeightCodes
from ..training.latents import match_reference, restore_low_bits, ternary_name_patterns, upcast_trainable
from ..training.log import info, is_main_process, warn
from ..training.rounding import seed_the_rounding
from ..training.trainer_epoch import resume_epochs
from ..training.trainer_loss import filter_losses
from ..training.trainer_save import forget_before_saving
from .args import BitNetConfig
from .artifacts import refuse_taken, set_aside
from .base_model import check_base, holds_latents, local_folder, lost_head, unplaced_tensors
from .callbacks import compiling, gathering, watch
from .finish import export_run
from .hub import Repository, repository_of
from .refusals import launch_refusal, rounds_stochastically
from .resume import (
    TernaryRun,
    refuse_other_layers,
    refuse_other_run,
    refuse_ternary_checkpoint,
    settings_of,
    settle,
)
from .run_log import RunLog, given, report_run
from .teacher import check_teacher, start_of
from .upstream.fsdp2_offload import connect_for_offload
from .upstream.save_once import save_once
from .upstream.sdpa_varlen import ask_ahead, ask_once_a_batch
from .upstream.trl_reference import refuse_dense_judges, refuse_dense_reference, settle_reference
from .upstream.trl_reference_cache import key_precomputed_references
from .upstream.trl_rollouts import roll_out_packed
from .upstream.trl_vllm import push_dense_ternary

_TERNARY = ("latents", "dense")
"""Kinds of base that were trained ternary, by their config."""


class BitNetPlugin(BasePlugin):
    """Ternary (1.58-bit) full fine-tuning for Axolotl."""

    def __init__(self) -> None:
        super().__init__()
        self._trained: Fingerprint | None = None
        self._reference: torch.nn.Module | None = None  # between its loading and post_trainer_create
        self._resumed: Path | None = None
        self._repository: Repository | None = None
        self._config: dict[str, Any] = {}
        self._settings: dict[str, Any] = {}

    def register(self, cfg: Any) -> None:
        self._config = given(cfg)  # later hooks see defaults, and rates multiplied

    def get_input_args(self) -> str:
        return "axolotl_bitnet.plugin.args.BitNetArgs"

    def load_datasets(self, cfg: Any, preprocess: bool = False) -> None:
        """Loads none: it is the last hook before Axolotl connects the processes."""
        if not cfg.use_onebitllms or preprocess:
            return
        if problem := launch_refusal(cfg, os.environ):
            raise ValueError(problem)
        connect_for_offload(cfg)
        if cfg.sample_packing and (missing := ask_once_a_batch()):
            info("%s: missing, so attention to packed rows waits for the GPU in every layer", missing)

    def pre_model_load(self, cfg: Any) -> None:
        if not cfg.use_onebitllms:
            refuse_ternary_checkpoint(cfg)
            if holds_latents(cfg):
                warn(
                    f"{cfg.base_model} holds the latents of a ternary model, and this config computes them "
                    "as a dense one, with other answers. Add `use_onebitllms: true`, unless that is intended"
                )
            return
        options = _options(cfg)
        check_base(cfg, options.skip_modules, options.export)
        check_teacher(cfg, options)
        if warning := lost_head(cfg):
            warn(warning)
        refuse_taken(cfg.output_dir, options.export)
        self._resumed, warning = settle(cfg)
        if warning:
            warn(warning)
        if self._resumed is not None:
            refuse_other_run(self._resumed, options, rounds_stochastically(cfg))
        if _sharded(cfg):
            # Merging a sharded final save takes the last checkpoint's weights, if there is one, in bfloat16.
            cfg.fsdp_config.final_state_dict_type = cfg.fsdp_config.final_state_dict_type or "FULL_STATE_DICT"
        cfg.use_onebitllms = None
        cfg.bitnet_hidden = True

    def post_model_build(self, cfg: Any, model: torch.nn.Module) -> None:
        if not cfg.bitnet_hidden:
            return
        cfg.bitnet_hidden = None
        cfg.use_onebitllms = True
        config: Any = model.config
        was_dense = not cfg.reinit_weights and recognize(config.to_dict()).kind not in _TERNARY
        options = _options(cfg)
        names = convert_to_bitlinear(model, options.skip_modules, options.fuse, options.backward)
        if self._resumed is not None:
            refuse_other_layers(self._resumed, names, DEFINITION)
        found = preflight(model, names) if _holds_weights(cfg) else None
        if found is None or cfg.bitnet_rate_applied:  # a reference model: the same base, already reported
            return
        info("%d linear layers are ternary; the output head stays dense", len(names))
        if found.rescaled:
            info(
                "the base was dense ternary: %d matrices re-scaled to keep their codes and scales",
                len(found.rescaled),
            )
        for warning in found.warnings(was_dense):
            warn(warning)

    def post_model_load(self, cfg: Any, model: torch.nn.Module) -> None:
        if not cfg.use_onebitllms or cfg.learning_rate is None:
            return
        self._reference = model if cfg.bitnet_rate_applied else None
        if cfg.bitnet_rate_applied:  # preference methods load a second model
            return
        cfg.bitnet_rate_applied = True
        options = _options(cfg)
        base, multiplier = float(cfg.learning_rate), options.learning_rate_multiplier
        effective = base * multiplier
        if options.learning_rate_scope == "all":
            cfg.learning_rate = effective
            reach = "all parameters"
        else:
            group = {"name": "ternary", "modules": ternary_name_patterns(model), "lr": effective}
            cfg.lr_groups = [*(cfg.lr_groups or []), group]
            reach = f"BitLinear weights; everything else {base:g}"
        info("learning rate: base %g x multiplier %g = effective %g (%s)", base, multiplier, effective, reach)

    def add_callbacks_pre_trainer(self, cfg: Any, model: torch.nn.Module) -> list[Any]:
        if not cfg.use_onebitllms:
            return []
        if cfg.precompute_ref_log_probs:  # TRL does so while it makes the trainer
            key_precomputed_references()
            if not cfg.fsdp_config:  # Axolotl casts both models back there
                self._prepare_latents(cfg, model, self._reference)
        base = local_folder(cfg)
        entry = getattr(model.config, CONFIG_KEY)
        self._settings = settings_of(_options(cfg), entry, rounds_stochastically(cfg))
        if _options(cfg).start == "stretch":
            self._settings["stretch"] = start_of(cfg, self._resumed)
        unplaced = unplaced_tensors(cfg)  # the base is on this machine by now
        if warning := note_of(unplaced):
            warn(warning)
        return [TernaryRun(self._settings, str(base) if base else None), RunLog(self._config, unplaced)]

    def add_callbacks_post_trainer(self, cfg: Any, trainer: Any) -> list[Any]:
        if not cfg.use_onebitllms:
            return []
        if cfg.rl and self._reference is None:  # where Axolotl trains, it has loaded one by now
            refuse_dense_reference(cfg, trainer)
        callbacks = watch(cfg, trainer, _options(cfg), self._resumed, self._settings)
        if cfg.deepspeed:
            return callbacks
        callbacks += compiling(cfg, trainer, callbacks)
        if cfg.fsdp_config:  # a ramp ends before codes are gathered
            callbacks = [CheckpointOnce(), *callbacks, KeepWeightCodes(whole=False)]
            return callbacks + gathering(cfg, trainer, _options(cfg).gather)
        rereads = (cfg.gradient_accumulation_steps or 1) > 1 or bool(cfg.gradient_checkpointing)
        compiled = bool(cfg.torch_compile) and cfg.torch_compile_mode in (None, "default")
        return callbacks + ([KeepWeightCodes(compiled=compiled)] if rereads else [])

    def post_trainer_create(self, cfg: Any, trainer: Any) -> None:
        if not cfg.use_onebitllms:
            return
        self._trained = None
        self._repository = repository_of(trainer)
        if self._repository is not None:  # else pushes in the course of training would take them along
            set_aside(cfg.output_dir, weights=False)
        forget_before_saving(trainer)
        filter_losses(trainer)
        if cfg.sample_packing:
            ask_ahead(trainer)
        if self._resumed is not None:
            resume_epochs(trainer)
        if rounds_stochastically(cfg):
            seed_the_rounding(trainer)
        loaded, self._reference = self._reference, None
        reference = settle_reference(trainer, loaded)
        refuse_dense_judges(trainer)
        if getattr(trainer, "use_vllm", False):
            push_dense_ternary(getattr(trainer, "vllm_generation", None), trainer.model)
        roll_out_packed(trainer)
        self._prepare_latents(cfg, trainer.model, reference)

    def _prepare_latents(self, cfg: Any, policy: torch.nn.Module, reference: torch.nn.Module | None) -> None:
        if _options(cfg).latent_dtype != "float32" or cfg.deepspeed:  # DeepSpeed keeps float32 masters itself
            return
        upcast = upcast_trainable(policy)
        loaded_as = cfg.torch_dtype
        if loaded_as is not None and loaded_as != torch.float32 and _holds_weights(cfg):
            restored = restore_low_bits(policy, _stored_float32(cfg), loaded_as)
            if restored:
                info("read the full float32 values of %d tensors from the base", restored)
        if upcast:
            info(
                "latents are float32: %.1f GiB more than bfloat16, gradients and optimizer state likewise",
                upcast * 2 / 2**30,
            )
        if reference is not None and not cfg.fsdp_config:  # FSDP2 computes both in its own dtype
            match_reference(policy, reference)

    def post_train(self, cfg: Any, model: torch.nn.Module) -> None:
        """Called twice: before the final save, with all ranks alive, and after it, with the group gone."""
        if not cfg.use_onebitllms:
            return
        if self._trained is None:
            self._trained = fingerprint_model(model)
            if is_main_process() and (names := set_aside(cfg.output_dir)):
                info("a previous run's %s in %s will be replaced", ", ".join(names), cfg.output_dir)
            _barrier()  # a stale index would keep other ranks from merging
            if save_once(cfg):
                set_aside(cfg.output_dir)  # on a disk of the node's own, they would pass for this run's
            _barrier()
            return
        trained, self._trained = self._trained, None
        if is_main_process():
            try:
                export_run(Path(cfg.output_dir), trained, _options(cfg), self._repository)
            finally:
                report_run(cfg.output_dir)


def _options(cfg: Any) -> BitNetConfig:
    return BitNetConfig(**(cfg.bitnet or {}))


def _sharded(cfg: Any) -> bool:
    return bool(cfg.fsdp_config) and cfg.fsdp_config.state_dict_type == "SHARDED_STATE_DICT"


def _holds_weights(cfg: Any) -> bool:
    """Whether this process has the base's weights; with cpu_ram_efficient_loading a node's first one does."""
    efficient = bool(cfg.fsdp_config) and bool(cfg.fsdp_config.cpu_ram_efficient_loading)
    return not efficient or int(os.environ.get("LOCAL_RANK", "0")) == 0


def _stored_float32(cfg: Any) -> dict[str, Any]:
    """Readers of the base's float32 tensors, by parameter name."""
    folder = local_folder(cfg)
    if folder is None:
        return {}
    try:
        reader = CheckpointReader(folder)
    except CheckpointError:
        return {}  # no safetensors: random weights, or files that are not read
    wanted = [entry.name for entry in reader.entries.values() if entry.dtype == torch.float32]
    return {name: partial(reader.tensor, name) for name in wanted}


def _barrier() -> None:
    if torch.distributed.is_initialized():
        torch.distributed.barrier()
