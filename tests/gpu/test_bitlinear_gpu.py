"""The definition on a GPU: the same codes, scales and integers as on the CPU, bit for bit."""

from __future__ import annotations

import pytest
import torch

from axolotl_bitnet.layers.bitlinear import BitLinear, bitlinear
from axolotl_bitnet.model.fingerprint import fingerprint_codes
from axolotl_bitnet.ternary import matmul_codes, quantize_activations, ternarize

pytestmark = [
    pytest.mark.gpu,
    pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA GPU"),
]

# (rows, in, out): Falcon-E 1B and 3B, bitnet-2B-4T, Falcon3-10B, and odd ones
SHAPES = [
    (64, 2048, 9216),
    (33, 13312, 2048),
    (17, 2560, 6912),
    (40, 3072, 23040),
    (1, 2048, 512),
    (3, 100, 60),
    (127, 1000, 36),
    (5, 7, 12),
]


@pytest.mark.parametrize("rows, columns, out", SHAPES)
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_codes_scales_and_products_are_the_cpu_ones(
    rows: int, columns: int, out: int, dtype: torch.dtype
) -> None:
    weight = (torch.randn(out, columns) * 0.03).to(dtype)
    x = torch.randn(rows, columns).to(dtype)
    codes_w, s = ternarize(weight)
    codes_x, r = quantize_activations(x)
    gpu_w, gpu_s = ternarize(weight.cuda())
    gpu_x, gpu_r = quantize_activations(x.cuda())
    assert torch.equal(gpu_w.cpu(), codes_w) and torch.equal(gpu_s.cpu(), s)
    assert torch.equal(gpu_x.cpu(), codes_x) and torch.equal(gpu_r.cpu(), r)
    product = codes_x.to(torch.float64) @ codes_w.to(torch.float64).t()
    assert torch.equal(matmul_codes(gpu_x, gpu_w).cpu().to(torch.float64), product)
    assert fingerprint_codes(gpu_w, gpu_s) == fingerprint_codes(codes_w, s)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_forward_is_the_cpu_one(dtype: torch.dtype) -> None:
    layer = BitLinear(256, 96)
    x = torch.randn(2, 19, 256).to(dtype)
    assert torch.equal(layer.cuda()(x.cuda()).cpu(), layer.cpu()(x))


def test_gradients_agree_with_the_cpu_under_autocast() -> None:
    weight = torch.randn(96, 256) * 0.02
    x = torch.randn(2, 40, 256)
    results = []
    for device in ("cpu", "cuda"):
        w, inputs = (t.detach().clone().to(device).requires_grad_() for t in (weight, x))
        with torch.autocast(device, torch.bfloat16):
            y = bitlinear(inputs, w)
        assert y.dtype == torch.bfloat16
        y.float().square().sum().backward()
        assert w.grad is not None and inputs.grad is not None
        results.append((y.detach().cpu(), inputs.grad.cpu(), w.grad.cpu()))
    (y_cpu, dx_cpu, dw_cpu), (y_gpu, dx_gpu, dw_gpu) = results
    assert torch.equal(y_cpu, y_gpu)
    # bfloat16 gradients: the two devices sum in another order
    assert (dx_cpu - dx_gpu).norm() < 5e-3 * dx_cpu.norm()
    assert (dw_cpu - dw_gpu).norm() < 5e-3 * dw_cpu.norm()


def test_poisoned_rows_stay_poisoned() -> None:
    layer = BitLinear(64, 32).cuda()
    x = torch.randn(40, 64, device="cuda")
    x[3, 5], x[7, 0] = torch.nan, torch.inf
    y = layer(x)
    assert y[[3, 7]].isnan().all() and y.isnan().any(dim=1).sum() == 2


def test_compiled_layer_is_the_eager_one() -> None:
    layer = BitLinear(128, 64).cuda()
    x = torch.randn(33, 128, device="cuda")
    assert torch.equal(torch.compile(layer, fullgraph=True)(x), layer(x))
