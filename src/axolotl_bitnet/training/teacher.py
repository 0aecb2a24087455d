"""A frozen dense model in the run, whose answers the ternary one learns.

While it trains, the model's forward ends before its head: the hidden states of both models go into
:func:`axolotl_bitnet.training.teacher_loss.teacher_loss`, which never holds the logits of more than some
hundred tokens. The teacher reads what the student reads: masks, position ids, packed samples.

1. :func:`teach` gives the student's class a forward of ours (by name it stays the class it was), which leaves
   evaluations, generation and everything without labels to the model's own. So DDP, FSDP2, checkpointing and
   torch.compile see an ordinary forward, and the student's head is whole where it is read.
2. :class:`Teaching` moves the teacher to the device as training begins, and shards it where FSDP2 has sharded
   the student.
3. :func:`log_teacher_loss` evaluates the teacher once, beside the student's first evaluation.

The teacher is no part of any module: it is in no checkpoint, no optimizer, no state dict.
"""

from __future__ import annotations

import inspect
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import torch
import torch.distributed as dist
import transformers
from torch import Tensor, nn
from torch.distributed.fsdp import FSDPModule, fully_shard
from transformers import TrainerCallback
from transformers.modeling_outputs import CausalLMOutputWithPast

from .log import warn
from .teacher_loss import teacher_loss
from .trainer_evaluation import evaluate_apart

IGNORED = -100


class TeacherError(ValueError):
    """This model cannot teach that one; the message has the reason."""


@dataclass
class Teacher:
    """A frozen model, and how its answers are weighed (:func:`teacher_loss`).

    Attributes:
        sums: float32 (2,), KL and number of the tokens since the last entry of the log.
        answering: whether the student's forward is the teacher's, for an evaluation.
        heard: whether a training step has gone through the teacher's loss.
        placed: whether the teacher is where the student is.
    """

    model: nn.Module
    temperature: float = 1.0
    weight: float = 1.0
    sums: Tensor | None = None
    answering: bool = False
    heard: bool = False
    placed: bool = False

    @torch.no_grad()
    def logs(self) -> dict[str, float]:
        """``bitnet/kl``: mean KL(teacher || student) of the tokens trained since the last call, of all ranks.

        Raises:
            RuntimeError: steps were trained without the teacher's loss.
        """
        if not self.heard:
            raise RuntimeError(
                "steps were trained without the teacher's loss: something replaced the model's forward after "
                "`bitnet.teacher` had. Remove the plugin or patch that does"
            )
        if self.sums is None:
            return {}
        if dist.is_available() and dist.is_initialized():
            dist.all_reduce(self.sums)
        kl, tokens = self.sums.tolist()
        self.sums = None
        return {"bitnet/kl": kl / tokens} if tokens else {}


def teach(student: nn.Module, teacher: Teacher) -> None:
    """Let a model of transformers learn from a teacher whenever it trains with labels, from now on.

    Args:
        student: a causal language model, not wrapped or sharded yet.
        teacher: its model is frozen here, and put into evaluation mode.

    Raises:
        TeacherError: vocabularies differ, or logits are more than the head's product; the message has which.
    """
    if "forward" in vars(student):
        raise TeacherError("the model's forward was replaced by another tool: a teacher's loss would not run")
    words = [_head(model).shape[0] for model in (student, teacher.model)]
    if words[0] != words[1]:
        raise TeacherError(
            f"the teacher's head has {words[1]} words and the model's {words[0]}: a divergence needs one "
            "vocabulary. Remove added tokens and `resize_token_embeddings_to_32x`, or choose another teacher"
        )
    model: Any = teacher.model.requires_grad_(False).eval()
    model.config.use_cache = False  # nothing is generated, and with a cache no two layers share a graph
    _answer_hidden(model)
    kind = type(student)

    def forward(self: Any, *args: Any, **kwargs: Any) -> Any:
        if teacher.answering:
            return teacher.model(*args, **kwargs)
        if not self.training or kwargs.get("labels") is None:
            return kind.forward(self, *args, **kwargs)
        return _lesson(self, teacher, *args, **kwargs)

    _give_forward(student, forward)


def _lesson(
    student: Any,
    teacher: Teacher,
    *args: Any,
    labels: Tensor,
    num_items_in_batch: Tensor | int | None = None,
    **inputs: Any,
) -> CausalLMOutputWithPast:
    """The student's forward with the teacher's loss in place of logits."""
    following = nn.functional.pad(labels[..., 1:], (0, 1), value=IGNORED).flatten()
    # which tokens count is read from the GPU before the forward: later the CPU would wait for all of it
    rows = (following != IGNORED).nonzero()[:, 0]
    mine = _hidden(student, *args, **inputs).flatten(0, -2)[rows]
    items = num_items_in_batch if num_items_in_batch is not None else max(len(rows), 1)
    if not isinstance(items, Tensor):
        items = mine.new_full((), items, dtype=torch.float32)
    losses: list[tuple[Tensor, Tensor, Tensor]] = []

    def compare(taught: Tensor, head: Tensor) -> None:
        with torch.enable_grad():
            losses.append(_loss(mine, _head(student), taught.flatten(0, -2)[rows], head,
                                following[rows], items, teacher))  # fmt: skip

    with torch.no_grad():
        teacher.model(*args, _then=compare, **inputs)
    loss, kl, _ = losses[0]
    _count(teacher, kl, len(rows))
    return CausalLMOutputWithPast(loss=loss)


