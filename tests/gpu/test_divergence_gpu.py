"""The teacher's loss on a GPU against float64: the kernel's rows of a real vocabulary, and chunks of them."""

from __future__ import annotations

import pytest
import torch

from axolotl_bitnet.ops.divergence import divergence
from axolotl_bitnet.training.teacher_loss import teacher_loss

pytestmark = [
    pytest.mark.gpu,
    pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA GPU"),
]
SETTINGS = [(1.0, 1.0), (2.0, 1.0), (1.0, 0.7), (0.5, 0.3)]  # temperature, weight


@pytest.mark.parametrize("temperature, weight", SETTINGS)
@pytest.mark.parametrize(
    "shape", [(1, 1), (3, 17), (5, 1024), (4, 1025), (64, 49_153), (16, 151_936)], ids=str
)
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
def test_the_kernel_is_plain_torch(
    shape: tuple[int, int], temperature: float, weight: float, dtype: torch.dtype
) -> None:
    torch.manual_seed(0)
    z, t = 4 * torch.randn(shape, device="cuda"), 4 * torch.randn(shape, device="cuda")
    labels = torch.randint(shape[1], shape[:1], device="cuda")
    factor = torch.tensor(0.25, device="cuda")
    gradient, kl, ce = divergence(z, t, labels, factor, temperature, weight, dtype)
    exact = divergence.plain(
        z.double(), t.double(), labels, factor.double(), temperature, weight, torch.float64
    )
    torch.testing.assert_close((kl, ce), (exact[1].float(), exact[2].float()), rtol=1e-5, atol=1e-4)
    assert gradient.dtype == dtype and gradient.shape == shape
    torch.testing.assert_close(gradient.double(), exact[0], rtol=4 * torch.finfo(dtype).eps, atol=1e-6)


@pytest.mark.parametrize("weight", [1.0, 0.7])
def test_chunks_add_up(weight: float) -> None:
    """1,500 tokens of 152k words are several chunks."""
    torch.manual_seed(0)
    tokens, words, size = 1500, 151_936, 128
    hidden, taught = (torch.randn(tokens, size, device="cuda").bfloat16() for _ in range(2))
    head, other = (0.2 * torch.randn(words, size, device="cuda").bfloat16() for _ in range(2))
    labels, items = torch.randint(words, (tokens,), device="cuda"), torch.tensor(1500.0, device="cuda")
    latent = head.float().requires_grad_()
    mine = hidden.clone().requires_grad_()
    loss, kl, ce = teacher_loss(mine, latent, taught, other, labels, items, 1.0, weight, torch.bfloat16)
    loss.backward()
    exact_h, exact_w = hidden.double().requires_grad_(), head.double().requires_grad_()
    z, t = exact_h @ exact_w.t(), taught.double() @ other.double().t()
    p, q = torch.log_softmax(t, -1), torch.log_softmax(z, -1)
    soft, hard = (p.exp() * (p - q)).sum(), torch.nn.functional.cross_entropy(z, labels, reduction="sum")
    want = (weight * soft + (1 - weight) * hard) / items.double()
    want.backward()
    torch.testing.assert_close((loss, kl, ce), (want.float(), soft.float(), hard.float()), rtol=1e-4, atol=0)
    for found, gradient in ((mine.grad, exact_h.grad), (latent.grad, exact_w.grad)):
        assert found is not None and gradient is not None
        assert (found.double() - gradient).norm() <= 1e-2 * gradient.norm()
