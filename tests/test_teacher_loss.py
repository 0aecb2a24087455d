"""The teacher's loss against float64 and autograd: chunks, odd shapes, temperature, labels, bfloat16."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor

from axolotl_bitnet.ops.divergence import divergence
from axolotl_bitnet.training import teacher_loss as module
from axolotl_bitnet.training.teacher_loss import teacher_loss

SHAPES = [(1, 5, 2, 3), (7, 33, 16, 16), (130, 257, 24, 40)]  # tokens, vocabulary, student's size, teacher's
SETTINGS = [(1.0, 1.0), (2.5, 1.0), (1.0, 0.5), (0.7, 0.3), (1.0, 0.0)]  # temperature, weight


def operands(tokens: int, words: int, size: int, other: int, dtype: torch.dtype) -> list[Tensor]:
    values = [
        torch.randn(shape) for shape in ((tokens, size), (words, size), (tokens, other), (words, other))
    ]
    return [value.to(dtype) for value in values] + [torch.randint(words, (tokens,))]


def reference(values: list[Tensor], items: float, temperature: float, weight: float) -> tuple[Tensor, ...]:
    """Loss, its gradients, and the sums, by the textbook, in float64."""
    hidden, head, teacher_hidden, teacher_head = (value.double() for value in values[:4])
    hidden.requires_grad_()
    head.requires_grad_()
    z, t = hidden @ head.t(), teacher_hidden @ teacher_head.t()
    p = torch.softmax(t / temperature, -1)
    kl = (p * (torch.log_softmax(t / temperature, -1) - torch.log_softmax(z / temperature, -1))).sum()
    ce = torch.nn.functional.cross_entropy(z, values[4], reduction="sum")
    loss = (weight * temperature**2 * kl + (1 - weight) * ce) / items
    return loss.detach(), *torch.autograd.grad(loss, (hidden, head)), kl.detach(), ce.detach()


@pytest.mark.parametrize("temperature, weight", SETTINGS)
@pytest.mark.parametrize("shape", SHAPES)
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
def test_it_is_the_textbooks(
    shape: tuple[int, ...],
    temperature: float,
    weight: float,
    dtype: torch.dtype,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr(module, "CHUNK", 64 * shape[1])  # several chunks, the last of them shorter
    values = operands(*shape, dtype)
    hidden, head = (value.clone().requires_grad_() for value in values[:2])
    items = torch.tensor(shape[0] + 3.0)
    loss, kl, ce = teacher_loss(hidden, head, *values[2:], items, temperature, weight)
    (2 * loss).backward()
    want, d_hidden, d_head, want_kl, want_ce = reference(values, float(items), temperature, weight)
    torch.testing.assert_close((loss, kl, ce), (want.float(), want_kl.float(), want_ce.float()))
    bound = {torch.float32: 1e-5, torch.bfloat16: 1e-2}[dtype]
    for found, gradient in ((hidden.grad, 2 * d_hidden), (head.grad, 2 * d_head)):
        assert found is not None and found.dtype == dtype
        assert (found.double() - gradient).norm() <= bound * gradient.norm()


def test_a_small_divergence_is_right_in_bfloat16() -> None:
    """Where losses on rounded logits are 44 % off."""
    hidden, head, *_, labels = operands(256, 500, 64, 64, torch.bfloat16)
    nearly = (hidden.float() + 0.004 * torch.randn(hidden.shape)).bfloat16()
    values = [nearly, head, hidden, head, labels]
    loss, _, _ = teacher_loss(*values, torch.tensor(256.0))
    want, *_ = reference(values, 256, 1.0, 1.0)
    assert 1e-4 < float(want) < 1e-2
    torch.testing.assert_close(loss, want.float(), rtol=1e-3, atol=1e-6)


def test_the_head_of_bfloat16_hidden_states_can_be_float32() -> None:
    """As under autocast: the gradient of float32 latents is not rounded."""
    values = operands(100, 70, 16, 16, torch.bfloat16)
    head = values[1].float().requires_grad_()
    teacher_loss(values[0], head, *values[2:], torch.tensor(100.0))[0].backward()
    *_, d_head, _, _ = reference(values, 100, 1.0, 1.0)
    assert head.grad is not None and head.grad.dtype == torch.float32
    assert (head.grad.double() - d_head).norm() <= 1e-2 * d_head.norm()
    assert not torch.equal(head.grad, head.grad.bfloat16().float())


def test_its_own_teacher_teaches_nothing() -> None:
    hidden, head, *_, labels = operands(9, 40, 8, 8, torch.float32)
    hidden.requires_grad_()
    loss, kl, _ = teacher_loss(hidden, head, hidden, head, labels, torch.tensor(9.0))
    loss.backward()
    assert float(kl) == pytest.approx(0, abs=1e-5) and hidden.grad is not None
    assert float(hidden.grad.abs().max()) < 1e-6


def test_no_tokens_are_a_loss_of_zero_with_gradients() -> None:
    hidden, head, *rest = operands(0, 40, 8, 8, torch.float32)
    head.requires_grad_()
    loss, _, _ = teacher_loss(hidden, head, *rest, torch.tensor(5.0))
    loss.backward()
    assert float(loss) == 0 and head.grad is not None and not head.grad.any()


def test_a_frozen_head_gets_no_gradient() -> None:
    hidden, *rest = operands(5, 40, 8, 8, torch.float32)
    hidden.requires_grad_()
    teacher_loss(hidden, *rest, torch.tensor(5.0))[0].backward()
    assert hidden.grad is not None and all(value.grad is None for value in rest)


def test_a_second_backward_is_refused() -> None:
    hidden, *rest = operands(5, 40, 8, 8, torch.float32)
    loss, _, _ = teacher_loss(hidden.requires_grad_(), *rest, torch.tensor(5.0))
    loss.backward(retain_graph=True)
    with pytest.raises(RuntimeError, match="used up"):
        loss.backward()


def test_extreme_logits_stay_finite() -> None:
    z = torch.tensor([[1e4, -1e4, 0.0], [0.0, 0.0, 0.0]])
    gradient, kl, ce = divergence(
        z, z.flip(0).contiguous(), torch.tensor([1, 0]), torch.tensor(1.0), 1.0, 0.5, torch.float32
    )
    assert all(value.isfinite().all() for value in (gradient, kl, ce)) and float(ce[0]) == 2e4
