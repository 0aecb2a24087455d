"""One run of the study of conversion: a dense model made ternary by a recipe, and what is left of it.

Windows of 1,024 tokens, 8 a step, AdamW, decay 0.01, 5 % warmup and half a cosine, clipping at 1,
float32 latents, bfloat16 autocast, decoder layers compiled, forward and backward in a CUDA graph. The
teacher's loss, the ramp and the stretched start are the package's own.

What is measured, always of the fully ternary model on the int8 path: cross-entropy, next-token accuracy and
agreement of the most likely token with the dense model's, on held-out text; and cross-entropy on text that
the dense model wrote.
"""

from __future__ import annotations

import contextlib
import copy
import gc
import math
import os
import shutil
import time
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
import torch.nn.functional as F
from convert_layers import HOT, Mixed, Muon, temperature_at
from study_step import DEVICE, Flat, _Embedding
from torch import Tensor, nn

from axolotl_bitnet import BitLinear, convert_to_bitlinear, ops
from axolotl_bitnet.training.ramp import fully_ternary, set_ramp
from axolotl_bitnet.training.stretch import remember, stretch_latents
from axolotl_bitnet.training.teacher_loss import teacher_loss

GRAPHS = DEVICE == "cuda"


@dataclass(frozen=True)
class Run:
    """One recipe; its fields are the first columns of the results."""

    data: str = "kjv"  # kjv | docs | written (by the dense model)
    ternary: bool = True
    teacher: str = ""  # "" | base | tuned, docs-... (after a dense fine-tuning on the same text)
    weight: float = 1.0  # of the teacher; the rest is cross-entropy
    temperature: float = 1.0
    features: float = 0.0  # weight of the layers' outputs: their relative squared error to the teacher's
    ce_first: float = 0.0  # share of the steps with cross-entropy alone, before the teacher
    start: str = ""  # "" | stretch (a ramp undoes it) | lacking (a ramp adds W - L)
    ramp: float = 0.1  # share of the steps
    soft: bool = False  # Hestia's softened codes during the ramp
    optimizer: str = "adamw"  # adamw | muon
    lr: float = 1e-3
    decay: float = 0.01
    beta2: float = 0.95
    batch: int = 8
    length: int = 1024
    tokens: int = 400 * 8192
    seed: int = 1

    @property
    def steps(self) -> int:
        return self.tokens // (self.batch * self.length)


@dataclass
class Lab:
    """What runs share: the dense model, texts, and where files go."""

    base: Any  # float32, on the CPU
    texts: dict[str, Tensor]  # int64 streams
    held_out: dict[str, list[tuple[Tensor, Tensor]]]  # by text, batches on the device
    work: Path
    compiled: bool = True

    def model(self, kind: str, dtype: torch.dtype) -> Any:
        model = copy.deepcopy(self.base)
        if kind != "base":
            model.load_state_dict(torch.load(self.work / f"{kind}.pt", map_location="cpu"))
        model.config.use_cache = False
        return model.to(DEVICE, dtype)


def read_base(model: Path, work: Path) -> None:
    """The GGUF, unpacked once for all processes."""
    if (work / "base").exists():
        return
    from transformers import AutoModelForCausalLM

    named = {"gguf_file": gguf.name} if (gguf := next(model.glob("*.gguf"), None)) else {}
    read = AutoModelForCausalLM.from_pretrained(model, dtype=torch.float32, **named)
    for name in ("quantization_config", "_pre_quantization_dtype"):
        vars(read.config).pop(name, None)
    # the config that was read is a GGUF's
    plain = AutoModelForCausalLM.from_config(read.config, dtype=torch.float32)
    plain.load_state_dict(read.state_dict())
    part = work / f"base.{os.getpid()}"
    plain.save_pretrained(part)
    try:
        part.rename(work / "base")
    except OSError:  # another process was first
        shutil.rmtree(part)


