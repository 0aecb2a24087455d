"""BitLinear: its bits, its gradients, and that everything people wrap around an nn.Linear works around it."""

from __future__ import annotations

import copy
import gc
import io
import math
import pickle
import threading
from collections.abc import Callable, Iterator

import pytest
import torch
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint
from torch.utils.weak import TensorWeakRef

from axolotl_bitnet import bitlinear as module
from axolotl_bitnet import ops, ternary
from axolotl_bitnet.bitlinear import BitLinear, bitlinear
from axolotl_bitnet.convert import convert_to_bitlinear

FLOAT32, BF16 = 2.0**-24, 2.0**-9  # half a unit in the last place, relative


def inputs() -> list[tuple[str, Tensor]]:
    generator = torch.Generator().manual_seed(11)

    def randn(*shape: int) -> Tensor:
        return torch.randn(shape, generator=generator)

    return [
        ("rank1", randn(24)),
        ("rank2", randn(5, 33)),
        ("rank3", randn(2, 3, 17)),
        ("rank4", randn(2, 3, 2, 40)),
        ("one feature", randn(4, 1)),
        ("one row", randn(1, 31)),
        ("transposed", randn(19, 7).t()),
        ("permuted", randn(9, 4, 3).permute(2, 1, 0)),
        ("sliced", randn(8, 60)[1::2, 3:50:2]),
        ("expanded", randn(1, 21).expand(6, 21)),
        ("no rows", randn(0, 8)),
        ("no rows, rank3", randn(2, 0, 8)),
    ]


by_name = pytest.mark.parametrize(
    "name, x", inputs(), ids=lambda value: value if isinstance(value, str) else ""
)


def layer_for(
    x: Tensor, out_features: int = 13, bias: bool = False, dtype: torch.dtype = torch.float32
) -> BitLinear:
    layer = BitLinear(x.shape[-1], out_features, bias=bias, dtype=dtype)
    with torch.no_grad():
        layer.weight.normal_(0, 0.05)
    return layer


def run(
    layer: Callable[[Tensor], Tensor], x: Tensor, dy: Tensor | None = None
) -> tuple[Tensor, Tensor, Tensor]:
    """y, the gradient of x and dy. The leaf has x's strides."""
    leaf = x.detach().requires_grad_()
    y = layer(leaf)
    dy = torch.randn_like(y) if dy is None else dy
    y.backward(dy)
    assert leaf.grad is not None
    return y.detach(), leaf.grad, dy


@pytest.fixture
def quantized(monkeypatch: pytest.MonkeyPatch) -> list[tuple[torch.dtype, TensorWeakRef]]:
    """The activations quantized since: the dtype each was quantized in, and a weak reference to its codes."""
    made: list[tuple[torch.dtype, TensorWeakRef]] = []
    original = ops.quantize_activations

    def counting(x: Tensor) -> tuple[Tensor, Tensor]:
        codes, r = original(x)
        made.append((x.dtype, TensorWeakRef(codes)))
        return codes, r

    monkeypatch.setattr("axolotl_bitnet.ops.quantize_activations", counting)
    return made


# The forward, to the bit