@torch.compiler.disable
def _loss(
    hidden: Tensor,
    head: Tensor,
    taught: Tensor,
    teacher_head: Tensor,
    labels: Tensor,
    items: Tensor,
    teacher: Teacher,
) -> tuple[Tensor, Tensor, Tensor]:
    device = hidden.device.type
    autocast = torch.is_autocast_enabled(device)
    dtype = torch.get_autocast_dtype(device) if autocast else head.dtype
    return teacher_loss(
        hidden, head, taught, teacher_head, labels, items, teacher.temperature, teacher.weight, dtype
    )


@torch.compiler.disable
def _count(teacher: Teacher, kl: Tensor, tokens: int) -> None:
    sums = torch.stack([kl.detach().float(), kl.new_full((), tokens, dtype=torch.float32)])
    teacher.sums = sums if teacher.sums is None else teacher.sums + sums
    teacher.heard = True


def _answer_hidden(model: nn.Module) -> None:
    """Let a call with ``_then`` hand the hidden states and the head to it, from within the model's forward:
    under FSDP2 the head is whole there and nowhere else."""
    kind = type(model)

    def forward(
        self: Any, *args: Any, _then: Callable[[Tensor, Tensor], None] | None = None, **kwargs: Any
    ) -> Any:
        if _then is None:
            return kind.forward(self, *args, **kwargs)
        _then(_hidden(self, *args, **kwargs), _head(self))
        return None

    _give_forward(model, forward)


def _give_forward(model: nn.Module, forward: Callable[..., Any]) -> None:
    """By a subclass of the same name, for that name is saved in the config; with the same signature, which
    the Trainer reads."""
    kind = type(model)
    forward.__signature__ = inspect.signature(kind.forward)  # type: ignore[attr-defined]
    names = {"forward": forward, "__module__": kind.__module__, "__qualname__": kind.__qualname__}
    model.__class__ = type(kind.__name__, (kind,), names)


def _hidden(model: Any, *args: Any, **inputs: Any) -> Tensor:
    """What the head reads, (..., tokens, size)."""
    for key in ("use_cache", "return_dict", "output_hidden_states", "output_attentions", "logits_to_keep"):
        inputs.pop(key, None)
    return model.get_decoder()(*args, use_cache=False, **inputs).last_hidden_state


def _head(model: Any) -> Tensor:
    return model.get_output_embeddings().weight


@torch.no_grad()
def refuse_other_heads(model: Any) -> None:
    """Compare a model's logits with the product of its hidden states and its head, on four tokens.

    Raises:
        TeacherError: they differ (a bias, a cap, a factor): the teacher's loss would be of other logits.
    """
    ids = torch.arange(4, device=_head(model).device)[None]
    want = model(input_ids=ids).logits.float()
    found = nn.functional.linear(_hidden(model, input_ids=ids), _head(model)).float()
    if not torch.allclose(found, want, rtol=2e-2, atol=2e-2 * float(want.abs().max())):
        raise TeacherError(
            f"{type(model).__name__} does more to its logits than its head's product (a bias, a cap or a "
            "factor), which `bitnet.teacher` does not follow. Train it without a teacher"
        )


class Teaching(TrainerCallback):
    """Puts the teacher where the student is, as training begins."""

    def __init__(self, teacher: Teacher) -> None:
        self.teacher = teacher

    def on_train_begin(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        """Raise TeacherError under nn.DataParallel, whose replicas would teach the original."""
        if args.n_gpu > 1:
            raise TeacherError(
                "several GPUs in one process (nn.DataParallel) cannot share a teacher: start the run with a "
                "launcher (`axolotl train` does so by default), or set CUDA_VISIBLE_DEVICES to one GPU"
            )
        student = kwargs["model"]
        root = getattr(student, "_orig_mod", student)
        if not isinstance(root, FSDPModule):
            self.teacher.model.to(args.device)
        elif not isinstance(self.teacher.model, FSDPModule):
            shard_like(self.teacher.model, root)
        self.teacher.placed = True


def shard_like(model: nn.Module, policy: FSDPModule) -> None:
    """Shard a frozen model over the ranks that a policy is sharded over, a decoder layer a unit."""
    from .fsdp2_gather import _param_groups

    mesh = next(iter(_param_groups(policy))).mesh_info.mesh
    units = set(getattr(model, "_no_split_modules", None) or ())
    for module in list(model.modules()):
        if type(module).__name__ in units:
            fully_shard(module, mesh=mesh)
    fully_shard(model, mesh=mesh, reshard_after_forward=True)  # a root keeps its weights otherwise


def log_teacher_loss(trainer: Any, teacher: Teacher) -> None:
    """Let a transformers Trainer's first evaluation also log the teacher's loss: ``eval_teacher_loss``."""
    evaluation_loop = getattr(trainer, "evaluation_loop", None)
    if evaluation_loop is None:
        warn(
            f"transformers {transformers.__version__} has no Trainer.evaluation_loop: the teacher's own loss "
            "(eval_teacher_loss) is not logged"
        )
        return
    told: set[str] = set()

    def evaluate_too(*args: Any, **kwargs: Any) -> Any:
        output = evaluation_loop(*args, **kwargs)
        prefix = kwargs.get("metric_key_prefix", "eval")
        if teacher.placed and prefix not in told:
            told.add(prefix)
            with _answers(teacher):
                loss = evaluate_apart(trainer, evaluation_loop, args, kwargs).metrics.get(f"{prefix}_loss")
            if loss is not None:
                output.metrics[f"{prefix}_teacher_loss"] = loss
        return output

    trainer.evaluation_loop = evaluate_too


@contextmanager
def _answers(teacher: Teacher) -> Iterator[None]:
    teacher.answering = True
    try:
        yield
    finally:
        teacher.answering = False
