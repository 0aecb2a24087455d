"""Layers that read one tensor quantize it once: the codes hang on the tensor object, and go with it."""

from __future__ import annotations

import copy
import gc
import io
import pickle
import threading
from collections.abc import Callable

import pytest
import torch
from torch import Tensor
from torch.utils.checkpoint import checkpoint
from torch.utils.weak import TensorWeakRef

from axolotl_bitnet import ops, ternary
from axolotl_bitnet.layers.shared_input import share_activation_codes, shared_activation_codes
from support.layers import Attention, layer_for


@pytest.fixture
def quantized(monkeypatch: pytest.MonkeyPatch) -> list[tuple[torch.dtype, TensorWeakRef]]:
    """The activations quantized since: the dtype each was quantized in, and a weak reference to its codes."""
    made: list[tuple[torch.dtype, TensorWeakRef]] = []
    original = ops.quantize_activations

    def counting(x: Tensor, dtype: torch.dtype, *floor: float) -> tuple[Tensor, Tensor]:
        codes, r = original(x, dtype, *floor)
        made.append((dtype, TensorWeakRef(codes)))
        return codes, r

    monkeypatch.setattr("axolotl_bitnet.ops.quantize_activations", counting)
    return made


def codes_on(x: Tensor) -> list[Tensor]:
    """The tensors that hang on x."""
    held = vars(x).get("_axolotl_bitnet_codes")
    return [] if held is None else list(held.value[1:])


# Once


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
        # dX of the three is summed in another order
        torch.testing.assert_close(one, other, rtol=1e-5, atol=1e-6)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_what_is_shared_is_the_definition(dtype: torch.dtype) -> None:
    x = torch.randn(2, 5, 24, requires_grad=True)[:, 1:]
    codes, r = ternary.quantize_activations(x.detach().to(dtype))
    for _ in range(2):
        shared = shared_activation_codes(x, dtype)
        assert torch.equal(shared[0], codes) and torch.equal(shared[1], r)
        assert not any(part.requires_grad for part in shared)
    assert [id(part) for part in codes_on(x)] == [id(part) for part in shared]


def test_a_tensor_outside_the_graph_keeps_nothing(quantized: list) -> None:
    """It may be the output of a CUDA graph, whose replays write to the same object, at the same version."""
    x = torch.randn(4, 24)
    attention = Attention()
    with torch.no_grad():
        attention(x)
    assert len(quantized) == 4 and not codes_on(x)
    attention(x)  # o's input is in the graph, x is not
    assert len(quantized) == 8 and not codes_on(x)


@pytest.mark.parametrize("reentrant", [False, True])
def test_both_forwards_of_a_checkpoint_quantize_once(quantized: list, reentrant: bool) -> None:
    attention = Attention()
    x = torch.randn(4, 24, requires_grad=True)
    y = checkpoint(lambda x: attention(x * 1), x, use_reentrant=reentrant)
    first = 4 if reentrant else 2  # one for q, k and v, one for o; without a graph, one for each
    assert len(quantized) == first
    y.sum().backward()
    assert len(quantized) == first + 2


def test_a_checkpoint_finds_the_codes_of_its_input(quantized: list) -> None:
    """Codes found or codes made: the same tensors are saved, or checkpointing would refuse."""
    attention = Attention()
    x = torch.randn(4, 24, requires_grad=True)
    kept = attention.q(x)
    checkpoint(attention, x, use_reentrant=False).sum().backward()
    assert len(quantized) == 1 + 1 + 1 and kept.requires_grad  # x, o's input, o's input again


def test_codes_left_by_another_operation_are_taken(quantized: list) -> None:
    """What the fused norm does."""
    x = torch.randn(4, 24)
    attention = Attention()
    share_activation_codes(x, torch.float32, *ternary.quantize_activations(x))
    y = attention.q(x)
    assert not quantized and torch.equal(y, attention.q(x.clone()))
    assert len(quantized) == 1


# Not more than that


def test_equal_tensors_do_not_share(quantized: list) -> None:
    x = torch.randn(4, 24)
    attention = Attention()
    kept = attention.q(x), attention.k(x.clone()), attention.v(x[:])
    assert len(quantized) == 3 and kept


def test_aliases_do_not_share(quantized: list) -> None:
    x = torch.randn(4, 24)
    attention = Attention()
    ys = [attention.q(x), attention.q(x.detach()), attention.q(x.view(4, 24)), attention.q(x.data)]
    assert len(quantized) == 4 and all(torch.equal(y, ys[0]) for y in ys)


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


