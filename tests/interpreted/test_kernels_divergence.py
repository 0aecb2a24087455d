"""kernels/divergence.py against plain torch in float64."""

from __future__ import annotations

import pytest
import torch

from axolotl_bitnet.ops.divergence import divergence
from axolotl_bitnet.ops.kernels import divergence as kernel
from support.kernel_cases import by_dtype


@by_dtype
@pytest.mark.parametrize("temperature, weight", [(1.0, 1.0), (2.0, 1.0), (1.0, 0.4), (0.5, 0.0)])
@pytest.mark.parametrize("shape", [(1, 1), (3, 17), (5, 128), (2, 9001)])
def test_it_is_plain_torch(
    shape: tuple[int, int], temperature: float, weight: float, dtype: torch.dtype
) -> None:
    z, t = 4 * torch.randn(shape), 4 * torch.randn(shape)
    labels, factor = torch.randint(shape[1], shape[:1]), torch.tensor(0.25)
    gradient, kl, ce = kernel.divergence(z, t, labels, factor, temperature, weight, dtype)
    exact = divergence.plain(
        z.double(), t.double(), labels, factor.double(), temperature, weight, torch.float64
    )
    torch.testing.assert_close((kl, ce), (exact[1].float(), exact[2].float()), rtol=1e-5, atol=2e-5)
    assert gradient.dtype == dtype and gradient.shape == shape
    torch.testing.assert_close(
        gradient.double(), exact[0], rtol=2 * torch.finfo(dtype).eps, atol=max(1e-6, torch.finfo(dtype).tiny)
    )


def test_rows_that_grow_and_extremes() -> None:
    z = torch.linspace(-2000, 2000, 9000).repeat(2, 1)
    t = z.flip(1).contiguous()
    t[1] = z[1]
    out = kernel.divergence(z, t, torch.tensor([0, 5]), torch.tensor(1.0), 1.0, 0.5, torch.float32)
    exact = divergence.plain(
        z.double(), t.double(), torch.tensor([0, 5]), torch.tensor(1.0), 1.0, 0.5, torch.float64
    )
    for one, other in zip(out, exact, strict=True):
        torch.testing.assert_close(one, other.float(), rtol=1e-5, atol=1e-3)
