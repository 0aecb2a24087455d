"""Watches a run: figures of the codes in the Trainer's log, warnings in plain words, and ``monitor.json``.

:mod:`axolotl_bitnet.training.monitor.figures` measures. The Trainer logs the figures with its loss
(:func:`axolotl_bitnet.training.trainer_log.log_through`), so they are in its history and in every logger that
it has.
"""

from __future__ import annotations

import json
import math
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor
from transformers import TrainerCallback

from ...layers.bitlinear import BitLinear
from ...run_folder import CHECKPOINT, MONITOR_FILE
from ..log import info, is_main_process, warn
from .figures import Observation, observe
from .sampling import Unwatchable
from .start_weight_codes import load_start, save_start

__all__ = ["MONITOR_FILE", "Monitor", "Observation", "observe"]

PATIENCE = 10  # steps without a flip before a warning
NO_FLIPS = 1e-6  # share of all codes
RESTLESS, OF_FLIPS = 1e-4, 0.5  # at least this share flips, at least this share of it flips back
_FINER = (
    "keep latents in float32 (bitnet.latent_dtype), or round bfloat16 ones stochastically (optimizer: "
    "adamw_torch_8bit, optim_args: bf16_stochastic_round=True)"
)
ALL_ZEROS, NO_ZEROS = 0.9, 0.01  # of a layer; normally distributed latents have 0.31


