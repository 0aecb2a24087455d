"""The custom operations: registered as PyTorch wants them, and the definition's bits under torch.compile."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor
from torch._subclasses.fake_tensor import FakeTensorMode

from axolotl_bitnet import ops, ternary


def floats() -> list[tuple[str, Tensor]]:
    generator = torch.Generator().manual_seed(3)

    def randn(*shape: int) -> Tensor:
        return torch.randn(shape, generator=generator)

    return [
        ("rank2", randn(5, 12)),
        ("rank3", randn(2, 3, 7)),
        ("rank4", randn(2, 1, 3, 9)),
        ("bf16", randn(5, 12).bfloat16()),
        ("float16", randn(5, 12).half()),
        ("transposed", randn(8, 6).t()),
        ("permuted", randn(4, 5, 6).permute(2, 0, 1)),
        ("sliced", randn(6, 20)[1:5, 2::3]),
        ("bf16 sliced", randn(6, 20).bfloat16()[1:5, 2::3]),
        ("expanded", randn(1, 9).expand(4, 9)),
        ("bf16 expanded", randn(1, 9).bfloat16().expand(4, 9)),
        ("no rows", randn(0, 8)),
    ]


by_name = pytest.mark.parametrize(
    "name, x", floats(), ids=lambda value: value if isinstance(value, str) else ""
)


@by_name
def test_opcheck_ternarize(name: str, x: Tensor) -> None:
    if x.numel():
        torch.library.opcheck(torch.ops.axolotl_bitnet.ternarize.default, (x,))


@by_name
def test_opcheck_quantize_activations(name: str, x: Tensor) -> None:
    torch.library.opcheck(torch.ops.axolotl_bitnet.quantize_activations.default, (x,))


def layout(x: Tensor) -> tuple[torch.dtype, torch.Size, list[int]]:
    """dtype, shape and the strides that mean something: those of dimensions longer than one."""
    strides = [stride for size, stride in zip(x.shape, x.stride(), strict=True) if size > 1 and x.numel()]
    return x.dtype, x.shape, strides


@by_name
def test_the_compiler_is_told_the_true_layout(name: str, x: Tensor) -> None:
    """What the fake implementations promise, strides too, is what the real ones return."""
    codes_x, r = ternary.quantize_activations(x)
    codes_w, s = ternary.ternarize(torch.randn(8, x.shape[-1]))
    registered = torch.ops.axolotl_bitnet
    for operation, tensors, rest in (
        (registered.quantize_activations, (x,), ()),
        (registered.ternarize, (x if x.numel() else codes_w.float(),), ()),
        (registered.matmul, (codes_x, r, codes_w, s), (torch.bfloat16,)),
    ):
        real = operation(*tensors, *rest)
        with FakeTensorMode() as mode:
            fake = operation(*map(mode.from_tensor, tensors), *rest)
        for one, other in zip(as_tuple(real), as_tuple(fake), strict=True):
            assert layout(one) == layout(other)


def as_tuple(result: Tensor | tuple[Tensor, ...]) -> tuple[Tensor, ...]:
    return (result,) if isinstance(result, Tensor) else tuple(result)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
@by_name
def test_opcheck_matmul(name: str, x: Tensor, dtype: torch.dtype) -> None:
    codes_x, r = ternary.quantize_activations(x)
    codes_w, s = ternary.ternarize(torch.randn(8, x.shape[-1]))
    torch.library.opcheck(torch.ops.axolotl_bitnet.matmul.default, (codes_x, r, codes_w, s, dtype))


def test_opcheck_matmul_of_one_token_without_batch() -> None:
    codes_x, r = ternary.quantize_activations(torch.randn(12))
    codes_w, s = ternary.ternarize(torch.randn(5, 12))
    torch.library.opcheck(torch.ops.axolotl_bitnet.matmul.default, (codes_x, r, codes_w, s, torch.float32))


@by_name
def test_operations_are_the_definition(name: str, x: Tensor) -> None:
    weight = torch.randn(8, x.shape[-1])
    codes_x, r = ternary.quantize_activations(x)
    codes_w, s = ternary.ternarize(weight)
    product = ternary.dequantize_output(ternary.matmul_codes(codes_x, codes_w), r, s)
    registered = torch.ops.axolotl_bitnet
    for made, expected in (
        (registered.quantize_activations(x), (codes_x, r)),
        (ops.quantize_activations(x), (codes_x, r)),
        (registered.ternarize(weight), (codes_w, s)),
        (ops.ternarize(weight), (codes_w, s)),
        ((registered.matmul(codes_x, r, codes_w, s, torch.bfloat16),), (product.bfloat16(),)),
        ((ops.matmul(codes_x, r, codes_w, s, torch.float32),), (product,)),
    ):
        for one, other in zip(made, expected, strict=True):
            assert one.dtype == other.dtype and torch.equal(one, other)


def test_eager_calls_do_not_go_through_the_dispatcher() -> None:
    """The operations cost a dispatch each; only torch.compile needs them."""
    with torch.profiler.profile(activities=[torch.profiler.ProfilerActivity.CPU]) as profile:
        codes_x, r = ops.quantize_activations(torch.randn(4, 8))
        codes_w, s = ops.ternarize(torch.randn(4, 8))
        ops.matmul(codes_x, r, codes_w, s, torch.float32)
    names = {event.key for event in profile.key_averages()}
    assert "aten::linear" in names and not any(name.startswith("axolotl_bitnet::") for name in names)


def test_compiled_operations_are_whole() -> None:
    """Three opaque calls under torch.compile, no graph break; a compiler that saw inside would fuse them."""
    graphs = []

    def backend(graph: torch.fx.GraphModule, _: list[Tensor]) -> torch.fx.GraphModule:
        graphs.append(graph)
        return graph

    @torch.compile(backend=backend, fullgraph=True)
    def layer(x: Tensor, weight: Tensor) -> Tensor:
        return ops.matmul(*ops.quantize_activations(x), *ops.ternarize(weight), torch.float32)

    x, weight = torch.randn(5, 12), torch.randn(8, 12)
    y = layer(x, weight)
    assert torch.equal(y, ops.matmul(*ops.quantize_activations(x), *ops.ternarize(weight), torch.float32))
    (graph,) = graphs
    called = [str(node.target) for node in graph.graph.nodes if node.op == "call_function"]
    for operation in ("quantize_activations", "ternarize", "matmul"):
        assert sum(f"axolotl_bitnet.{operation}" in name for name in called) == 1, called
    assert not any("round" in name or "amax" in name for name in called)
