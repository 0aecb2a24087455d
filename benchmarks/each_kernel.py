"""Each kernel against plain torch, onebitllms and its roofline.

The roofline of a matrix product is cuBLAS bfloat16 on the same shape (``x_reference``); of everything else, a
copy of the same number of bytes, measured in the same run. The L2 cache is flushed between runs.

    python benchmarks/each_kernel.py --out benchmarks/results/each_kernel.csv
"""

from __future__ import annotations

import argparse
from collections.abc import Callable, Iterator
from functools import partial
from pathlib import Path
from typing import Any

import torch
from common import RESULTS, machine, write_csv
from torch import Tensor
from triton.testing import do_bench

from axolotl_bitnet import ops

MATRICES = {  # name: out_features, in_features
    "1B/3B q, o": (2048, 2048),
    "1B/3B k, v": (256, 2048),
    "1B gate, up": (9216, 2048),
    "1B down": (2048, 9216),
    "3B gate, up": (13312, 2048),
    "3B down": (2048, 13312),
    "bitnet-2B gate, up": (6912, 2560),
    "bitnet-2B down": (2560, 6912),
    "Falcon3-10B gate, up": (23040, 3072),
    "Falcon3-10B down": (3072, 23040),
}
Run = Callable[[], object]


def microseconds(run: Run) -> float:
    """Median of a kernel's time on the GPU."""
    return do_bench(run, warmup=8, rep=25, return_mode="median") * 1e3


def random(*shape: int, scale: float = 1.0) -> Tensor:
    return (torch.randn(*shape, device="cuda") * scale).to(torch.bfloat16)


def copy_of(nbytes: float) -> Run:
    """A copy that reads and writes so many bytes in all."""
    source = torch.randint(256, (int(nbytes / 2),), dtype=torch.uint8, device="cuda")
    return partial(torch.empty_like(source).copy_, source)


def compare(
    kernel: str, shape: str, rate: Callable[[float], str], reference: Run, **runs: Run
) -> dict[str, Any]:
    """One row: microseconds of the reference, of ours, and of each other run that succeeds."""
    took = {"onebitllms": ""}
    for name, run in runs.items():
        try:
            took[name] = f"{microseconds(run):.1f}"
        except Exception as error:  # a peer that cannot is a result too
            print(f"{kernel} {shape} {name}: {type(error).__name__}: {error}"[:200])
    roof, ours = microseconds(reference), float(took["ours"])
    row = dict(kernel=kernel, shape=shape, us=took["ours"], torch_us=took["torch"])
    row |= dict(onebitllms_us=took["onebitllms"], reference_us=f"{roof:.1f}")
    row |= dict(x_reference=f"{roof / ours:.2f}", rate=rate(ours))
    print(*row.values(), flush=True)
    return row


def matmuls(tokens: int) -> Iterator[dict[str, Any]]:
    for name, (out_features, columns) in MATRICES.items():
        x, w = random(tokens, columns), random(out_features, columns, scale=0.02)
        codes_w, s, _ = ops.ternarize(w)
        args = (*ops.quantize_activations(x, x.dtype), codes_w, s, None, torch.bfloat16)
        operations = 2 * tokens * out_features * columns
        yield compare(
            "matmul",
            f"{name}: {tokens} x {out_features} x {columns}",
            lambda us, n=operations: f"{n / us / 1e6:.0f} TOP/s",
            partial(torch.nn.functional.linear, x, w),
            ours=partial(ops.matmul, *args),
            torch=partial(ops.matmul.plain, *args),
        )


