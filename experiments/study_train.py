"""One run of the study: a model, a task, a setting; losses, flips, memory.

A plain loop that does what Axolotl's does on one GPU with ``bf16: true``: forward and backward under bfloat16
autocast, gradients clipped at norm 1, AdamW (0.9, 0.95) without decay of norms, 5 % warmup and half a cosine.
Codes are compared every 20 steps.
"""

from __future__ import annotations

import copy
import gc
import math
import time
from collections.abc import Callable
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import load_file, save_file
from study_data import Batches
from study_step import DEVICE, Flat, Step, dpo_loss, lm_loss, plain_token_losses
from torch import Tensor, nn

from axolotl_bitnet import BitLinear, convert_to_bitlinear, ops
from axolotl_bitnet.layers.products import Backward

MODES = ("eager", "compile", "graph", "compile+graph")
LOG_EVERY = 20


@dataclass(frozen=True)
class Setting:
    """What a run varies. Its fields are the first columns of the results."""

    task: str = "lm"  # lm | sft | dpo
    model: str = "ternary"  # ternary | dense
    start: str = "base"  # base: the model as downloaded | trained: after the best run of `lm`
    latents: str = "float32"  # float32 | bfloat16 | bfloat16-sr (stochastic rounding)
    optimizer: str = "adamw"  # adamw | adamw-8bit
    lr: float = 5e-4
    scope: str = "all"  # all | ternary: everything else at a tenth of the rate
    weight_decay: float = 0.01
    ramp: float = 0.0  # share of the steps
    seed: int = 1
    steps: int = 400


def make_optimizer(flat: Flat, setting: Setting) -> torch.optim.Optimizer:
    """Groups carry ``base_lr``, which the schedule multiplies."""
    groups = []
    for kind, tensor in flat.tensors.items():
        reached = setting.scope == "all" or kind == "ternary"
        decay = 0.0 if kind == "vectors" else setting.weight_decay
        lr = setting.lr if reached else setting.lr / 10
        groups.append(dict(params=[tensor], lr=lr, base_lr=lr, weight_decay=decay, kind=kind))
    betas = (0.9, 0.95)
    if setting.latents == "bfloat16-sr" and setting.optimizer == "adamw-8bit":
        from axolotl_bitnet.training.rounding import seeded_adamw

        options = dict(lr=setting.lr, betas=betas, bf16_stochastic_round=True, seed=setting.seed)
        return seeded_adamw()(groups, **options)  # what the recipes' low-memory block trains with
    if setting.latents == "bfloat16-sr":
        from torchao.optim import _AdamW

        return _AdamW(groups, lr=setting.lr, betas=betas, bf16_stochastic_round=True)
    if setting.optimizer == "adamw-8bit":
        import bitsandbytes as bnb

        manager = bnb.optim.GlobalOptimManager.get_instance()
        manager.initialize()
        for kind, tensor in flat.tensors.items():  # embeddings in 32 bits, as the Trainer has them
            if kind != "ternary":
                manager.override_config(tensor, "optim_bits", 32)
        manager.register_parameters(groups)
        return bnb.optim.AdamW8bit(groups, lr=setting.lr, betas=betas)
    return torch.optim.AdamW(groups, lr=setting.lr, betas=betas, fused=True)


