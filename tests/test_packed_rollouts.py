"""A model in training that generates from 2-bit weights: BitLinear's bits, and the codes of the weights as
they are. On a CPU here, where a run leaves the layers alone; tests/gpu/test_rollouts_gpu.py has the kernels.
"""

from __future__ import annotations

import copy
from collections.abc import Callable, Iterator
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch._dynamo.testing import CompileCounter

pytest.importorskip("transformers")

from axolotl_bitnet.layers.bitlinear import BitLinear
from axolotl_bitnet.model.convert import convert_to_bitlinear
from axolotl_bitnet.plugin.upstream.trl_rollouts import roll_out_packed
from axolotl_bitnet.serving import rollouts
from axolotl_bitnet.serving.rollouts import generate_packed, packed_layers
from axolotl_bitnet.training.layer_compile import compile_layers

MakeModel = Callable[..., nn.Module]


@pytest.fixture
def products(monkeypatch: pytest.MonkeyPatch) -> Iterator[list[list[int]]]:
    """Packed layers on a CPU; the rows of the matrices of each packed product."""
    made: list[list[int]] = []
    monkeypatch.setattr(rollouts, "has_kernels", lambda weight: True)
    original = rollouts.packed_matmul

    def count(x: Tensor, packed: Tensor, s: Tensor, sizes: list[int], *rest: Any) -> Tensor:
        assert packed.dtype == torch.uint8 and packed.shape[0] * 4 == sum(sizes)
        made.append(sizes)
        return original(x, packed, s, sizes, *rest)

    monkeypatch.setattr(rollouts, "packed_matmul", count)
    yield made


def ternary(tiny_model: MakeModel, family: str, fuse: bool = True, **options: Any) -> Any:
    model = tiny_model(family, **options)
    convert_to_bitlinear(model, fuse=fuse)
    return model.eval()


def answers(model: Any, dtype: torch.dtype = torch.float32) -> tuple[Tensor, Tensor]:
    """Greedy tokens of a batch of prompts, and the logits that they were chosen by."""
    ids = torch.arange(12).reshape(3, 4) % 30 + 1
    with torch.autocast("cpu", torch.bfloat16, enabled=dtype == torch.bfloat16):
        found = model.generate(
            ids, attention_mask=torch.ones_like(ids), max_new_tokens=6, do_sample=False, pad_token_id=0,
            eos_token_id=None, return_dict_in_generate=True, output_logits=True,
        )  # fmt: skip
    return found.sequences, torch.stack(found.logits)


def same(found: tuple[Tensor, Tensor], expected: tuple[Tensor, Tensor]) -> bool:
    return all(torch.equal(one, other) for one, other in zip(found, expected, strict=True))


@pytest.mark.parametrize("fuse", [True, False])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("family", ["Llama", "Qwen2", "Qwen3", "Mistral"])
def test_rollouts_are_the_policy_s_bit_for_bit(
    family: str, dtype: torch.dtype, fuse: bool, tiny_model: MakeModel, products: list[list[int]]
) -> None:
    model = ternary(tiny_model, family, fuse)
    expected = answers(model, dtype)
    assert not products
    generate_packed(model)
    assert same(answers(model, dtype), expected)
    layers = model.config.num_hidden_layers
    assert len(products) == 4 * layers * 6  # q, k and v; o; gate and up; down: for each of six tokens
    assert {len(sizes) for sizes in products} == {1, 2, 3}
    assert not any(type(module) is rollouts._PackedBitLinear for module in model.modules())


def test_codes_are_renewed_when_weights_change(tiny_model: MakeModel, products: list[list[int]]) -> None:
    """By an optimizer, and by writes that no version counts."""
    model = ternary(tiny_model, "Llama")
    plain = copy.deepcopy(model)
    generate_packed(model)
    first = answers(model)
    ids = torch.randint(1, 30, (2, 8))
    for each in (model, plain):
        optimizer = torch.optim.AdamW(each.parameters(), lr=0.05)
        each(input_ids=ids, labels=ids).loss.backward()
        optimizer.step()
    second = answers(model)
    assert same(second, answers(plain)) and not same(second, first)
    for each in (model, plain):
        for parameter in each.parameters():
            parameter.data.mul_(-1)
    assert same(answers(model), answers(plain)) and not same(answers(model), second)


def test_gradients_are_bitlinear_s(tiny_model: MakeModel, products: list[list[int]]) -> None:
    model = ternary(tiny_model, "Llama")
    ids = torch.randint(1, 30, (2, 8))
    model(input_ids=ids, labels=ids).loss.backward()
    expected = [parameter.grad for parameter in model.parameters()]
    model.zero_grad()
    with packed_layers(model) as count:
        assert count == 14
        model(input_ids=ids, labels=ids).loss.backward()
    assert not products
    for parameter, gradient in zip(model.parameters(), expected, strict=True):
        torch.testing.assert_close(parameter.grad, gradient)


