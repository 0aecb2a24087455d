"""Compiles every launch of the kernels for an NVIDIA GPU that need not be there, and says what came out.

``python -m support.compile_kernels 90 [matmul]`` prints a JSON list, one object a launch. The launches are
the host code's own, for the shapes of real models, caught on their way to the GPU: their constants, warps
and stages are what would run, and integers and pointers are specialized as Triton specializes them.
"""

from __future__ import annotations

import itertools
import json
import re
import subprocess
import sys
import tempfile
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import torch
import triton
import triton.language as tl
from torch import Tensor
from triton.backends.compiler import GPUTarget
from triton.compiler import ASTSource

from axolotl_bitnet.ops import ShardLayout
from axolotl_bitnet.ops.kernels import (
    activations,
    decode,
    divergence,
    gradients,
    launch,
    matmul,
    matvec,
    packing,
    registers,
    rmsnorm,
    shards,
    swiglu,
    weights,
)

BF16, F32 = torch.bfloat16, torch.float32
NAMES = {F32: "fp32", BF16: "bf16", torch.float16: "fp16", torch.float64: "fp64"}
NAMES |= {torch.int8: "i8", torch.int32: "i32", torch.uint8: "u8", torch.int64: "i64"}
MULTIPROCESSORS = {80: 108, 90: 132, 120: 188}
COLUMNS = [100, 2048, 3072, 9216, 13312, 23040, 32768]  # Falcon-E, Falcon3-10B, and the longest there may be
ROWS = 8192
# Rows of the matrices and columns: q with k and v, gate with up, and down; and what fills no tile
PACKED = [([2048, 256, 256], 2048), ([13312, 13312], 2048), ([2048], 13312), ([3072], 23040), ([60], 100)]


def empty(*shape: int, dtype: torch.dtype = BF16) -> Tensor:
    return torch.empty(shape, dtype=dtype, device="meta")