class Monitor(TrainerCallback):
    """Measures the codes whenever the Trainer logs a step.

    Args:
        resumed: the checkpoint that the run continues from, if any: it has the codes of the start.
        precision: dtype that updates are made in, where that is not the latents' own.
    """

    def __init__(self, resumed: Path | None = None, precision: torch.dtype | None = None) -> None:
        self.resumed, self.precision = resumed, precision
        self.seen: Observation | None = None
        self.first_step = 0
        self.warned: set[str] = set()
        self.fresh = False
        self.step_rates: list[Any] | None = None  # the groups' rates in the last step

    def on_train_begin(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        self.first_step, self.fresh = state.global_step, False
        rates = _rates(kwargs.get("optimizer"), "initial_lr", args.learning_rate)
        try:
            seen = observe(kwargs["model"], None, rates, self.precision)
        except Unwatchable as error:
            self.seen = None
            info(f"the monitor is off: {error}")
            return
        if self.resumed is not None:
            seen = observe(kwargs["model"], self._from_the_start(seen, self.resumed), rates, self.precision)
        self.seen = seen
        if rates is not None:
            layers = (module for module in kwargs["model"].modules() if isinstance(module, BitLinear))
            _say_what_can_move(seen, max(rates(layer.weight) for layer in layers))
        self._warn(seen, state.global_step)
        _write(Path(args.output_dir), seen, state.global_step)

    def on_pre_optimizer_step(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        """The schedule sets the next step's rates before a step is logged: 0 after the last one."""
        rates = [group["lr"] for group in _groups(kwargs.get("optimizer"))]
        self.step_rates = [rate.clone() if isinstance(rate, Tensor) else rate for rate in rates]

    def on_step_end(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        if self.seen is None or not control.should_log:
            return
        self._look(args, kwargs)
        self._warn(self.seen, state.global_step)
        self.fresh = True

    def on_save(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        if self.seen is not None:
            folder = Path(args.output_dir) / f"{CHECKPOINT}{state.global_step}"
            if folder.is_dir():
                save_start(folder, self.seen)
            _write(Path(args.output_dir), self.seen, state.global_step)

    def on_train_end(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        if self.seen is not None:
            self._look(args, kwargs)  # maybe not the last step's: the best model's, if that was loaded
            _write(Path(args.output_dir), self.seen, state.global_step)

    def logs(self) -> dict[str, float]:
        """The figures of the last step, if it was measured."""
        if self.seen is None or not self.fresh:
            return {}
        self.fresh = False
        return self.seen.metrics()

    def _look(self, args: Any, kwargs: dict[str, Any]) -> None:
        rates = _rates(kwargs.get("optimizer"), "lr", args.learning_rate, self.step_rates)
        self.seen = observe(kwargs["model"], self.seen, rates, self.precision)

    def _from_the_start(self, seen: Observation, resumed: Path) -> Observation:
        """The first measurement of a resumed model, with the start's codes and scales."""
        found = load_start(resumed, seen)
        missing = torch.tensor(float(found is None), device=seen.codes[0].device)
        if dist.is_available() and dist.is_initialized():
            dist.all_reduce(missing)  # of all ranks or of none
        if found is None or missing:
            info(f"{resumed} has no codes of the run's start: flips are counted from here")
            return seen
        start, scales = found
        layers = {name: replace(view, scale_start=scales[name]) for name, view in seen.layers.items()}
        return replace(seen, layers=layers, start=start)

    def _warn(self, seen: Observation, step: int) -> None:
        flips, total = seen.share("flips"), seen.share("flips_total")
        steps = step - self.first_step
        if steps >= PATIENCE and total < NO_FLIPS:
            frozen = seen.share("frozen")
            why, instead = "", ""
            if not math.isnan(frozen):  # with stochastic rounding every latent can be moved
                why = f", and {frozen:.1%} of the latents cannot be moved at this rate"
                instead = f", or {_FINER}"
            self._once(
                "flips",
                f"nothing is learned in the ternary layers: after {steps} steps {total:.2g} of their codes "
                f"have changed{why}. Raise the learning rate{instead}",
            )
        back = seen.share("oscillation") / flips if flips else 0.0
        if flips >= RESTLESS and back >= OF_FLIPS:
            self._once(
                "oscillation",
                f"the codes swing back and forth: {flips:.2%} flipped since the last log, and {back:.0%} of "
                "these back to what they were one log earlier. Lower the learning rate",
            )
        # preflight has named those that were zero from the start; no rate mends them
        zeros = {name: view.zeros for name, view in seen.layers.items() if not view.was_zero}
        if not zeros:
            return
        few, many = min(zeros, key=zeros.__getitem__), max(zeros, key=zeros.__getitem__)
        if zeros[many] > ALL_ZEROS:
            count = sum(share > ALL_ZEROS for share in zeros.values())
            self._once(
                "zeros",
                f"{count} of {len(zeros)} ternary layers collapse: {zeros[many]:.1%} of the codes of {many} "
                "are zero. A few large latents outweigh the rest of such a matrix: lower the learning rate",
            )
        if zeros[few] < NO_ZEROS:
            count = sum(share < NO_ZEROS for share in zeros.values())
            self._once(
                "no zeros",
                f"{count} of {len(zeros)} ternary layers have (almost) no zeros: {zeros[few]:.1%} of the "
                f"codes of {few}. All latents of such a matrix are of about one size, and it computes as a "
                "binary one: inspect the base model",
            )

    def _once(self, what: str, text: str) -> None:
        if what not in self.warned:
            self.warned.add(what)
            warn(text)


def _say_what_can_move(seen: Observation, rate: float) -> None:
    movable = 1 - seen.share("frozen")
    text = (
        f"at a learning rate of {rate:g}, {movable:.1%} of the ternary weights can move"
        " (an update is about the rate; in the others it is below half a unit in the last place)"
    )
    if movable < 0.5:
        text += f". Raise the rate, or {_FINER}"
    (warn if movable < 0.5 else info)(text)


def _groups(optimizer: Any) -> list[dict[str, Any]]:
    return list(getattr(getattr(optimizer, "optimizer", optimizer), "param_groups", []))


def _rates(optimizer: Any, key: str, otherwise: float, instead: list[Any] | None = None) -> Any:
    """The learning rate of a weight as a function of it; None where updates are not about as large as the
    rate, or are not rounded to nearest. ``instead``: the groups' rates, where not those under ``key``."""
    inner = getattr(optimizer, "optimizer", optimizer)
    kind = type(inner).__name__.lower()
    if "adam" not in kind and "lion" not in kind:
        return None
    groups = _groups(optimizer)
    if getattr(inner, "bf16_stochastic_round", False) or any(
        group.get("kahan_sum", False) is not False for group in groups
    ):
        return None
    rates = instead or [group.get(key, group["lr"]) for group in groups]
    by_weight = {
        id(weight): float(rate)
        for group, rate in zip(groups, rates, strict=True)
        for weight in group["params"]
    }
    highest = max(by_weight.values(), default=float(otherwise))

    def rate_of(weight: Tensor) -> float:
        return by_weight.get(id(weight), highest)  # wrappers give optimizers tensors of their own

    return rate_of


def _write(folder: Path, seen: Observation, step: int) -> None:
    if not is_main_process():
        return
    layers = {
        name: {
            "zeros": _number(view.zeros),
            "scale_start": _number(view.scale_start),
            "scale": _number(view.scale),
            "flips_total": _number(view.flips_total),
        }
        for name, view in seen.layers.items()
    }
    folder.mkdir(parents=True, exist_ok=True)
    work = folder / f".{MONITOR_FILE}"
    work.write_text(json.dumps({"step": step, "layers": layers}, indent=1), encoding="utf-8")
    work.replace(folder / MONITOR_FILE)


def _number(value: float) -> float | None:
    return float(f"{value:.6g}") if math.isfinite(value) else None