def passes(tokens: int) -> Iterator[dict[str, Any]]:
    """Everything that reads and writes once."""
    from onebitllms import activation_quant_triton, weight_quant_triton

    def of(name: str, shape: str, nbytes: float, *args: Any, **peers: Run) -> dict[str, Any]:
        operation = getattr(ops, name)
        ours, twin = partial(operation, *args), partial(operation.plain, *args)
        rate = partial("{:.2f} TB/s".format)
        return compare(
            name, shape, lambda us: rate(nbytes / us / 1e6), copy_of(nbytes), ours=ours, torch=twin, **peers
        )

    for columns in (2048, 9216, 13312):
        x, y, n = random(tokens, columns), random(tokens, columns), tokens * columns
        shape = f"{tokens} x {columns}"
        codes, r = ops.quantize_activations(x, x.dtype)
        peer = partial(activation_quant_triton, x[None])  # needs a batch
        yield of("quantize_activations", shape, 3 * n, x, x.dtype, onebitllms=peer)
        yield of("dequantize_activations", shape, 3 * n, codes, r, x.dtype)
        if columns > 2048:
            yield of("swiglu_quantize", shape, 5 * n, x, y)
            yield of("swiglu_backward", shape, 12 * n, x, x, y, r)
        else:
            w = random(columns)
            rstd = ops.rmsnorm_quantize(x, w, 1e-5, x.dtype)[3]
            yield of("rmsnorm_quantize", shape, 5 * n, x, w, 1e-5, x.dtype)
            yield of("rmsnorm_backward", shape, 6 * n, y, x, w, rstd)
    for name in ("1B/3B q, o", "1B gate, up", "3B gate, up"):
        for dtype in (torch.bfloat16, torch.float32):
            w = random(*MATRICES[name], scale=0.02).to(dtype)
            shape, n = f"{name} {str(dtype).removeprefix('torch.')}", w.numel()
            peer = partial(weight_quant_triton, w)
            codes, _, g = ops.ternarize(w)
            yield of("ternarize", shape, (2 * w.itemsize + 1) * n, w, onebitllms=peer)
            yield of("dequantized_weight", shape, (w.itemsize + 2) * n, w, g, torch.bfloat16)
            yield of("transposed_codes", shape, (w.itemsize + 1) * n, w, g)
    yield of("pack_codes", "3B gate, up", 1.25 * n, codes)
    yield of("unpack_codes", "3B gate, up", 1.25 * n, ops.pack_codes(codes))


def gradients(tokens: int) -> Iterator[dict[str, Any]]:
    """What an 8-bit backward adds: gradients to codes, transposed, and the product over the tokens."""
    rate = "{:.2f} TB/s".format
    for name in ("1B/3B k, v", "1B/3B q, o", "1B gate, up", "3B gate, up", "3B down"):
        out, columns = MATRICES[name]
        dy, x = random(tokens, out, scale=1e-4), random(tokens, columns)
        codes, r = ops.quantize_activations(x, x.dtype)
        peaks = ops.gradient_peaks(dy, r)
        _, _, z, c = ops.quantize_gradient(dy, r, *peaks)
        passes: list[tuple[str, int, tuple[Any, ...]]] = [
            ("gradient_peaks", 2 * dy.numel(), (dy, r)),
            ("quantize_gradient", 4 * dy.numel(), (dy, r, *peaks)),
            ("transposed_activations", 2 * x.numel(), (codes,)),
        ]
        if out > columns:
            gate, up = random(tokens, out), random(tokens, out)
            _, r_h = ops.swiglu_quantize(gate, up)
            passes.append(("swiglu_gradients", 11 * dy.numel(), (dy, gate, up, r_h, r)))
        for operation, nbytes, args in passes:
            call = getattr(ops, operation)
            runs = dict(ours=partial(call, *args), torch=partial(call.plain, *args))
            shape = f"{tokens} x {codes.shape[-1] if operation.endswith('activations') else out}"
            yield compare(operation, shape, lambda us, n=nbytes: rate(n / us / 1e6), copy_of(nbytes), **runs)
        product = partial(ops.weight_product, z, c, ops.transposed_activations(codes), torch.bfloat16)
        operations = 2 * tokens * out * columns
        yield compare(
            "weight_product",
            f"{name}: {out} x {columns} x {tokens}",
            lambda us, n=operations: f"{n / us / 1e6:.0f} TOP/s",
            partial(torch.matmul, dy.t(), x),
            ours=product,
            torch=partial(torch.matmul, dy.t(), x),
        )


GROUPS = {"matmuls": matmuls, "passes": passes, "gradients": gradients}


def main() -> None:
    parser = argparse.ArgumentParser(
        description="Each kernel against plain torch, onebitllms and its roofline."
    )
    parser.add_argument("--groups", nargs="+", choices=GROUPS, default=list(GROUPS))
    parser.add_argument("--tokens", type=int, default=8192)
    parser.add_argument("--out", type=Path, default=RESULTS / "each_kernel.csv")
    args = parser.parse_args()
    print(machine())
    write_csv(args.out, [row for group in args.groups for row in GROUPS[group](args.tokens)])


if __name__ == "__main__":
    main()
