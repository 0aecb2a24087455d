"""The custom operations: registered as PyTorch wants them, and the definition's bits under torch.compile."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.nn.functional import silu

from axolotl_bitnet import ops, ternary
from axolotl_bitnet.layers.bitlinear import bitlinear
from axolotl_bitnet.layers.products import Backward
from support.gradients import transposed_gradient

EPS = 1e-6
OPERATIONS = [
    "ternarize",
    "dequantized_weight",
    "transposed_codes",
    "quantize_activations",
    "dequantize_activations",
    "matmul",
    "matmul_onto",
    "swiglu_quantize",
    "swiglu_backward",
    "rmsnorm_quantize",
    "rmsnorm_backward",
    "pack_codes",
    "unpack_codes",
    "unpack_shards",
    "transposed_shards",
    "dequantize_shards",
    "packed_matmul",
    "gradient_peaks",
    "quantize_gradient",
    "swiglu_gradients",
    "transposed_activations",
    "weight_product",
]
PARTS = ["project", "project_backward", "gate_and_up", "down_backward"]  # of layers: tests/test_parts.py
GRADIENTS = {"swiglu_backward", "swiglu_gradients", "rmsnorm_backward"}


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
        ("one token", randn(12)),
        ("no rows", randn(0, 8)),
    ]


by_name = pytest.mark.parametrize(
    "name, x", floats(), ids=lambda value: value if isinstance(value, str) else ""
)
by_operation = pytest.mark.parametrize("operation", OPERATIONS)
by_dtype = pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])


def arguments(operation: str, x: Tensor, dtype: torch.dtype = torch.bfloat16, bias: bool = True) -> list[Any]:
    """Arguments of an operation that grow from x, of its dtype and, where that is allowed, of its strides."""
    columns = x.shape[-1]
    latents = (x if x.dim() == 2 else x.reshape(-1, columns)) if x.numel() else torch.randn(8, columns)
    g = ternary.absmean(ternary.abs_sum(latents), latents.numel())
    up, dy = torch.randn_like(x), torch.randn_like(x)
    _, r_h = ternary.quantize_activations(silu(x) * up)
    codes_x, r_x = ternary.quantize_activations(x.contiguous())
    codes_w, s = ternary.ternarize(torch.randn(8, columns))
    four = ternary.ternarize(torch.randn(8, columns))[0]  # as many rows as bytes want
    four = four if x.is_contiguous() else four.t().contiguous().t()
    norm = torch.randn(columns).to(x.dtype)
    packed = ops.pack_codes.plain(four)[:1].expand(2, 1, -1)  # one shard of four rows, one of three
    packed = packed if x.is_contiguous() else packed.permute(2, 0, 1).contiguous().permute(1, 2, 0)
    rstd = torch.rsqrt(x.float().square().mean(-1, keepdim=True) + EPS)
    peaks = ops.gradient_peaks.plain(dy, r_x)
    of_dy = ops.quantize_gradient.plain(dy, r_x, *peaks)[2:]
    return {
        "ternarize": [latents],
        "dequantized_weight": [latents, g, dtype],
        "transposed_codes": [latents, g],
        "quantize_activations": [x, dtype, 1e-30 if bias else ternary.EPSILON],
        "dequantize_activations": [codes_x, r_x, dtype],
        "matmul": [codes_x, r_x, codes_w, s, torch.randn(8) if bias else None, dtype],
        "matmul_onto": [codes_x, r_x, codes_w, s, torch.randn(*x.shape[:-1], 8).to(dtype)],
        "swiglu_quantize": [x, up],
        "swiglu_backward": [dy, x, up, r_h],
        "swiglu_gradients": [dy, x, up, r_h, r_x],
        "gradient_peaks": [dy, r_x],
        "quantize_gradient": [dy, r_x, *peaks],
        "transposed_activations": [codes_x],
        "weight_product": [*of_dy, ops.transposed_activations.plain(codes_x), dtype],
        "rmsnorm_quantize": [x, norm, EPS, dtype],
        "rmsnorm_backward": [dy, x, norm, rstd],
        "pack_codes": [four],
        "unpack_codes": [ops.pack_codes.plain(four)],
        "unpack_shards": [packed, 7],
        "transposed_shards": [packed, 7],
        "dequantize_shards": [packed, g, 7, dtype],
        "packed_matmul": [
            *(x, torch.cat([ops.pack_codes.plain(codes_w)] * 2), torch.tensor([3.0, 0.7]), [8, 8]),
            *(torch.randn(16) if bias else None, dtype),
        ],
    }[operation]


def registered(operation: str) -> Callable[..., Any]:
    return getattr(torch.ops.axolotl_bitnet, operation)


def public(operation: str) -> Callable[..., Any]:
    return getattr(ops, operation)


def as_tuple(result: Tensor | tuple[Tensor, ...]) -> tuple[Tensor, ...]:
    return (result,) if isinstance(result, Tensor) else tuple(result)


# Registration


def test_every_operation_is_tested() -> None:
    names = torch._C._dispatch_get_all_op_names()
    prefix = "axolotl_bitnet::"
    assert sorted(n.removeprefix(prefix) for n in names if n.startswith(prefix)) == sorted(OPERATIONS + PARTS)


@pytest.mark.once
@pytest.mark.slow
@by_operation
@by_name
def test_opcheck(operation: str, name: str, x: Tensor) -> None:
    torch.library.opcheck(registered(operation).default, tuple(arguments(operation, x)))


@pytest.mark.parametrize("bias", [False, True])
@by_dtype
@pytest.mark.parametrize(
    "operation", ["dequantized_weight", "quantize_activations", "dequantize_activations", "matmul"]
)
def test_opcheck_in_every_dtype(operation: str, dtype: torch.dtype, bias: bool) -> None:
    given = tuple(arguments(operation, torch.randn(2, 3, 12), dtype, bias))
    torch.library.opcheck(registered(operation).default, given)


def layout(x: Tensor) -> tuple[torch.dtype, torch.Size, list[int]]:
    """dtype, shape and the strides that mean something: those of dimensions longer than one."""
    strides = [stride for size, stride in zip(x.shape, x.stride(), strict=True) if size > 1 and x.numel()]
    return x.dtype, x.shape, strides


@by_operation
@by_name
def test_the_compiler_is_told_the_true_layout(operation: str, name: str, x: Tensor) -> None:
    """What the fake implementations promise, strides too, is what the real ones return."""
    given = arguments(operation, x)
    real = registered(operation)(*given)
    with FakeTensorMode() as mode:
        fake = registered(operation)(
            *(mode.from_tensor(one) if isinstance(one, Tensor) else one for one in given)
        )
    for one, other in zip(as_tuple(real), as_tuple(fake), strict=True):
        assert layout(one) == layout(other)
        assert one.is_contiguous()


# Values


def definition(operation: str, given: list[Any]) -> tuple[Tensor, ...]:
    """What the operation is, by the formulas of :mod:`axolotl_bitnet.ternary`."""
    match operation, given:
        case "ternarize", [weight]:
            g = ternary.absmean(ternary.abs_sum(weight), weight.numel())
            return *ternary.ternarize(weight), g
        case "dequantized_weight", [weight, _, dtype]:
            return (ternary.dequantize(*ternary.ternarize(weight), dtype),)
        case "transposed_codes", [weight, _]:
            codes, s = ternary.ternarize(weight)
            return codes.t(), s
        case "quantize_activations", [x, dtype, floor]:
            return ternary.quantize_activations(x.to(dtype), floor)
        case "dequantize_activations", [codes, r, dtype]:
            return ((codes.float() / r).to(dtype),)
        case "matmul_onto", [codes_x, r, codes_w, s, onto]:
            return (onto + definition("matmul", [codes_x, r, codes_w, s, None, onto.dtype])[0],)
        case "matmul", [codes_x, r, codes_w, s, bias, dtype]:
            product = (codes_x.long() @ codes_w.long().t()).float()
            y = (product / (r * s.float())).to(dtype)
            return (y if bias is None else y + bias.to(dtype),)
        case "swiglu_quantize", [gate, up]:
            return ternary.quantize_activations(silu(gate) * up)
        case "rmsnorm_quantize", [x, weight, eps, dtype]:
            rstd = torch.rsqrt(x.float().square().mean(-1, keepdim=True) + eps)
            y = (x.float() * rstd).to(x.dtype) * weight
            return y, *ternary.quantize_activations(y.to(dtype)), rstd
        case "pack_codes", [codes]:
            first, *rest = (codes.long() + 1).reshape(4, -1, codes.shape[1])
            return (sum((part << 2 * i for i, part in enumerate(rest, 1)), first).to(torch.uint8),)
        case "unpack_codes", [packed]:
            return (torch.cat([(packed.long() >> shift) % 4 - 1 for shift in (0, 2, 4, 6)]).to(torch.int8),)
        case "unpack_shards", [packed, 7]:
            rows = [(packed[rank, 0].long() >> 2 * row) % 4 - 1 for rank in range(2) for row in range(4)]
            return (torch.stack(rows[:7]).to(torch.int8),)
        case "transposed_shards", [packed, 7]:
            return (definition("unpack_shards", [packed, 7])[0].t(),)
        case "dequantize_shards", [packed, g, 7, dtype]:
            (codes,) = definition("unpack_shards", [packed, 7])
            return (ternary.dequantize(codes, ternary.scale_of(g), dtype),)
        case "packed_matmul", [x, bytes, scales, sizes, bias, dtype]:
            codes_x, r = ternary.quantize_activations(x.to(dtype))
            parts = []
            for some, s in zip(bytes.split([size // 4 for size in sizes]), scales, strict=True):
                (codes_w,) = definition("unpack_codes", [some])
                parts += definition("matmul", [codes_x, r, codes_w, s, None, dtype])
            y = torch.cat(parts, dim=-1)
            return (y if bias is None else y + bias.to(dtype),)
        case "gradient_peaks", [dy, r]:
            rows = dy.reshape(-1, dy.shape[-1]).float()
            z = rows * r.reshape(-1, 1).reciprocal()
            parts = [[torch.tensor([1e-30, *some.abs().tolist()]).max() for some in m] for m in (rows, z.t())]
            return tuple(torch.stack(part) if part else torch.empty(0) for part in parts)
        case "quantize_gradient", [dy, r, _, _]:
            codes, c = transposed_gradient(dy, r)
            return *ternary.quantize_activations(dy, 1e-30), padded(codes), c
        case "transposed_activations", [codes]:
            return (padded(codes.reshape(-1, codes.shape[-1]).t()),)
        case "weight_product", [codes_z, c, codes_x, dtype]:
            return (((codes_z.long() @ codes_x.long().t()).float() / c).to(dtype),)
    raise AssertionError(f"{operation} has no definition here")


def padded(codes: Tensor) -> Tensor:
    return torch.nn.functional.pad(codes, (0, -codes.shape[1] % 16))


@pytest.mark.parametrize("operation", [name for name in OPERATIONS if name not in GRADIENTS])
@by_name
@by_dtype
def test_operations_are_the_definition(operation: str, name: str, x: Tensor, dtype: torch.dtype) -> None:
    for bias in (False, True):
        given = arguments(operation, x, dtype, bias)
        expected = definition(operation, given)
        for made in (registered(operation)(*given), public(operation)(*given)):
            for one, other in zip(as_tuple(made), expected, strict=True):
                assert one.dtype == other.dtype and torch.equal(one, other)


def test_a_lower_floor_for_small_numbers() -> None:
    x = torch.randn(5, 12) * 1e-9
    expected = ternary.quantize_activations(x, 1e-30)
    assert expected[0].any() and not ternary.quantize_activations(x)[0].any()
    for made in (
        registered("quantize_activations")(x, x.dtype, 1e-30),
        ops.quantize_activations(x, x.dtype, 1e-30),
    ):
        assert all(torch.equal(*both) for both in zip(made, expected, strict=True))
    assert not ops.quantize_activations(x, x.dtype)[0].any()


def assert_near(found: Tensor, exact: Tensor, terms: Tensor, roundings: float) -> None:
    """Within so many roundings, in found's dtype, of what was added up; beside float32's own."""
    unit = torch.finfo(found.dtype).eps / 2
    bound = (roundings * unit + 30 * 2.0**-24) * terms + torch.finfo(found.dtype).tiny
    assert found.shape == exact.shape and ((found.double() - exact).abs() <= bound).all()


@by_name
def test_swiglu_backward_is_the_gradient(name: str, x: Tensor) -> None:
    dy, gate, up, r = arguments("swiglu_backward", x)
    wide = [one.detach().double().requires_grad_() for one in (gate, up)]
    exact = torch.autograd.grad(silu(wide[0]) * wide[1], wide, dy.double())
    codes, _ = ternary.quantize_activations(silu(gate) * up)
    for function in (registered("swiglu_backward"), ops.swiglu_backward):
        dgate, dup, h = function(dy, gate, up, r)
        assert_near(dgate, exact[0], (dy * up).double().abs() * (1 + gate.double().abs()), 2)
        assert_near(dup, exact[1], exact[1].abs(), 2)
        assert h.dtype == x.dtype and torch.equal(h, ternary.dequantize(codes, r, x.dtype))


@by_name
def test_rmsnorm_backward_is_the_gradient(name: str, x: Tensor) -> None:
    dy, _, weight, rstd = arguments("rmsnorm_backward", x)
    wide = [one.detach().double().requires_grad_() for one in (x, weight)]
    normal = wide[0] * torch.rsqrt(wide[0].square().mean(-1, keepdim=True) + EPS)
    exact = torch.autograd.grad(normal * wide[1], wide, dy.double())
    normal, weighted = normal.detach().abs(), (dy.double() * wide[1].detach()).abs()
    terms = rstd.double() * (weighted + normal * (weighted * normal).mean(-1, keepdim=True))
    for function in (registered("rmsnorm_backward"), ops.rmsnorm_backward):
        dx, dw = function(dy, x, weight, rstd)
        assert_near(dx, exact[0], terms, 2)
        assert_near(dw, exact[1], (dy.double().abs() * normal).reshape(-1, x.shape[-1]).sum(0), 2)


@pytest.mark.parametrize("bad", [torch.nan, torch.inf, -torch.inf])
def test_a_bad_row_poisons_its_row_alone(bad: float) -> None:
    """In the fused operations too: codes 0 and a NaN scale, and NaN where the product was quantized."""
    x, up, weight = torch.randn(3, 8), torch.randn(3, 8), torch.ones(8)
    x[1, 2] = bad
    up[1, 2] = 1.0 if bad != -torch.inf else bad  # silu(-inf) is 0, or NaN
    codes, r = ops.swiglu_quantize(x, up)
    assert not codes[1].any() and r.isnan().flatten().tolist() == [False, True, False]
    *_, h = ops.swiglu_backward(torch.ones(3, 8), x, up, r)
    assert h[1].isnan().all() and h[[0, 2]].isfinite().all()
    _, codes, r, _ = ops.rmsnorm_quantize(x, weight, EPS, torch.bfloat16)
    assert not codes[1].any() and r.isnan().flatten().tolist() == [False, True, False]


# Eager and compiled


def test_eager_calls_do_not_go_through_the_dispatcher() -> None:
    """The operations cost a dispatch each; only torch.compile needs them."""
    with torch.profiler.profile(activities=[torch.profiler.ProfilerActivity.CPU]) as profile:
        for operation in OPERATIONS:
            public(operation)(*arguments(operation, torch.randn(4, 8)))
    names = {event.key for event in profile.key_averages()}
    assert "aten::linear" in names and not any(name.startswith("axolotl_bitnet::") for name in names)


def test_tensor_subclasses_go_through_the_dispatcher() -> None:
    """They have no data of their own to hand to a kernel; a Parameter does."""

    class Wrapped(Tensor):
        pass

    with torch.profiler.profile(activities=[torch.profiler.ProfilerActivity.CPU]) as profile:
        ops.ternarize(torch.nn.Parameter(torch.randn(4, 8)))
        codes, _, _ = ops.ternarize(torch.randn(4, 8).as_subclass(Wrapped))
    counts = {event.key: event.count for event in profile.key_averages()}
    assert counts.get("axolotl_bitnet::ternarize") == 1 and codes.shape == (4, 8)


@pytest.mark.parametrize("precision", ["bf16", "int8_dx", "int8"])
def test_compiled_operations_are_whole(precision: Backward) -> None:
    """Opaque calls under torch.compile, no graph break; a compiler that saw inside would fuse them."""
    from torch._dynamo.backends.common import aot_autograd
    from torch._functorch.aot_autograd import make_boxed_func

    graphs: list[list[str]] = []

    def keep(graph: torch.fx.GraphModule, _: list[Tensor]) -> Callable[..., Any]:
        graphs.append([str(node.target) for node in graph.graph.nodes if node.op == "call_function"])
        return make_boxed_func(graph.forward)

    x, weight = torch.randn(5, 12, requires_grad=True), torch.randn(8, 12, requires_grad=True)
    layer = torch.compile(bitlinear, fullgraph=True, backend=aot_autograd(fw_compiler=keep, bw_compiler=keep))
    y = layer(x, weight, None, precision)
    dy = torch.randn_like(y)
    found = [y, *torch.autograd.grad(y, [x, weight], dy)]
    expected = bitlinear(x, weight, None, precision)
    for one, other in zip(found, [expected, *torch.autograd.grad(expected, [x, weight], dy)], strict=True):
        assert torch.equal(one, other)

    forward, backward = ([name for name in called if "axolotl_bitnet" in name] for called in graphs)
    assert operations(forward) == ["project", "quantize_activations"]
    assert operations(backward) == ["project_backward"]
    inside = [name for called in graphs for name in called]
    assert not any(
        part in name for name in inside for part in ("round", "amax", "abs", "reciprocal", "nan_to")
    )


def operations(called: list[str]) -> list[str]:
    return sorted(name.split(".")[1] for name in called)


def test_an_operation_compiles_for_any_length() -> None:
    """Dynamic shapes: one compilation, and rows of no length that was seen before."""

    @torch.compile(fullgraph=True, dynamic=True, backend="aot_eager")
    def both(x: Tensor, weight: Tensor) -> tuple[Tensor, ...]:
        return *ops.rmsnorm_quantize(x, weight, EPS, x.dtype), *ops.swiglu_quantize(x, x + 1)

    weight = torch.randn(12)
    for tokens in (5, 9, 2):
        x = torch.randn(3, tokens, 12)
        with torch.compiler.set_stance("default" if tokens == 5 else "fail_on_recompile"):
            found = both(x, weight)
        expected = *ops.rmsnorm_quantize(x, weight, EPS, x.dtype), *ops.swiglu_quantize(x, x + 1)
        for one, other in zip(found, expected, strict=True):
            assert torch.equal(one, other)