def calls(arch: int) -> Iterator[tuple[str, Callable[[], Any]]]:
    """What the operations do with a training step's tensors, and with one token's."""
    for columns in COLUMNS:
        x, r, codes = empty(ROWS, columns), empty(ROWS, 1, dtype=F32), empty(ROWS, columns, dtype=torch.int8)
        yield f"quantize {columns}", lambda x=x: activations.quantize_activations(x, BF16)
        yield f"quantize {columns} float32", lambda x=x: activations.quantize_activations(x.float(), BF16)
        if columns < 32768:
            for dy in (x, x.float()):
                name = f"{columns} {dy.dtype}"
                yield f"gradient peaks {name}", lambda x=dy, r=r: gradients.gradient_peaks(x, r)
                yield (
                    f"gradient {name}",
                    lambda x=dy, r=r: gradients.quantize_gradient(x, r, r[:, 0], x[0].float()),
                )
            yield f"gradient codes {columns}", lambda c=codes: gradients.transposed_activations(c)
        yield f"dequantize {columns}", lambda c=codes, r=r: activations.dequantize_activations(c, r, BF16)
        yield f"swiglu {columns}", lambda x=x: swiglu.swiglu_quantize(x, x)
        yield f"swiglu backward {columns}", lambda x=x, r=r: swiglu.swiglu_backward(x, x, x, r)
        yield f"swiglu gradients {columns}", lambda x=x, r=r: swiglu.swiglu_gradients(x, x, x, r, r)
        if columns in (2048, 3072):
            w = empty(columns)
            yield f"rmsnorm {columns}", lambda x=x, w=w: rmsnorm.rmsnorm_quantize(x, w, 1e-6, BF16)
            yield f"rmsnorm backward {columns}", lambda x=x, w=w, r=r: rmsnorm.rmsnorm_backward(x, x, w, r)
    for dtype in (F32, BF16):
        weight, g = empty(9216, 2048, dtype=dtype), empty(dtype=F32)
        yield f"ternarize {dtype}", lambda w=weight: weights.ternarize(w)
        yield f"dequantized {dtype}", lambda w=weight, g=g: weights.dequantized_weight(w, g, BF16)
        yield f"transposed {dtype}", lambda w=weight, g=g: weights.transposed_codes(w, g)
        yield f"shard {dtype}", lambda w=weight, g=g: shards.pack_shard(w[:1152], g, 1152)
    gathered = empty(8, 288, 2048, dtype=torch.uint8)
    yield "shards to codes", lambda: shards.unpack_shards(gathered, 9216)
    yield "shards to transposed codes", lambda: shards.transposed_shards(gathered, 9216)
    yield "shards to bf16", lambda: shards.dequantize_shards(gathered, empty(dtype=F32), 9216, BF16)
    layout = ShardLayout(8, [(2048, 2048), (256, 2048), (9216, 2048), (2048, 9216)])
    yield (
        "layer to codes",
        lambda: shards.unpack_layer(empty(8, layout.packed_size, dtype=torch.uint8), layout),
    )
    yield "pack", lambda: packing.pack_codes(empty(9216, 2048, dtype=torch.int8))
    z, places = empty(512, 151936, dtype=F32), empty(512, dtype=torch.int64)
    for name, *how in (("pure", 1.0, 1.0), ("mixed", 2.0, 0.5)):
        yield f"divergence {name}", lambda h=how: divergence.divergence(z, z, places, z[0, 0], *h, BF16)
    yield "unpack", lambda: packing.unpack_codes(empty(2304, 2048, dtype=torch.uint8))

    tiles = {}
    for rows in (1, 64, ROWS):
        for columns, out in [(2048, 2048), (2048, 256), (2048, 9216), (9216, 2048), (100, 60)]:
            for dtype, bias in [(BF16, None), (BF16, BF16), (F32, None), (F32, F32), (torch.float16, None)]:
                cut = (
                    matmul.tma_tiles(rows, out, dtype.itemsize) if arch >= 90 else matmul.pointer_tiles(rows)
                )
                tiles[columns % 16, cut, dtype, bias] = rows, columns, out
    for (*_, dtype, bias), (rows, columns, out) in tiles.items():
        x, w = empty(rows, columns, dtype=torch.int8), empty(out, columns, dtype=torch.int8)
        scales = (
            empty(rows, 1, dtype=F32),
            w,
            empty(1),
            None if bias is None else empty(out, dtype=bias),
            dtype,
        )
        yield f"matmul {rows} {columns} {out} {dtype} {bias}", lambda x=x, s=scales: matmul.matmul(x, *s)

    for dtype, columns in itertools.product((BF16, F32), (13312, 2048, 256)):
        x, w = empty(ROWS, columns, dtype=torch.int8), empty(2048, columns, dtype=torch.int8)
        onto = empty(ROWS, 2048, dtype=dtype), empty(ROWS, 1, dtype=F32), empty(1)
        yield (
            f"matmul onto {columns} {dtype}",
            lambda x=x, w=w, o=onto: matmul.matmul_onto(x, o[1], w, o[2], o[0]),
        )

    z, x = empty(9216, ROWS, dtype=torch.int8), empty(2048, ROWS, dtype=torch.int8)
    for dtype in (F32, BF16):
        c = empty(9216, 1, dtype=F32)
        yield f"weight product {dtype}", lambda c=c, d=dtype: matmul.weight_product(z, c, x, d)

    few = [(rows, BF16, BF16, each) for rows in (1, 2, 4) for each in PACKED]
    few += [(16, BF16, None, each) for each in PACKED]
    few += [(3, BF16, BF16, PACKED[0]), (8, torch.float16, None, PACKED[0]), (5, F32, F32, PACKED[1])]
    for rows, dtype, bias, (sizes, columns) in few:
        x = empty(rows, columns, dtype=dtype)
        w, s = empty(sum(sizes) // 4, columns, dtype=torch.uint8), empty(len(sizes), dtype=F32)
        rest = None if bias is None else empty(sum(sizes), dtype=bias), dtype
        yield (
            f"decode {rows} {columns} {sizes} {dtype}",
            lambda x=x, w=w, s=s, n=sizes, rest=rest: decode.packed_matmul(x, w, s, n, *rest),
        )


def compiled(kernel: Any, args: tuple[Any, ...], arch: int, warps: int, stages: int) -> Any:
    signature, constants, attributes = {}, {}, {}
    for index, (parameter, value) in enumerate(zip(kernel.params, args, strict=True)):
        kind = "constexpr"
        if isinstance(value, launch.Tiled):
            kind = f"tensordesc<{NAMES[value.base.dtype]}{list(value.block_shape)}>"
        elif isinstance(value, Tensor):
            kind = f"*{NAMES[value.dtype]}"
            attributes[(index,)] = [["tt.divisibility", 16]]
        elif not parameter.is_constexpr and isinstance(value, float):
            kind = "fp32"
        elif not parameter.is_constexpr and value != 1:
            kind = "i32" if value < 2**31 else "i64"
            if value % 16 == 0:
                attributes[(index,)] = [["tt.divisibility", 16]]
        if kind == "constexpr":
            constants[(index,)] = value
        signature[parameter.name] = kind
    source = ASTSource(kernel, signature, constants, attributes)
    options = {"num_warps": warps, "num_stages": stages, "enable_fp_fusion": False}
    return triton.compile(source, target=GPUTarget("cuda", arch, 32), options=options)


def resources(cubin: bytes) -> dict[str, int]:
    """Registers and bytes of stack and local memory (that is: of spilled registers) a thread."""
    tool = Path(triton.__file__).parent / "backends" / "nvidia" / "bin" / "cuobjdump"
    with tempfile.NamedTemporaryFile(suffix=".cubin") as file:
        file.write(cubin)
        file.flush()
        command = [tool, "--dump-resource-usage", file.name]
        printed = subprocess.run(command, capture_output=True, text=True, check=True).stdout
    return {key: int(number) for key, number in re.findall(r"\b(REG|STACK|LOCAL):(\d+)", printed)}


def mma_layouts(ir: str) -> list[str]:
    """How Triton spreads the operands of inline ``mma.sync`` over threads."""
    names = set(re.findall(r"mma\.sync.*-> \(?tensor<\d+xi32, (#\w+)>", ir))
    return [line.split("= ", 1)[1] for line in ir.splitlines() if line.split(" = ")[0] in names]


def main(arch: int, only: str) -> None:
    caught: list[tuple[Any, ...]] = []

    def catch(
        kernel: Any, programs: int, device: int, key: Any, args: tuple[Any, ...], warps: int, stages: int = 3,
        overlap: bool = False,
    ) -> None:  # fmt: skip
        caught.append((kernel, args, warps, stages))

    for module in (
        activations, decode, divergence, gradients, matmul, matvec, packing, registers, rmsnorm,
        shards, swiglu, weights,
    ):  # fmt: skip
        module.launch = catch  # type: ignore[attr-defined]
    matmul._gpu = lambda index: (MULTIPROCESSORS[arch], arch >= 90, arch == 90)
    decode.overlaps = lambda index: arch >= 90  # type: ignore[attr-defined]
    tiles: list[matmul.Tiles] = []
    for name in ("launch_tma", "launch_pointers"):
        original = getattr(matmul, name)
        setattr(matmul, name, lambda *args, original=original: tiles.append(args[-1]) or original(*args))

    found = []
    for name, call in calls(arch):
        if not name.startswith(only):
            continue
        caught.clear()
        tiles.clear()
        call()
        for kernel, args, warps, stages in caught:
            binary = compiled(kernel, args, arch, warps, stages)
            assembly = binary.asm["ptx"]
            constants = {p.name: a for p, a in zip(kernel.params, args, strict=True) if p.is_constexpr}
            found.append(
                {
                    "call": name,
                    "kernel": kernel.fn.__name__,
                    "shared": binary.metadata.shared,
                    "warps": warps,
                    "tiles": tiles[0]._asdict() if tiles else {},
                    "constants": {key: str(value) for key, value in constants.items()},
                    "mma": len(re.findall(r"mma\.sync\.\S*\.[su]8\.s8", assembly)),
                    "wgmma": len(re.findall(r"wgmma\.mma_async\.\S*\.s8\.s8", assembly)),
                    "bulk": assembly.count("cp.async.bulk.tensor"),
                    "local": len(re.findall(r"\b(?:ld|st)\.local", assembly)),
                    "layouts": mma_layouts(binary.asm["ttgir"]),
                    "wide": len(re.findall(r"ld\.global\.v4\.b32", assembly)),
                    "dp4a": assembly.count("dp4a.u32.s32"),
                    "overlap": assembly.count("griddepcontrol.wait"),
                    "fused": len(re.findall(r"\bfma\.rn\.f32", assembly)),
                    **resources(binary.asm["cubin"]),
                }
            )
    print(json.dumps(found))


if __name__ == "__main__":
    assert not tl.constexpr(triton.knobs.runtime.interpret).value
    main(int(sys.argv[1]), "".join(sys.argv[2:]))
