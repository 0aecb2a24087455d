"""Query, key and value together: the outputs and gradients of separate layers."""

from __future__ import annotations

import copy
import pickle
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from axolotl_bitnet.layers.bitlinear import BitLinear
from axolotl_bitnet.layers.products import Backward
from axolotl_bitnet.layers.projections import project_together
from axolotl_bitnet.layers.shared_input import attach_outputs, take_output
from axolotl_bitnet.model.convert import convert_to_bitlinear
from support.layers import close

FAMILIES = ["Llama", "Mistral", "Qwen2", "Qwen3"]
NAMES = ("q_proj", "k_proj", "v_proj")


class Attention(nn.Module):
    """As transformers' modules call their projections."""

    def __init__(self, bias: bool = False, dtype: torch.dtype = torch.float32) -> None:
        super().__init__()
        for name, rows in zip(NAMES, (33, 17, 5), strict=True):
            setattr(self, name, BitLinear(21, rows, bias=bias, dtype=dtype))

    def forward(self, hidden_states: Tensor) -> list[Tensor]:
        return [getattr(self, name)(hidden_states) for name in NAMES]


def both(**settings: Any) -> tuple[Attention, Attention]:
    separate = Attention(**settings)
    together = copy.deepcopy(separate)
    together.register_forward_pre_hook(project_together, with_kwargs=True)
    return separate, together


def functions(outputs: list[Tensor]) -> int:
    return len({y.grad_fn for y in outputs})


def run(attention: Attention, x: Tensor, dys: list[Tensor]) -> tuple[list[Tensor], list[Tensor]]:
    """Outputs with the gradients of parameters, and the gradient of x."""
    leaf = x.clone().requires_grad_()
    outputs = attention(hidden_states=leaf)
    torch.autograd.backward(outputs, dys)
    exact = [*outputs, *(p.grad for p in attention.parameters())]
    return exact, [leaf.grad]


@pytest.mark.parametrize("bias", [False, True])
@pytest.mark.parametrize("precision", ["bf16", "int8_dx", "int8"])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("shape", [(21,), (5, 21), (2, 3, 21), (0, 21)], ids=str)
def test_the_separate_layers(
    shape: tuple[int, ...], dtype: torch.dtype, precision: Backward, bias: bool
) -> None:
    attentions = both(bias=bias, dtype=dtype)
    x = torch.randn(shape, dtype=dtype)
    dys = [torch.randn(*shape[:-1], rows, dtype=dtype) for rows in (33, 17, 5)]
    results = []
    for attention in attentions:
        for name in NAMES:
            getattr(attention, name).backward = precision
        results.append(run(attention, x, dys))
    (expected, dx), (found, found_dx) = results
    assert all(torch.equal(*each) for each in zip(expected, found, strict=True))
    if x.numel():
        close(found_dx, dx, 1e-6 if dtype == torch.float32 else 2e-2)


@pytest.mark.parametrize("family", FAMILIES)
def test_of_every_family(tiny_model, family: str) -> None:
    model = tiny_model(family)
    convert_to_bitlinear(model)
    convert_to_bitlinear(model)
    hooks = [h for module in model.modules() for h in module._forward_pre_hooks.values()]
    assert hooks == [project_together] * model.config.num_hidden_layers
    parts = [getattr(layer.self_attn, name) for layer in model.model.layers for name in NAMES]
    batch = torch.randint(3, 128, (2, 7))
    handles = [part.register_forward_hook(lambda *_: None) for part in parts]
    separate = model(batch, labels=batch).loss
    for handle in handles:
        handle.remove()
    left: list[int] = []

    def count(attention: nn.Module, args: Any, kwargs: dict[str, Any], outputs: Any) -> None:
        left.append(len(vars(kwargs["hidden_states"])["_axolotl_bitnet_outputs"].value))

    for layer in model.model.layers:
        layer.self_attn.register_forward_hook(count, with_kwargs=True)
    assert torch.equal(model(batch, labels=batch).loss, separate)
    assert left == [0] * model.config.num_hidden_layers  # each layer took its own


def test_one_function_where_nothing_watches() -> None:
    _, together = both()
    x = torch.randn(4, 21, requires_grad=True)
    assert functions(together(x)) == 1
    handle = together.k_proj.register_forward_hook(lambda *_: None)
    assert functions(together(x)) == 3
    handle.remove()
    together.v_proj.ramp = torch.tensor(0.5)
    assert functions(together(x)) == 3
    together.v_proj.ramp = None
    assert functions(together(x)) == 1


def test_what_is_not_trained_gets_no_gradient() -> None:
    separate, together = both(bias=True)
    for attention in (separate, together):
        attention.k_proj.weight.requires_grad_(False)
        attention.q_proj.bias.requires_grad_(False)
    x = torch.randn(4, 21)
    expected, found = (attention(x.clone().requires_grad_()) for attention in (separate, together))
    for outputs in (expected, found):
        (outputs[0].sum() + 2 * outputs[1].sum()).backward()  # and nothing reads v
    for (name, one), other in zip(separate.named_parameters(), together.parameters(), strict=True):
        assert (one.grad is None) == (other.grad is None), name
        assert one.grad is None or torch.equal(one.grad, other.grad), name
    assert together.k_proj.weight.grad is None and together.v_proj.weight.grad is None


def test_without_gradients_layers_are_separate() -> None:
    separate, together = both()
    x = torch.randn(4, 21)
    for grad in (torch.no_grad, torch.inference_mode):
        with grad():
            assert all(torch.equal(*each) for each in zip(separate(x), together(x), strict=True))
            assert not vars(x)


def test_under_autocast() -> None:
    separate, together = both()
    x = torch.randn(4, 21, requires_grad=True)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        expected, found = separate(x), together(x)
    assert functions(found) == 1 and found[0].dtype == torch.bfloat16
    assert all(torch.equal(*each) for each in zip(expected, found, strict=True))
    torch.autograd.backward(found, [torch.ones_like(y) for y in found])
    assert together.q_proj.weight.grad.dtype == torch.float32


def test_outputs_are_for_the_tensor_as_it_was() -> None:
    layer, other = nn.Linear(2, 2), nn.Linear(2, 2)
    x, y = torch.randn(3, 2), torch.randn(3, 2)
    attach_outputs(x, [layer], [y])
    assert take_output(x, other) is None and take_output(x.clone(), layer) is None
    assert take_output(copy.deepcopy(x), layer) is None
    assert take_output(pickle.loads(pickle.dumps(x)), layer) is None
    assert take_output(x, layer) is y and take_output(x, layer) is None  # once
    attach_outputs(x, [layer], [y])
    x.add_(1)
    assert take_output(x, layer) is None


def test_a_copy_of_the_model_uses_its_own_weights() -> None:
    _, together = both()
    twin = copy.deepcopy(together)
    with torch.no_grad():
        twin.q_proj.weight.neg_()
    x = torch.randn(4, 21, requires_grad=True)
    assert torch.equal(twin(x)[0], -together(x)[0])
    assert functions(twin(x)) == 1
