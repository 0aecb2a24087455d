"""A training step of the study: forward, losses, flat parameters, and all of it as a CUDA graph.

A model as small as this is bound by the CPU's launches. So forward and backward are recorded in a CUDA graph,
and the parameters lie in three flat tensors, which optimizers take in a launch or two each. All matrices are
multiples of 256 elements, so an 8-bit optimizer's blocks are what they are for single matrices.
"""

from __future__ import annotations

import time
from collections.abc import Callable
from typing import Any

import torch
import torch.nn.functional as F
from study_data import IGNORED
from torch import Tensor, nn

from axolotl_bitnet import BitLinear

DEVICE = "cuda" if torch.cuda.is_available() else "cpu"
Losses = Callable[[Tensor, Tensor], Tensor]
_BETA = 0.1  # of DPO


class _Embedding(torch.autograd.Function):
    """As F.embedding, whose backward asks the GPU for a count and cannot be captured."""

    @staticmethod
    def forward(ctx: Any, ids: Tensor, weight: Tensor, padding: int | None) -> Tensor:
        ctx.save_for_backward(ids)
        ctx.like = weight.shape, weight.dtype
        ctx.padding = padding
        return weight[ids]

    @staticmethod
    def backward(ctx: Any, dy: Tensor) -> tuple[None, Tensor, None]:
        (ids,), (shape, dtype) = ctx.saved_tensors, ctx.like
        dw = torch.zeros(shape, dtype=torch.float32, device=dy.device)
        dw.index_add_(0, ids.flatten(), dy.flatten(0, -2).float())
        if ctx.padding is not None:
            dw[ctx.padding].zero_()
        return None, dw.to(dtype), None


def logits_of(model: Any, ids: Tensor) -> Tensor:
    """As the model's forward, which reads positions on the CPU. Causal, no mask: padding is last."""
    embedding = model.model.embed_tokens
    hidden = _Embedding.apply(ids, embedding.weight, embedding.padding_idx)
    positions = torch.arange(ids.shape[1], device=ids.device)[None]
    rotary = model.model.rotary_emb(hidden, positions)
    for layer in model.model.layers:
        hidden = layer(hidden, position_embeddings=rotary, attention_mask=None)
    return model.lm_head(model.model.norm(hidden))


def plain_token_losses(logits: Tensor, labels: Tensor) -> Tensor:
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