def load_lab(model: Path, data: Path, work: Path, compiled: bool, small: bool = False) -> Lab:
    from transformers import AutoModelForCausalLM

    base = AutoModelForCausalLM.from_pretrained(model, dtype=torch.float32)
    texts = {path.stem: torch.from_numpy(np.load(path).astype(np.int64)) for path in data.glob("*.npy")}
    work.mkdir(parents=True, exist_ok=True)
    held = {}
    for name, key in (("kjv", "kjv_held_out"), ("docs", "held_out"), ("general", "general")):
        if key in texts:
            length, most = (64, 11) if small else (1024, 128)
            ids = texts[key][: (len(texts[key]) - 1) // length * length + 1]
            x, y = ids[:-1].view(-1, length)[:most], ids[1:].view(-1, length)[:most]
            held[name] = list(zip(x.to(DEVICE).split(8), y.to(DEVICE).split(8), strict=True))
    return Lab(base, texts, held, work, compiled)


def draw(lab: Lab, run: Run) -> Tensor:
    """Windows of every step, (steps, batch, length + 1): drawn at random, or one pass in order."""
    stream = lab.texts[{"docs": "train"}.get(run.data, run.data)]
    number = run.steps * run.batch
    if run.data != "kjv":
        starts = torch.arange(number) * run.length % (len(stream) - run.length - 1)
        starts = starts[torch.randperm(number, generator=torch.Generator().manual_seed(run.seed))]
    else:
        starts = torch.randint(
            len(stream) - run.length - 1, (number,), generator=torch.Generator().manual_seed(run.seed)
        )
    places = starts[:, None] + torch.arange(run.length + 1)
    return stream[places].view(run.steps, run.batch, run.length + 1)


def autocast() -> Any:
    return torch.autocast(DEVICE, torch.bfloat16, enabled=DEVICE == "cuda", cache_enabled=False)


def hidden_of(model: Any, ids: Tensor, after: list[Tensor] | None = None) -> Tensor:
    """As the decoder's forward, which reads positions on the CPU: (batch, length, size). ``after`` gets the
    output of every layer."""
    embedding = model.model.embed_tokens
    hidden = _Embedding.apply(ids, embedding.weight, embedding.padding_idx)
    rotary = model.model.rotary_emb(hidden, torch.arange(ids.shape[1], device=ids.device)[None])
    for layer in model.model.layers:
        hidden = layer(hidden, position_embeddings=rotary, attention_mask=None)
        if after is not None:
            after.append(hidden)
    return model.model.norm(hidden)


def loss_of(student: Any, teacher: Any, run: Run, ids: Tensor, labels: Tensor) -> Tensor:
    mine: list[Tensor] | None = [] if run.features and teacher is not None else None
    hidden, labels = hidden_of(student, ids, mine).flatten(0, 1), labels.flatten()
    if teacher is None:
        logits = student.lm_head(hidden)
        parts = zip(logits.split(2048), labels.split(2048), strict=True)
        return sum(F.cross_entropy(z.float(), y, reduction="sum") for z, y in parts) / len(labels)
    theirs: list[Tensor] | None = None if mine is None else []
    with torch.no_grad():
        taught = hidden_of(teacher, ids, theirs).flatten(0, 1)
    dtype = torch.bfloat16 if DEVICE == "cuda" else torch.float32
    items = labels.new_full((), len(labels), dtype=torch.float32)
    heads = student.lm_head.weight, teacher.lm_head.weight
    loss = teacher_loss(
        hidden, heads[0], taught, heads[1], labels, items, run.temperature, run.weight, dtype
    )[0]
    if mine is None or theirs is None:
        return loss
    off = [apart(x, y) for x, y in zip(mine, theirs, strict=True)]
    return loss + run.features * torch.stack(off).mean()


def apart(x: Tensor, y: Tensor) -> Tensor:
    """Mean over tokens of ``|x - y|^2 / |y|^2``."""
    x, y = x.float(), y.float()
    return ((x - y).square().sum(-1) / y.square().sum(-1)).mean()


class Step:
    """Forward, backward and clipping of one batch, as one CUDA graph where captured."""

    def __init__(self, loss: Callable[[Tensor, Tensor], Tensor], flat: Flat) -> None:
        self.loss, self._flat = loss, flat
        self._graph: Any = None

    def _run(self, window: Tensor) -> Tensor:
        self._flat.zero_grad()
        with autocast():
            loss = self.loss(window[:, :-1], window[:, 1:])
        loss.backward()
        nn.utils.clip_grad_norm_(list(self._flat.tensors.values()), 1.0)
        return loss.detach()

    def capture(self, window: Tensor) -> None:
        torch.cuda.synchronize()
        self._graph = None
        self._window = window.clone()
        side = torch.cuda.Stream()
        side.wait_stream(torch.cuda.current_stream())
        with torch.cuda.stream(side):
            for _ in range(3):
                self._run(self._window)
        torch.cuda.current_stream().wait_stream(side)
        graph = torch.cuda.CUDAGraph()
        with torch.cuda.graph(graph):
            self._result = self._run(self._window)
        self._graph = graph

    def __call__(self, window: Tensor) -> Tensor:
        if self._graph is None:
            return self._run(window)
        self._window.copy_(window)
        self._graph.replay()
        return self._result


@torch.no_grad()
def measure(
    model: Any, batches: list[tuple[Tensor, Tensor]], dense: list[Tensor] | None = None
) -> dict[str, Any]:
    """Cross-entropy, accuracy, and agreement with a dense model's most likely tokens; those tokens too."""
    total = right = same = count = 0.0
    likely = []
    # not compiled: a second compilation for no gradient costs more than it saves
    with fully_ternary(model), torch.compiler.set_stance("force_eager"):
        for index, (ids, labels) in enumerate(batches):
            with autocast():
                z = model.lm_head(hidden_of(model, ids)).flatten(0, 1)
            labels = labels.flatten()
            best = z.argmax(-1)
            likely.append(best)
            total += F.cross_entropy(z.float(), labels, reduction="sum").double()
            right += (best == labels).sum()
            same += (best == dense[index]).sum() if dense is not None else 0
            count += len(labels)
    found = {"loss": float(total) / count, "accuracy": float(right) / count, "likely": likely}
    return found | ({"agreement": float(same) / count} if dense is not None else {})


def figures(lab: Lab, model: Any, run: Run) -> dict[str, float]:
    """The results' columns: on the run's own kind of text, and on text that the dense model wrote."""
    text = "kjv" if run.data == "kjv" else "docs"
    dense_likely = lab.work / f"likely-{text}.pt"
    if not dense_likely.exists():
        base = lab.model("base", torch.float32)
        likely = torch.cat(measure(base, lab.held_out[text])["likely"]).cpu()
        part = dense_likely.with_suffix(f".{os.getpid()}")
        torch.save(likely, part)
        part.replace(dense_likely)
        del base
    likely = torch.load(dense_likely).to(DEVICE).split([y.numel() for _, y in lab.held_out[text]])
    found = measure(model, lab.held_out[text], likely)
    row = {"held_out": found["loss"], "accuracy": found["accuracy"], "agreement": found["agreement"]}
    if "general" in lab.held_out and run.data != "kjv":
        row["written"] = measure(model, lab.held_out["general"])["loss"]
    return row


@torch.no_grad()
def codes_of(model: nn.Module) -> Tensor:
    layers = [module for module in model.modules() if isinstance(module, BitLinear)]
    return torch.cat([ops.ternarize(layer.weight)[0].flatten() for layer in layers])


def prepare(lab: Lab, model: Any, run: Run, windows: Tensor) -> None:
    """The ternary layers and their start."""
    convert_to_bitlinear(model)
    layers = [module for module in model.modules() if isinstance(module, BitLinear)]
    before = [layer.weight.detach().clone() for layer in layers] if run.start == "lacking" else []
    if run.start:
        sample = [window[None, :-1].to(DEVICE) for window in windows[:2].flatten(0, 1)[:16]]
        with autocast():
            fits = stretch_latents(model, sample)
        if run.start == "stretch" and run.ramp:
            remember(model, fits)
    if run.start == "lacking" or run.soft:
        tau = torch.full((), HOT, device=DEVICE) if run.soft else None
        for index, layer in enumerate(layers):
            layer.__class__ = Mixed
            layer.tau = tau
            layer.lacking = before[index] - layer.weight.detach() if before else None


def on_the_way(model: Any, run: Run, step: int) -> bool:
    """Set lambda (and the temperature) of a step; whether it is below 1."""
    done = step / (run.ramp * run.steps) if run.ramp and run.ternary else 1.0
    if done >= 1:
        if run.ternary:
            set_ramp(model, 1.0)
        return False
    value = done
    if run.soft:
        value, tau = temperature_at(done)
        value = min(value, 0.999_999)  # the soft codes stay to the end of the way
        next(m for m in model.modules() if isinstance(m, Mixed)).tau.fill_(tau)
    set_ramp(model, value)
    return True


def make_optimizers(flat: Flat, model: Any, run: Run) -> list[Any]:
    groups, made = [], []
    for kind, tensor in flat.tensors.items():
        if kind == "ternary" and run.optimizer == "muon":
            made.append(Muon([m.weight for m in model.modules() if isinstance(m, BitLinear)], run.decay))
            made[0].param_groups[0]["base_lr"] = run.lr
            continue
        lr = 1e-3 if run.optimizer == "muon" else run.lr
        decay = 0.0 if kind == "vectors" else run.decay
        groups.append({"params": [tensor], "lr": lr, "base_lr": lr, "weight_decay": decay})
    made.append(torch.optim.AdamW(groups, lr=run.lr, betas=(0.9, run.beta2), fused=DEVICE == "cuda"))
    return made


def set_rate(optimizers: list[Any], step: int, steps: int) -> None:
    warmup = max(1, steps // 20)
    done = max(0.0, (step - warmup) / max(1, steps - warmup))
    factor = (step + 1) / warmup if step < warmup else 0.5 * (1 + math.cos(math.pi * done))
    for optimizer in optimizers:
        for group in optimizer.param_groups:
            group["lr"] = group["base_lr"] * factor


def train(
    lab: Lab, run: Run, every: int = 0, point: Callable[[dict[str, Any]], None] | None = None
) -> tuple[dict[str, Any], Any]:
    """Run one recipe; ``point`` gets figures every so many tokens. Returns the row, and the model."""
    began = time.monotonic()
    torch.manual_seed(run.seed)
    windows = draw(lab, run)
    model = lab.model("base", torch.float32).train()
    if run.ternary:
        prepare(lab, model, run, windows)
        first = codes_of(model)
    prepared = time.monotonic()
    at_start = {"step": 0, "tokens": 0, **figures(lab, model, run)}
    if point:
        point(at_start)
    model.train()
    flat = Flat(model, torch.float32)
    teacher = None
    if run.teacher:
        teacher = lab.model(run.teacher, torch.bfloat16 if DEVICE == "cuda" else torch.float32)
        teacher.requires_grad_(False).eval()
    if lab.compiled:
        for layer in [*model.model.layers, *(teacher.model.layers if teacher else [])]:
            layer.compile(dynamic=False)  # a second batch size would be compiled for every size
    optimizers = make_optimizers(flat, model, run)
    windows = windows.to(DEVICE)
    step_of = Step(lambda x, y: torch.zeros(()), flat)
    phase, losses, clock = None, [], time.monotonic()
    for step in range(run.steps):
        taught = teacher if step >= run.ce_first * run.steps else None
        now = on_the_way(model, run, step), taught is not None
        if now != phase:
            phase = now
            step_of.loss = lambda x, y, taught=taught: loss_of(model, taught, run, x, y)
            if GRAPHS:
                paused = time.monotonic()
                step_of.capture(windows[step])
                clock += time.monotonic() - paused
        set_rate(optimizers, step, run.steps)
        losses.append(step_of(windows[step]).clone())
        for optimizer in optimizers:
            optimizer.step()
        if (
            every
            and (step + 1) * run.batch * run.length % every < run.batch * run.length
            and step + 1 < run.steps
        ):
            paused = time.monotonic()
            row = {
                "step": step + 1,
                "tokens": (step + 1) * run.batch * run.length,
                **figures(lab, model, run),
            }
            model.train()
            if point:
                point(row | {"loss": float(torch.stack(losses[-20:]).mean())})
            clock += time.monotonic() - paused
    spent = float(torch.stack(losses[-20:]).mean())  # waits for the GPU
    ms = 1000 * (time.monotonic() - clock) / run.steps
    if run.ternary:
        set_ramp(model, 1.0)
    row = {"before": at_start["held_out"], **figures(lab, model, run), "loss": spent, "ms_step": ms}
    if run.ternary:
        last = codes_of(model)
        row |= {"flips": float((first != last).float().mean()), "zeros": float((last == 0).float().mean())}
    row |= {"prepare_s": prepared - began, "seconds": time.monotonic() - began}
    if point:
        point({"step": run.steps, "tokens": run.tokens, **row})
    del step_of
    return row, model


def free() -> None:
    gc.collect()
    if DEVICE == "cuda":
        with contextlib.suppress(RuntimeError):
            torch.cuda.empty_cache()