def set_rate(optimizer: torch.optim.Optimizer, step: int, steps: int) -> None:
    """5 % warmup, then half a cosine to zero. ``step`` counts from 0."""
    warmup = max(1, steps // 20)
    done = max(0.0, (step - warmup) / max(1, steps - warmup))
    factor = (step + 1) / warmup if step < warmup else 0.5 * (1 + math.cos(math.pi * done))
    for group in optimizer.param_groups:
        lr = group["base_lr"] * factor
        if isinstance(group["lr"], Tensor):
            group["lr"].fill_(lr)
        else:
            group["lr"] = lr


@torch.no_grad()
def codes_of(model: nn.Module) -> Tensor | None:
    """All ternary codes, int8 and flat."""
    layers = [module for module in model.modules() if isinstance(module, BitLinear)]
    return torch.cat([ops.ternarize(layer.weight)[0].flatten() for layer in layers]) if layers else None


def differing(a: Tensor | None, b: Tensor | None) -> Tensor:
    """Share of codes that differ, NaN without codes."""
    if a is None or b is None:
        return torch.tensor(math.nan)
    return torch.count_nonzero(a != b) / a.numel()


@torch.no_grad()
def evaluate(loss: Callable[..., Any], model: Any, reference: Any, batches: Batches) -> dict[str, float]:
    losses, weights = [], []
    for ids, labels in batches.held_out:
        with torch.autocast(DEVICE, torch.bfloat16, enabled=DEVICE == "cuda"):
            value, weight = loss(model, reference, ids.to(DEVICE), labels.to(DEVICE))
        losses.append(value)
        weights.append(weight)
    if reference is None:
        total = torch.stack(weights).double()
        return {"eval_loss": float((torch.stack(losses).double() * total).sum() / total.sum())}
    margins = torch.cat(weights)
    return {
        "eval_loss": float(torch.stack(losses).mean()),
        "margin": float(margins.mean()),
        "accuracy": float((margins > 0).double().mean()),
    }


def set_lambda(model: nn.Module, setting: Setting, step: int) -> float:
    """lambda of the quantization ramp: linear over the first ``ramp`` of the steps, then 1."""
    if not setting.ramp:
        return 1.0
    from axolotl_bitnet.training.ramp import set_ramp

    value = min(1.0, step / (setting.ramp * setting.steps))
    set_ramp(model, value)
    return value


def train(
    base: Any,
    setting: Setting,
    batches: Batches,
    mode: str,
    start: Path | None,
    save: Path | None,
    backward: Backward = "bf16",
) -> tuple[dict[str, Any], list[dict[str, Any]]]:
    """Run one setting.

    Args:
        base: the model as downloaded, on the CPU; it is copied.
        start: flat latents to start from, or None for ``base``.
        save: file for the trained latents, or None.
        backward: precision of the backward's products.

    Returns:
        The row of results, and the rows of its curve.
    """
    began = time.monotonic()
    _clear()
    torch.manual_seed(setting.seed)  # of stochastic rounding
    model = copy.deepcopy(base).to(DEVICE)
    if setting.model == "ternary":
        convert_to_bitlinear(model, backward=backward)
    flat = Flat(model, torch.float32 if setting.latents == "float32" else torch.bfloat16)
    if start is not None:
        stored = load_file(start)
        for kind, tensor in flat.tensors.items():
            tensor.data.copy_(stored[kind])
    reference = copy.deepcopy(model).requires_grad_(False) if setting.task == "dpo" else None
    token_losses = (
        torch.compile(plain_token_losses, dynamic=False) if "compile" in mode else plain_token_losses
    )
    loss = partial(dpo_loss if setting.task == "dpo" else lm_loss, token_losses)
    if "compile" in mode:
        for layer in [*model.model.layers, *(reference.model.layers if reference else [])]:
            layer.compile()
    optimizer = make_optimizer(flat, setting)
    ids, labels = (part.to(DEVICE) for part in batches.draw(setting.steps, setting.seed))
    before = evaluate(loss, model, reference, batches)["eval_loss"] if setting.task != "lm" else math.nan
    first = last = codes_of(model)
    quarter, quarter_at = first, setting.steps * 3 // 4
    step_of, curve, losses, spent = Step(loss, model, reference, flat), [], [], 0.0
    captured: bool | None = None  # whether on the ramp
    clock = time.monotonic()
    for step in range(setting.steps):
        ramp = set_lambda(model, setting, step)
        if (
            "graph" in mode and DEVICE == "cuda" and captured is not (ramp < 1)
        ):  # the layers change paths at 1
            step_of.capture(ids[step], labels[step])
            captured = ramp < 1
            clock += step_of.captured_in
        set_rate(optimizer, step, setting.steps)
        losses.append(step_of(ids[step], labels[step]).clone())
        optimizer.step()
        if step + 1 == quarter_at:
            quarter = codes_of(model)
        if (step + 1) % LOG_EVERY == 0 or step + 1 == setting.steps:
            recent = float(torch.stack(losses[-LOG_EVERY:]).mean())  # waits for the GPU
            spent += time.monotonic() - clock
            codes = codes_of(model)
            row = {
                "step": step + 1,
                "loss": recent,
                "lambda": ramp,
                "flips_start": float(differing(codes, first)),
            }
            curve.append(row | {"flips_last": float(differing(codes, last))})
            last = codes
            if not math.isfinite(recent):
                break
            clock = time.monotonic()
    after = evaluate(loss, model, reference, batches)
    if save is not None:
        save_file({kind: tensor.detach() for kind, tensor in flat.tensors.items()}, save)
    states = [value for state in optimizer.state.values() for value in state.values()]
    state_bytes = sum(_bytes(value) for value in states if isinstance(value, Tensor) and value.numel() > 1)
    state_bytes += sum(2 * _bytes(tensor) for tensor in flat.tensors.values())
    peak = torch.cuda.max_memory_allocated() if DEVICE == "cuda" else 0
    result = {
        "loss": curve[-1]["loss"],
        "eval_before": before,
        **after,
        "flips_start": float(differing(last, first)),
        "flips_quarter": float(differing(last, quarter)),
        "zeros": float(1 - torch.count_nonzero(last) / last.numel()) if last is not None else math.nan,
        "state_gib": state_bytes / 2**30,
        "peak_gib": peak / 2**30,
        "ms_step": 1000 * spent / len(losses),
        "seconds": time.monotonic() - began,
    }
    return result, curve


def _bytes(tensor: Tensor) -> int:
    if hasattr(tensor, "codes"):  # torchao's 8-bit state
        return tensor.codes.nbytes + tensor.scale.nbytes
    return tensor.nbytes


def _clear() -> None:
    torch._dynamo.reset()  # a model of other dtypes would soon exceed its limit of variants
    gc.collect()
    if DEVICE == "cuda":
        torch.cuda.empty_cache()
        torch.cuda.reset_peak_memory_stats()
