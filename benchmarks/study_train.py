"""One run of the study: a model, a task, a setting; losses, flips, memory.

A plain loop that does what Axolotl's does on one GPU with ``bf16: true``: forward and backward under bfloat16
autocast, gradients clipped at norm 1, AdamW (0.9, 0.95) without decay of norms, 5 % warmup and half a cosine.
So small a model is bound by the CPU's launches. So forward and backward are captured in a CUDA graph
(``mode``), and the parameters lie in three flat tensors, which optimizers take in a launch or two each; all
matrices are multiples of 256, so an 8-bit optimizer's blocks are what they are for single matrices.
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
import torch.nn.functional as F
from safetensors.torch import load_file, save_file
from study_data import IGNORED, Batches
from torch import Tensor, nn

from axolotl_bitnet import BitLinear, convert_to_bitlinear, ops

DEVICE = "cuda" if torch.cuda.is_available() else "cpu"
MODES = ("eager", "compile", "graph", "compile+graph")
LOG_EVERY = 20
_BETA = 0.1  # of DPO
Losses = Callable[[Tensor, Tensor], Tensor]


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


class _Embedding(torch.autograd.Function):
    """As F.embedding, whose backward asks the GPU for a count and cannot be captured."""

    @staticmethod
    def forward(ctx: Any, ids: Tensor, weight: Tensor) -> Tensor:
        ctx.save_for_backward(ids)
        ctx.like = weight.shape, weight.dtype
        return weight[ids]

    @staticmethod
    def backward(ctx: Any, dy: Tensor) -> tuple[None, Tensor]:
        (ids,), (shape, dtype) = ctx.saved_tensors, ctx.like
        dw = torch.zeros(shape, dtype=torch.float32, device=dy.device)
        return None, dw.index_add_(0, ids.flatten(), dy.flatten(0, -2).float()).to(dtype)


def logits_of(model: Any, ids: Tensor) -> Tensor:
    """As the model's forward, which looks at positions on the CPU. Causal, no mask: padding is last."""
    hidden = _Embedding.apply(ids, model.model.embed_tokens.weight)
    positions = torch.arange(ids.shape[1], device=ids.device)[None]
    rotary = model.model.rotary_emb(hidden, positions)
    for layer in model.model.layers:
        hidden = layer(hidden, position_embeddings=rotary, attention_mask=None)
    return model.lm_head(model.model.norm(hidden))


def _token_losses(logits: Tensor, labels: Tensor) -> Tensor:
    losses = F.cross_entropy(logits.flatten(0, 1).float(), labels.flatten(), reduction="none")
    return losses.view(labels.shape)  # 0 where ignored


def lm_loss(
    token_losses: Losses, model: Any, reference: Any, ids: Tensor, labels: Tensor
) -> tuple[Tensor, Tensor]:
    """Mean over the tokens; and their number, as a weight for averages."""
    count = (labels != IGNORED).sum()
    return token_losses(logits_of(model, ids), labels).sum() / count, count


def dpo_loss(
    token_losses: Losses, model: Any, reference: Any, ids: Tensor, labels: Tensor
) -> tuple[Tensor, Tensor]:
    """Mean over the pairs; and the reward margin of each."""
    chosen, rejected = token_losses(logits_of(model, ids), labels).sum(1).chunk(2)
    with torch.no_grad():
        ref_chosen, ref_rejected = token_losses(logits_of(reference, ids), labels).sum(1).chunk(2)
    margins = _BETA * ((rejected - chosen) - (ref_rejected - ref_chosen))
    return -F.logsigmoid(margins).mean(), margins.detach()


class Flat:
    """A model's parameters as flat tensors, gradients too: ternary weights, other matrices, vectors."""

    def __init__(self, model: nn.Module, dtype: torch.dtype) -> None:
        ternary = {module.weight for module in model.modules() if isinstance(module, BitLinear)}
        groups: dict[str, list[nn.Parameter]] = {"ternary": [], "matrices": [], "vectors": []}
        for parameter in model.parameters():
            kind = "ternary" if parameter in ternary else "matrices" if parameter.dim() > 1 else "vectors"
            groups[kind].append(parameter)
        self.tensors = {kind: self._join(group, dtype) for kind, group in groups.items() if group}

    @staticmethod
    def _join(group: list[nn.Parameter], dtype: torch.dtype) -> nn.Parameter:
        flat = nn.Parameter(torch.cat([parameter.detach().to(dtype).flatten() for parameter in group]))
        flat.grad = torch.zeros_like(flat)
        start = 0
        for parameter in group:
            end = start + parameter.numel()
            parameter.grad = None
            parameter.data = flat.data[start:end].view(parameter.shape)
            parameter.grad = flat.grad[start:end].view(parameter.shape)
            start = end
        return flat

    def zero_grad(self) -> None:
        for flat in self.tensors.values():
            flat.grad.zero_()  # type: ignore[union-attr]