def test_layers_that_are_left_alone(tiny_model: MakeModel, products: list[list[int]]) -> None:
    """A ramp, a hook, a weight that is not there, and one that is no plain parameter."""

    class Sharded(Tensor):
        pass

    model = ternary(tiny_model, "Llama")
    first, second = (layer.self_attn for layer in model.model.layers)
    first.q_proj.ramp = torch.tensor(0.5)
    first.o_proj.register_forward_hook(lambda *_: None)
    second.v_proj.weight = nn.Parameter(torch.zeros(0))
    second.o_proj.weight = nn.Parameter(second.o_proj.weight.detach().as_subclass(Sharded))
    with packed_layers(model) as count:
        left = [module for module in model.modules() if type(module) is BitLinear]
        assert count == 10 and set(left) == {first.q_proj, first.o_proj, second.v_proj, second.o_proj}
    assert sum(type(module) is BitLinear for module in model.modules()) == 14


def test_without_kernels_nothing_is_packed(tiny_model: MakeModel) -> None:
    with packed_layers(ternary(tiny_model, "Llama")) as count:
        assert count == 0


def test_an_error_leaves_the_model_as_it_was(tiny_model: MakeModel, products: list[list[int]]) -> None:
    model = ternary(tiny_model, "Llama")
    expected = answers(model)
    state = {name: dict(vars(module)) for name, module in model.named_modules()}
    generate_packed(model)
    with pytest.raises(AttributeError):
        model.generate("no tokens")
    del model.generate
    assert same(answers(model), expected)
    for name, module in model.named_modules():
        assert vars(module).keys() == state[name].keys(), name


def test_the_outputs_of_one_x_are_not_given_for_another(
    tiny_model: MakeModel, products: list[list[int]]
) -> None:
    """Layers asked in another order, twice, for part of what they share, and with a bias."""
    attention = ternary(tiny_model, "Qwen2").model.layers[0].self_attn
    layers = [attention.q_proj, attention.k_proj, attention.v_proj]
    for layer in layers:
        nn.init.normal_(layer.bias)
    x, y = torch.randn(2, 5, 64), torch.randn(1, 64)
    order = [(0, x), (0, x), (2, y), (1, x), (1, y), (2, x), (0, y), (0, x)]
    with torch.no_grad():
        expected = [layers[place](each) for place, each in order]
        with packed_layers(attention):
            for (place, each), wanted in zip(order, expected, strict=True):
                assert torch.equal(layers[place](each), wanted)
            torch.compiler.reset()
            compiled = torch.compile(lambda each: [layer(each) for layer in layers], backend="eager")
            for each in (x, y):
                for found, layer in zip(compiled(each), layers, strict=True):
                    assert torch.equal(found, layer(each))
            torch.compiler.reset()


def test_compiled_layers_generate_as_they_are(tiny_model: MakeModel, products: list[list[int]]) -> None:
    """``torch_compile: true``: a graph for each length and layer would use up what training may compile."""
    graphs = CompileCounter()
    torch.compiler.reset()
    model = ternary(tiny_model, "Llama")
    plain = copy.deepcopy(model)
    assert compile_layers(model, backend=graphs) == 2
    generate_packed(model)
    ids, compiled = torch.randint(1, 30, (2, 8)), [0]
    for _ in range(2):
        assert same(answers(model), answers(plain))
        assert graphs.frame_count == compiled[-1]
        model(input_ids=ids, labels=ids).loss.backward()
        torch.optim.SGD(model.parameters(), lr=0.5).step()
        plain.load_state_dict(model.state_dict())
        compiled.append(graphs.frame_count)
    assert compiled[1] == compiled[2] > 0
    assert len(products) == 2 * 4 * 2 * 6
    torch.compiler.reset()


@pytest.mark.parametrize("use_vllm", [True, None])
def test_only_trainers_that_generate_here(use_vllm: bool | None, tiny_model: MakeModel) -> None:
    model = ternary(tiny_model, "Llama")
    roll_out_packed(SimpleNamespace(model=model, use_vllm=use_vllm))
    assert "generate" not in vars(model)
    roll_out_packed(SimpleNamespace(model=model, use_vllm=False))
    assert "generate" in vars(model)
    assert copy.deepcopy(model).generate.__self__ is not model


@pytest.mark.slow
def test_a_grpo_run_is_the_same_to_the_bit(
    tmp_path: Path, tiny_model: MakeModel, products: list[list[int]], monkeypatch: pytest.MonkeyPatch
) -> None:
    pytest.importorskip("axolotl.cli")
    from support.methods import save_base, settings_of
    from support.runs import train

    base = save_base(tiny_model, tmp_path / "base")
    (tmp_path / "packed").mkdir()
    (tmp_path / "plain").mkdir()
    packed = train(settings_of("grpo", tmp_path / "packed", base, max_steps=3))
    assert products
    monkeypatch.setattr(rollouts, "has_kernels", lambda weight: False)
    count = len(products)
    plain = train(settings_of("grpo", tmp_path / "plain", base, max_steps=3))
    assert len(products) == count
    assert packed.losses == plain.losses and packed.logged("reward") == plain.logged("reward")