@pytest.mark.parametrize("bias", [False, True])
@pytest.mark.parametrize("weight_dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
@by_name
def test_forward_is_the_formula(
    oracle, name: str, x: Tensor, dtype: torch.dtype, weight_dtype: torch.dtype, bias: bool
) -> None:
    x = x.to(dtype)
    layer = layer_for(x, bias=bias, dtype=weight_dtype)
    y = layer(x)
    expected = torch.from_numpy(oracle.forward(x, layer.weight)).to(dtype)
    if bias:
        expected = expected + layer.bias.detach().to(dtype)
    assert y.dtype == dtype and y.shape == (*x.shape[:-1], 13)
    assert torch.equal(y, expected)


@by_name
def test_forward_approximates_the_dense_product(name: str, x: Tensor) -> None:
    """Not the same formula twice: y is near ``x . (codes_w / s)^T``, within half a code of x an element."""
    layer = layer_for(x)
    codes, s = ternary.ternarize(layer.weight.detach())
    dense = ternary.dequantize(codes, s, torch.float64)
    step = x.double().abs().amax(dim=-1, keepdim=True) / 127
    bound = (0.5 + 1e-4) * step * dense.abs().sum(dim=1) + 1e-5
    assert ((layer(x).double() - x.double() @ dense.t()).abs() <= bound).all()


def packed_layer(layer: BitLinear) -> nn.Module:
    """transformers' packed BitLinear with our codes and our scale, in float32."""
    bitnet = pytest.importorskip("transformers.integrations.bitnet")
    codes, s = ternary.ternarize(layer.weight.detach())
    packed = bitnet.BitLinear(
        layer.in_features, layer.out_features, bias=layer.bias is not None, dtype=torch.float32
    )
    packed.weight = bitnet.pack_weights(codes.clone())  # it adds 1 in place
    packed.weight_scale = s.float()
    if layer.bias is not None:
        packed.bias = layer.bias.detach()
    return packed


@pytest.fixture
def eager() -> Iterator[None]:
    """transformers decorates its functions with torch.compile, whose C++ would take minutes here."""
    with torch.compiler.set_stance("force_eager"):
        yield


@pytest.mark.parametrize("bias", [False, True])
@pytest.mark.parametrize("out_features, in_features", [(4, 1), (8, 7), (64, 64), (36, 129), (128, 640)])
def test_transformers_packed_layer_agrees_to_the_bit(
    eager: None, bias: bool, out_features: int, in_features: int
) -> None:
    layer = layer_for(torch.empty(in_features), out_features, bias)
    packed = packed_layer(layer)
    x = torch.randn(3, 50, in_features) * torch.logspace(-7, 3, 50)[:, None]  # some rows are below epsilon
    x[0, 0] = 0
    with torch.no_grad():
        y = layer(x)
        assert torch.equal(packed(x), y)
        packed.weight_scale = packed.weight_scale * (1 + 2**-7)  # and another scale would have been seen
        assert not torch.equal(packed(x), y)


# The gradients


@pytest.mark.parametrize("bias", [False, True])
@by_name
def test_gradients_in_float32(oracle, name: str, x: Tensor, bias: bool) -> None:
    layer = layer_for(x, bias=bias)
    _, dx, dy = run(layer, x)
    assert_gradients(oracle, layer, x, dx, dy, FLOAT32)


@pytest.mark.parametrize("weight_dtype", [torch.float32, torch.bfloat16])
@by_name
def test_gradients_in_bf16(oracle, name: str, x: Tensor, weight_dtype: torch.dtype) -> None:
    x = x.bfloat16()
    layer = layer_for(x, bias=True, dtype=weight_dtype)
    _, dx, dy = run(layer, x)
    assert dx.dtype == torch.bfloat16 and layer.weight.grad.dtype == weight_dtype
    assert_gradients(oracle, layer, x, dx, dy, BF16)


def assert_gradients(oracle, layer: BitLinear, x: Tensor, dx: Tensor, dy: Tensor, unit: float) -> None:
    """Against float64, element by element. Bound: a float32 sum of n terms errs by n units of sum|terms|;
    beside it up to 4 roundings, of operands and results, in the dtype that is computed in."""
    x_hat, w_hat = oracle.operands(x, layer.weight)
    rows, x_rows = dy.double().reshape(-1, layer.out_features), x_hat.reshape(-1, layer.in_features)
    exact = {"x": rows @ w_hat, "weight": rows.t() @ x_rows, "bias": rows.sum(0)}
    terms = {
        "x": rows.abs() @ w_hat.abs(),
        "weight": rows.abs().t() @ x_rows.abs(),
        "bias": rows.abs().sum(0),
    }
    counts = {"x": layer.out_features, "weight": len(rows), "bias": len(rows)}
    found = {"x": dx.reshape(-1, layer.in_features), "weight": layer.weight.grad}
    if layer.bias is not None:
        found["bias"] = layer.bias.grad
    for key, gradient in found.items():
        allowed = (4 * unit + counts[key] * FLOAT32) * terms[key]
        assert ((gradient.double() - exact[key]).abs() <= allowed).all(), key
        assert len(rows) == 0 or exact[key].abs().max() > 5 * allowed.max(), key  # the bound says something


def test_gradient_is_straight_through_not_of_the_dense_layer(oracle) -> None:
    x = torch.randn(40, 64)
    layer = layer_for(x)
    _, dx, dy = run(layer, x)
    dense_dx, dense_dw = dy @ layer.weight.detach(), dy.t() @ x
    assert (dx - dense_dx).norm() > 0.1 * dense_dx.norm()
    assert 1e-3 < (layer.weight.grad - dense_dw).norm() / dense_dw.norm() < 0.1
    # nothing is masked: latents far outside [-g, g] move as well
    with torch.no_grad():
        layer.weight[:3] *= 100
    layer.weight.grad = None
    run(layer, x, dy)
    assert (layer.weight.grad[:3] != 0).all()


def test_gradient_in_float16_does_not_overflow(oracle) -> None:
    x = torch.randn(6, 32).half()
    layer = layer_for(x, out_features=256)
    codes, _ = ternary.ternarize(layer.weight.detach())
    dy = (torch.where(codes[:, :1] >= 0, 1.0, -1.0).t() * 1000).half().expand(6, 256)
    assert not torch.isfinite(dy @ codes.half()).all()  # the sum before it is scaled
    _, dx, _ = run(layer, x, dy)
    assert torch.isfinite(dx).all()
    _, w_hat = oracle.operands(x, layer.weight)
    torch.testing.assert_close(dx.double(), dy.double() @ w_hat, rtol=2e-3, atol=2e-3 * 1000)


def test_float64_input_keeps_its_dtype(oracle) -> None:
    x = torch.randn(4, 12, dtype=torch.float64)
    y, dx, _ = run(layer_for(x), x)
    assert y.dtype == dx.dtype == torch.float64


def test_only_what_is_asked_for_gets_a_gradient() -> None:
    x = torch.randn(4, 12)
    layer = layer_for(x, bias=True)
    _, dx, dy = run(layer, x)
    dw, db = layer.weight.grad, layer.bias.grad

    layer.zero_grad()
    layer(x).backward(dy)  # x without grad
    assert torch.equal(layer.weight.grad, dw) and torch.equal(layer.bias.grad, db) and x.grad is None

    layer.zero_grad()
    layer.weight.requires_grad_(False)
    _, again, _ = run(layer, x, dy)
    assert torch.equal(again, dx) and layer.weight.grad is None and torch.equal(layer.bias.grad, db)

    layer.requires_grad_(False)
    assert not layer(x).requires_grad


def test_double_backward_is_refused() -> None:
    x = torch.randn(4, 12, requires_grad=True)
    (gradient,) = torch.autograd.grad(layer_for(x)(x).square().sum(), x, create_graph=True)
    with pytest.raises(RuntimeError, match="once_differentiable"):
        gradient.sum().backward()


def test_gradients_accumulate() -> None:
    x = torch.randn(3, 5, 12)
    layer = layer_for(x, bias=True)
    parts = []
    for part in x:
        layer.zero_grad()
        layer(part).sum().backward()
        parts.append((layer.weight.grad.clone(), layer.bias.grad.clone()))
    layer.zero_grad()
    for part in x:
        layer(part).sum().backward()
    assert torch.equal(layer.weight.grad, parts[0][0] + parts[1][0] + parts[2][0])
    assert torch.equal(layer.bias.grad, parts[0][1] + parts[1][1] + parts[2][1])


def test_a_step_between_forward_and_backward_is_refused() -> None:
    """The weight is saved, not its codes; autograd's own check must still see that it changed."""
    x = torch.randn(4, 12, requires_grad=True)
    layer = layer_for(x)
    y = layer(x)
    with torch.no_grad():
        layer.weight.add_(1)
    with pytest.raises(RuntimeError, match="modified by an inplace operation"):
        y.sum().backward()


# NaN and Inf


@pytest.mark.parametrize("bad", [math.nan, math.inf, -math.inf])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("bias", [False, True])
def test_a_bad_row_makes_that_row_nan(bad: float, dtype: torch.dtype, bias: bool) -> None:
    x = torch.randn(2, 3, 10).to(dtype)
    layer = layer_for(x, bias=bias)
    clean = layer(x)
    x[1, 0, 7] = bad
    y = layer(x)
    expected = torch.zeros(2, 3, 13, dtype=torch.bool)
    expected[1, 0] = True
    assert torch.equal(torch.isnan(y), expected)
    assert torch.equal(y[~expected], clean[~expected])


@pytest.mark.parametrize("bad", [math.nan, math.inf, -math.inf])
def test_a_bad_weight_makes_everything_nan(bad: float) -> None:
    x = torch.randn(4, 10)
    x[1] = 0
    layer = layer_for(x)
    assert torch.isfinite(layer(x)).all()
    with torch.no_grad():
        layer.weight[2, 3] = bad
    y, dx, _ = run(layer, x)
    assert torch.isnan(y).all() and torch.isnan(dx).all()


# Autocast


@pytest.mark.parametrize("weight_dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("inside", [False, True])
@pytest.mark.parametrize("bias", [False, True])
def test_autocast(weight_dtype: torch.dtype, inside: bool, bias: bool) -> None:
    x = torch.randn(6, 50)
    layer = layer_for(x, 12, bias, weight_dtype)
    y_cast, dx_cast, dy = run(layer, x.bfloat16())
    dw_cast, db_cast = layer.weight.grad, layer.bias.grad if bias else None

    layer.zero_grad()
    leaf = x.clone().requires_grad_()
    with torch.autocast("cpu", dtype=torch.bfloat16):
        y = layer(leaf)
        if inside:
            y.backward(dy)
    if not inside:
        y.backward(dy)
    assert y.dtype == torch.bfloat16 and torch.equal(y, y_cast)
    assert leaf.grad.dtype == torch.float32 and torch.equal(leaf.grad, dx_cast.float())
    assert layer.weight.grad.dtype == weight_dtype and torch.equal(layer.weight.grad, dw_cast)
    if bias:
        assert torch.equal(layer.bias.grad, db_cast)


def test_backward_of_a_float32_layer_inside_autocast(oracle) -> None:
    """The forward ran in float32; autocast around the backward alone must not round its products."""
    x = torch.randn(6, 50)
    layer = layer_for(x, 12, bias=True)
    y, dx, dy = run(layer, x)
    expected = layer.weight.grad
    layer.zero_grad()
    leaf = x.clone().requires_grad_()
    y = layer(leaf)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        y.backward(dy)
    assert torch.equal(leaf.grad, dx) and torch.equal(layer.weight.grad, expected)
    assert_gradients(oracle, layer, x, leaf.grad, dy, FLOAT32)


def test_autocast_would_lose_the_integers() -> None:
    """What the layer keeps out: under autocast a product of float32 codes comes back as bf16."""
    x = torch.randn(4, 512).bfloat16()
    layer = layer_for(x, 8)
    codes_x, _ = ternary.quantize_activations(x)
    codes_w, _ = ternary.ternarize(layer.weight.detach())
    y = layer(x)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        assert torch.equal(layer(x), y)
        rounded = nn.functional.linear(codes_x.float(), codes_w.float())
    assert rounded.dtype == torch.bfloat16
    assert not torch.equal(rounded.float(), ternary.matmul_codes(codes_x, codes_w))


# Activation checkpointing


class Attention(nn.Module):
    """q, k and v read one tensor; o reads what they make."""

    def __init__(self, bias: bool = False) -> None:
        super().__init__()
        self.q, self.k, self.v, self.o = (BitLinear(24, 24, bias=bias) for _ in range(4))

    def forward(self, x: Tensor) -> Tensor:
        return self.o(torch.sigmoid(self.q(x)) * self.k(x) + self.v(x))


@pytest.mark.parametrize("reentrant", [False, True])
@pytest.mark.parametrize("autocast", [False, True])
def test_activation_checkpointing(reentrant: bool, autocast: bool) -> None:
    layers = nn.ModuleList([Attention(bias=True), Attention()])
    x = torch.randn(3, 5, 24)

    def gradients(checkpointed: bool) -> list[Tensor]:
        layers.zero_grad()
        leaf = h = x.clone().requires_grad_()
        with torch.autocast("cpu", dtype=torch.bfloat16, enabled=autocast):
            for layer in layers:
                h = checkpoint(layer, h, use_reentrant=reentrant) if checkpointed else layer(h)
        h.square().sum().backward()
        return [h.detach(), leaf.grad, *(parameter.grad for parameter in layers.parameters())]

    plain = gradients(checkpointed=False)
    assert all(gradient.abs().max() > 0 for gradient in plain)
    for one, other in zip(plain, gradients(checkpointed=True), strict=True):
        assert torch.equal(one, other)


# Codes shared by siblings


def test_siblings_quantize_once(quantized: list) -> None:
    x = torch.randn(4, 24, requires_grad=True)
    attention = Attention()
    y = attention(x)
    assert len(quantized) == 2  # one for q, k and v, one for o
    shared = y.detach()
    gradients = torch.autograd.grad(y.sum(), [x, *attention.parameters()])

    separate = Attention()
    separate.load_state_dict(attention.state_dict())
    y = separate.o(torch.sigmoid(separate.q(x * 1)) * separate.k(x * 1) + separate.v(x * 1))
    assert len(quantized) == 6
    assert torch.equal(y, shared)
    for one, other in zip(gradients, torch.autograd.grad(y.sum(), [x, *separate.parameters()]), strict=True):
        torch.testing.assert_close(
            one, other, rtol=1e-5, atol=1e-6
        )  # dX of the three is summed in another order


def test_equal_tensors_do_not_share(quantized: list) -> None:
    x = torch.randn(4, 24)
    attention = Attention()
    kept = attention.q(x), attention.k(x.clone()), attention.v(x[:])
    assert len(quantized) == 3 and kept


@pytest.mark.parametrize("through_view", [False, True])
def test_an_in_place_change_is_seen(quantized: list, through_view: bool) -> None:
    x = torch.randn(4, 24)
    attention = Attention()
    before = attention.q(x)
    (x[1:] if through_view else x).mul_(2)
    after = attention.k(x)
    assert len(quantized) == 2
    assert torch.equal(after, attention.k(x.clone())) and not torch.equal(after, attention.k(x / 2))
    assert before.grad_fn is not None


def test_another_autocast_dtype_is_seen(quantized: list) -> None:
    x = torch.randn(4, 24)
    attention = Attention()
    kept = [attention.q(x)]
    for dtype in (torch.bfloat16, torch.float16, torch.bfloat16):
        with torch.autocast("cpu", dtype=dtype):
            kept.append(attention.q(x))
    kept.append(attention.q(x))
    assert [y.dtype for y in kept] == [
        torch.float32,
        torch.bfloat16,
        torch.float16,
        torch.bfloat16,
        torch.float32,
    ]
    assert [dtype for dtype, _ in quantized] == [y.dtype for y in kept]
    assert torch.equal(kept[0], kept[-1]) and torch.equal(kept[1], attention.q(x.bfloat16()))


def test_threads_do_not_share(quantized: list) -> None:
    x = torch.randn(4, 24)
    attention = Attention()
    kept = [attention.q(x)]
    thread = threading.Thread(target=lambda: kept.extend([attention.k(x), attention.v(x)]))
    thread.start()
    thread.join()
    assert len(quantized) == 2  # the other thread made its own, once
    kept.append(attention.v(x))
    assert len(quantized) == 2  # and did not disturb this one's
    assert torch.equal(kept[2], kept[3])


def test_many_threads_at_once() -> None:
    attention = Attention()
    xs = [torch.randn(8, 24) for _ in range(4)]
    expected = [attention(x).detach() for x in xs]
    wrong = []

    def work(index: int) -> None:
        for _ in range(20):
            x = xs[index].clone()
            if not torch.equal(attention(x).detach(), expected[index]):
                wrong.append(index)

    threads = [threading.Thread(target=work, args=(index,)) for index in range(4)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert not wrong


def test_inference_mode() -> None:
    x = torch.randn(4, 24)
    attention = Attention()
    expected = attention(x).detach()
    with torch.inference_mode():
        inside = torch.randn(4, 24)
        assert torch.equal(attention(x), expected)  # a normal tensor
        first = attention(inside)  # an inference tensor has no version
        inside.mul_(3)
        assert not torch.equal(attention(inside), first)
        assert torch.equal(attention(inside), attention(inside.clone()))
    attention(x).sum().backward()  # and nothing of it was left behind to break training
    assert attention.q.weight.grad.abs().max() > 0


def test_inference_mode_after_a_training_forward(quantized: list) -> None:
    x = torch.randn(4, 24)
    attention = Attention()
    q = attention.q(x)
    with torch.inference_mode():
        k = attention.k(x)
    v = attention.v(x)
    (q + v).sum().backward()
    assert torch.equal(k.clone(), attention.k(x).detach())


# Memory


def test_nothing_outlives_the_graph(quantized: list) -> None:
    x = torch.randn(4, 24)
    attention = Attention()
    source = TensorWeakRef(x)
    y = attention(x)
    assert all(codes() is not None for _, codes in quantized)
    y.sum().backward()
    del y, x
    gc.collect()
    assert all(codes() is None for _, codes in quantized)
    assert source() is None


def test_nothing_is_kept_without_a_graph(quantized: list) -> None:
    x = torch.randn(4, 24)
    attention = Attention()
    with torch.no_grad():
        attention(x)
    gc.collect()
    assert quantized and all(codes() is None for _, codes in quantized)


@pytest.mark.parametrize("autocast", [False, True])
@pytest.mark.parametrize("weight_dtype", [torch.float32, torch.bfloat16])
def test_what_is_saved_for_backward(autocast: bool, weight_dtype: torch.dtype) -> None:
    x = torch.randn(6, 7, 32)
    layer = layer_for(x, 20, bias=True, dtype=weight_dtype)
    leaf = x.clone().requires_grad_()
    saved: list[Tensor] = []

    def pack(tensor: Tensor) -> Tensor:
        saved.append(tensor)
        return tensor

    hooks = torch.autograd.graph.saved_tensors_hooks(pack, lambda tensor: tensor)
    with hooks, torch.autocast("cpu", dtype=torch.bfloat16, enabled=autocast):
        y = layer(leaf)
    codes, r, weight = sorted(saved, key=lambda tensor: (tensor.dtype.is_floating_point, -tensor.dim()))
    assert codes.dtype == torch.int8 and codes.shape == x.shape
    assert r.dtype == torch.float32 and r.shape == (6, 7, 1)
    assert weight.data_ptr() == layer.weight.data_ptr() and weight.shape == layer.weight.shape
    y.sum().backward()
    assert layer.weight.grad.dtype == weight_dtype


def test_siblings_save_one_set_of_codes() -> None:
    x = torch.randn(6, 24, requires_grad=True)
    attention = Attention()
    saved: list[Tensor] = []
    with torch.autograd.graph.saved_tensors_hooks(lambda t: saved.append(t) or t, lambda t: t):
        y = attention.q(x) + attention.k(x) + attention.v(x)
    codes = [tensor for tensor in saved if tensor.dtype == torch.int8]
    assert len(codes) == 3 and len({tensor.data_ptr() for tensor in codes}) == 1
    assert y.requires_grad


# What people do with modules


def test_layer_has_the_state_of_a_linear() -> None:
    layer, linear = BitLinear(12, 8), nn.Linear(12, 8)
    assert isinstance(layer, nn.Linear)
    assert layer.state_dict().keys() == linear.state_dict().keys() and not list(layer.buffers())
    layer.load_state_dict(linear.state_dict())
    assert torch.equal(layer.weight, linear.weight)


def test_copies_and_pickles_are_independent() -> None:
    x = torch.randn(4, 24)
    attention = Attention()
    y = attention(x)  # live codes in the slot
    stream = io.BytesIO()
    torch.save(attention, stream)
    stream.seek(0)
    restored = torch.load(stream, weights_only=False)
    for other in (copy.deepcopy(attention), pickle.loads(pickle.dumps(attention)), restored):
        assert type(other.q) is BitLinear and torch.equal(other(x), y)
        with torch.no_grad():
            other.q.weight.neg_()
        assert not torch.equal(other(x), y)
    assert torch.equal(attention(x), y)


def test_train_and_eval_are_the_same() -> None:
    x = torch.randn(4, 24)
    attention = Attention()
    trained = attention.train()(x)
    assert torch.equal(attention.eval()(x), trained)
    with torch.no_grad():
        assert torch.equal(attention(x), trained)


def test_functional_form() -> None:
    x = torch.randn(4, 12)
    layer = layer_for(x, bias=True)
    assert torch.equal(bitlinear(x, layer.weight, layer.bias), layer(x))
    layer.bias = None
    assert torch.equal(bitlinear(x, layer.weight), layer(x))


def test_rows_do_not_depend_on_each_other() -> None:
    """One scale a token: packing samples together, or decoding one token at a time, changes no bit."""
    x = torch.randn(2, 7, 40)
    layer = layer_for(x, bias=True)
    y = layer(x)
    assert torch.equal(layer(x.reshape(1, 14, 40)).reshape(2, 7, 13), y)
    for batch in range(2):
        for token in range(7):
            assert torch.equal(layer(x[batch, token]), y[batch, token])


def test_meta_device_gives_shapes() -> None:
    """nn.Linear does: shape inference, FLOP counting and memory estimates run on meta."""
    x = torch.empty(2, 3, 12, device="meta")
    assert nn.Linear(12, 8, device="meta")(x).shape == (2, 3, 8)
    y = BitLinear(12, 8, device="meta")(x)
    assert y.shape == (2, 3, 8) and y.is_meta


def test_generate_one_token(tiny_model) -> None:
    model = tiny_model("Llama").eval()
    prompt = torch.randint(3, 128, (2, 9))
    dense = model(prompt).logits.detach()
    convert_to_bitlinear(model)
    logits = model(prompt).logits.detach()
    assert not torch.equal(logits, dense)
    out = model.generate(prompt, attention_mask=torch.ones_like(prompt), max_new_tokens=1, do_sample=False)
    assert out.shape == (2, 10) and torch.equal(out[:, -1], logits[:, -1].argmax(-1))


def test_decoding_with_a_cache_is_decoding_without(tiny_model) -> None:
    model = tiny_model("Llama").eval()
    convert_to_bitlinear(model)
    prompt = torch.randint(3, 128, (1, 5))
    settings = dict(
        attention_mask=torch.ones_like(prompt), max_new_tokens=4, min_new_tokens=4, do_sample=False
    )
    cached = model.generate(prompt, use_cache=True, **settings)
    assert cached.shape == (1, 9)
    assert torch.equal(cached, model.generate(prompt, use_cache=False, **settings))


def test_training_lowers_the_loss(tiny_model) -> None:
    model = tiny_model("Llama")
    convert_to_bitlinear(model)
    batch = torch.randint(3, 128, (4, 12))
    optimizer = torch.optim.AdamW(model.parameters(), lr=3e-3)
    losses = []
    for _ in range(15):
        loss = model(batch, labels=batch).loss
        loss.backward()
        optimizer.step()
        optimizer.zero_grad()
        losses.append(loss.item())
    assert losses[-1] < 0.8 * losses[0]


# torch.compile


def results(layer: Callable[[Tensor], Tensor], owner: nn.Module, x: Tensor) -> list[Tensor]:
    owner.zero_grad()
    leaf = x.clone().requires_grad_()
    y = layer(leaf)
    y.square().sum().backward()
    return [y.detach(), leaf.grad, *(parameter.grad for parameter in owner.parameters())]


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_compiled_layer_is_the_eager_one(dtype: torch.dtype) -> None:
    layer = layer_for(torch.empty(24), 12, bias=True, dtype=dtype)
    compiled = torch.compile(layer, fullgraph=True)
    x = torch.randn(3, 5, 24).to(dtype)
    *eager, eager_bias = results(layer, layer, x)
    *found, found_bias = results(compiled, layer, x)
    for one, other in zip(eager, found, strict=True):  # y, dX, dW
        assert one.dtype == other.dtype and torch.equal(one, other)
    torch.testing.assert_close(found_bias, eager_bias)  # inductor adds the rows in another order


def test_compiled_siblings_take_any_length() -> None:
    """Attention under autocast, without inductor: no graph break, and one compilation for any length."""
    attention = Attention(bias=True)
    compiled = torch.compile(attention, fullgraph=True, backend="aot_eager", dynamic=True)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        for tokens in (5, 9, 2):
            x = torch.randn(3, tokens, 24)
            with torch.compiler.set_stance("default" if tokens == 5 else "fail_on_recompile"):
                found = results(compiled, attention, x)
            y, dx, *rest = results(attention, attention, x)
            assert torch.equal(found[0], y)
            for one, other in zip(found[2:], rest, strict=True):
                assert torch.equal(one, other)
            torch.testing.assert_close(found[1], dx, rtol=1e-2, atol=1e-2)  # dX of three, summed in bf16


def test_compiling_leaves_the_slot_alone(monkeypatch: pytest.MonkeyPatch) -> None:
    x = torch.randn(4, 24)
    attention = Attention()
    expected = attention(x).detach()
    monkeypatch.setattr(module, "_slot", None)
    with pytest.raises(AttributeError):
        attention(x)
    assert torch.equal(torch.compile(attention, fullgraph=True, backend="eager")(x), expected)