def make_optimizer(flat: Flat, setting: Setting) -> torch.optim.Optimizer:
    """Groups carry ``base_lr``, which the schedule multiplies."""
    groups = []
    for kind, tensor in flat.tensors.items():
        reached = setting.scope == "all" or kind == "ternary"
        decay = 0.0 if kind == "vectors" else setting.weight_decay
        lr = setting.lr if reached else setting.lr / 10
        groups.append(dict(params=[tensor], lr=lr, base_lr=lr, weight_decay=decay, kind=kind))
    betas = (0.9, 0.95)
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


class Step:
    """Forward, backward and clipping of one batch, as one CUDA graph where ``captured``."""

    def __init__(self, loss: Callable[..., tuple[Tensor, Tensor]], model: Any, reference: Any, flat: Flat):
        self._loss, self._model, self._reference, self._flat = loss, model, reference, flat
        self._graph: torch.cuda.CUDAGraph | None = None
        self.captured_in = 0.0  # seconds
        self._ids = self._labels = self._result = torch.empty(0)

    def _run(self, ids: Tensor, labels: Tensor) -> Tensor:
        self._flat.zero_grad()
        with torch.autocast(DEVICE, torch.bfloat16, enabled=DEVICE == "cuda", cache_enabled=False):
            loss, _ = self._loss(self._model, self._reference, ids, labels)
        loss.backward()
        torch.nn.utils.clip_grad_norm_(list(self._flat.tensors.values()), 1.0)
        return loss.detach()

    def capture(self, ids: Tensor, labels: Tensor) -> None:
        """Warm up (kernels are compiled at their first launch), then record."""
        torch.cuda.synchronize()
        began = time.monotonic()
        self._graph = None
        self._ids, self._labels = ids.clone(), labels.clone()
        side = torch.cuda.Stream()
        side.wait_stream(torch.cuda.current_stream())
        with torch.cuda.stream(side):
            for _ in range(3):
                self._run(self._ids, self._labels)
        torch.cuda.current_stream().wait_stream(side)
        graph = torch.cuda.CUDAGraph()
        with torch.cuda.graph(graph):
            self._result = self._run(self._ids, self._labels)
        self._graph = graph
        torch.cuda.synchronize()
        self.captured_in = time.monotonic() - began

    def __call__(self, ids: Tensor, labels: Tensor) -> Tensor:
        if self._graph is None:
            return self._run(ids, labels)
        self._ids.copy_(ids)
        self._labels.copy_(labels)
        self._graph.replay()
        return self._result


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
    base: Any, setting: Setting, batches: Batches, mode: str, start: Path | None, save: Path | None
) -> tuple[dict[str, Any], list[dict[str, Any]]]:
    """Run one setting.

    Args:
        base: the model as downloaded, on the CPU; it is copied.
        start: flat latents to start from, or None for ``base``.
        save: file for the trained latents, or None.

    Returns:
        The row of results, and the rows of its curve.
    """
    began = time.monotonic()
    _clear()
    torch.manual_seed(setting.seed)  # of stochastic rounding
    model = copy.deepcopy(base).to(DEVICE)
    if setting.model == "ternary":
        convert_to_bitlinear(model)
    flat = Flat(model, torch.float32 if setting.latents == "float32" else torch.bfloat16)
    if start is not None:
        stored = load_file(start)
        for kind, tensor in flat.tensors.items():
            tensor.data.copy_(stored[kind])
    reference = copy.deepcopy(model).requires_grad_(False) if setting.task == "dpo" else None
    token_losses = torch.compile(_token_losses, dynamic=False) if "compile" in mode else _token_losses
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
    gc.collect()
    if DEVICE == "cuda":
        torch.cuda.empty_cache()
        torch.cuda.reset_peak_memory_stats()