def test_an_in_place_change_between_forward_and_backward_is_harmless() -> None:
    """The codes are saved, and x is not: unlike nn.Linear's, this backward may go on."""
    x = torch.randn(4, 24)
    layer = layer_for(x)
    layer(x).sum().backward()
    expected = layer.weight.grad.clone()
    layer.zero_grad()
    y = layer(x)
    x.zero_()
    y.sum().backward()
    assert torch.equal(layer.weight.grad, expected)


def pickled(x: Tensor) -> Tensor:
    return pickle.loads(pickle.dumps(x))


@pytest.mark.parametrize("copied", [copy.deepcopy, copy.copy, pickled])
@pytest.mark.parametrize("changes", [0, 1, 2, 3])
@pytest.mark.parametrize("version", [0, 1, 2, 3])
def test_a_copy_of_a_tensor_never_has_stale_codes(
    version: int, changes: int, copied: Callable[[Tensor], Tensor]
) -> None:
    """Copies take a tensor's attributes along, but start counting its versions anew."""
    x = torch.randn(4, 24)
    for _ in range(version):
        x.mul_(1)
    layer = layer_for(x)
    layer(x)
    other = copied(x)
    for _ in range(changes):
        other.add_(1)
    assert torch.equal(layer(other), layer(other.clone()))


def test_a_file_of_a_tensor_holds_no_codes() -> None:
    x = torch.randn(50, 24)
    plain = len(pickle.dumps(x.clone()))
    shared_activation_codes(x, x.dtype)
    assert len(pickle.dumps(x)) < plain + 400  # the codes are 1200 bytes
    stream = io.BytesIO()
    torch.save(copy.deepcopy(x), stream)
    stream.seek(0)
    assert torch.equal(torch.load(stream), x)


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


# Threads


def test_threads_share_too(quantized: list) -> None:
    x = torch.randn(4, 24, requires_grad=True)
    attention = Attention()
    kept = [attention.q(x)]
    thread = threading.Thread(target=lambda: kept.extend([attention.k(x), attention.v(x)]))
    thread.start()
    thread.join()
    assert len(quantized) == 1
    assert torch.equal(kept[1], attention.k(x.clone())) and torch.equal(kept[2], attention.v(x.clone()))


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


def test_many_threads_on_one_tensor() -> None:
    """Two that quantize it at once make the same codes; whichever stay, all is well."""
    attention = Attention()
    for _ in range(20):
        x = torch.randn(8, 24)
        expected = attention(x.clone()).detach()
        found: list[Tensor] = []
        threads = [threading.Thread(target=lambda x=x: found.append(attention(x))) for _ in range(4)]  # noqa: B023
        for thread in threads:
            thread.start()
        for thread in threads:
            thread.join()
        assert len(found) == 4 and all(torch.equal(y, expected) for y in found)


# Inference mode and torch.compile


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


def test_inference_tensors_carry_nothing() -> None:
    """They have no version, so a change could not be seen."""
    with torch.inference_mode():
        x = torch.randn(4, 24)
        Attention()(x)
    assert not codes_on(x)


def test_compiling_leaves_the_attribute_alone() -> None:
    x = torch.randn(4, 24)
    attention = Attention()
    compiled = torch.compile(attention, fullgraph=True, backend="eager")
    y = compiled(x)
    assert not codes_on(x)
    assert torch.equal(attention(x), y)
    wrong = torch.zeros(4, 24, dtype=torch.int8), torch.ones(4, 1)
    share_activation_codes(x, torch.float32, *wrong)
    assert not torch.equal(attention(x), y)  # eager takes it
    assert torch.equal(compiled(x), y)  # compiled does not look
    assert [id(part) for part in codes_on(x)] == [id(part) for part in wrong]


# Memory


def test_nothing_outlives_the_graph_and_the_tensor(quantized: list) -> None:
    x = torch.randn(4, 24)
    attention = Attention()
    source = TensorWeakRef(x)
    y = attention(x)
    assert all(codes() is not None for _, codes in quantized)
    y.sum().backward()
    del y, x
    assert source() is None and all(codes() is None for _, codes in quantized)  # and no cycle: no gc


def test_nothing_outlives_the_tensor_without_a_graph(quantized: list) -> None:
    x = torch.randn(4, 24)
    with torch.no_grad():
        Attention()(x)
    assert len(quantized) == 4 and all(codes() is None for _, codes in quantized)


@pytest.mark.slow
def test_codes_of_an_older_version_are_let_go(quantized: list) -> None:
    x = torch.randn(4, 24, requires_grad=True) * 1
    attention = Attention()
    for _ in range(3):
        attention.q(x)
        x.add_(1)
    gc.collect()
    assert [codes() is not None for _, codes in quantized] == [False, False, True]
