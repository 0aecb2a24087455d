"""Float32 latents: where they come from, and why they are needed."""

from __future__ import annotations

import copy
from collections.abc import Callable, Iterable

import pytest
import torch
from torch import Tensor, nn
from torch.distributed.algorithms._checkpoint.checkpoint_wrapper import checkpoint_wrapper

from axolotl_bitnet.layers.bitlinear import BitLinear
from axolotl_bitnet.model.convert import convert_to_bitlinear
from axolotl_bitnet.model.fingerprint import fingerprint_model
from axolotl_bitnet.ternary import ternarize
from axolotl_bitnet.training.latents import (
    match_reference,
    restore_low_bits,
    ternary_name_patterns,
    upcast_trainable,
)

Build = Callable[..., nn.Module]
BF16 = torch.bfloat16


def randomize(model: nn.Module) -> nn.Module:
    """Norms are 1 and biases 0 when a model is made, and bfloat16 holds those exactly."""
    with torch.no_grad():
        for parameter in model.parameters():
            if parameter.dim() == 1:
                parameter += torch.randn_like(parameter) * 0.3
    return model


def readers(model: nn.Module) -> dict[str, Callable[[], Tensor]]:
    tensors = {name: tensor.detach().clone() for name, tensor in model.state_dict().items()}
    return {name: tensor.clone for name, tensor in tensors.items()}


# upcast_trainable


def test_upcast_reaches_all_that_trains_and_nothing_else(tiny_model: Build) -> None:
    model = randomize(tiny_model("Llama")).to(BF16)
    convert_to_bitlinear(model)
    frozen = {"model.embed_tokens.weight", "model.layers.0.mlp.up_proj.weight"}
    for name in frozen:
        model.get_parameter(name).requires_grad_(False)
    before = dict(model.named_parameters())
    values = {name: parameter.detach().clone() for name, parameter in before.items()}
    trained = fingerprint_model(model)

    expected = sum(parameter.numel() for name, parameter in before.items() if name not in frozen)
    assert upcast_trainable(model) == expected
    after = dict(model.named_parameters())
    assert after.keys() == before.keys()
    for name, parameter in after.items():
        assert parameter is before[name]  # an optimizer or a wrapper may hold it already
        assert parameter.dtype == (BF16 if name in frozen else torch.float32)
        assert torch.equal(parameter.to(BF16), values[name])
    assert fingerprint_model(model) == trained
    assert upcast_trainable(model) == 0


def test_upcast_keeps_ties(tiny_model: Build) -> None:
    model = tiny_model("Llama", tie_word_embeddings=True).to(BF16)
    upcast_trainable(model)
    assert model.get_output_embeddings().weight is model.get_input_embeddings().weight
    assert model.get_output_embeddings().weight.dtype == torch.float32


@pytest.mark.parametrize("dtype", [torch.float32, BF16])
def test_adamw_step_moves_float32_latents_only(dtype: torch.dtype) -> None:
    """The reason for float32: half a unit in the last place of bfloat16 is more than a step of 1e-5."""
    layer = BitLinear(64, 64, bias=False)
    with torch.no_grad():
        layer.weight.copy_(torch.randn(64, 64).sign() * (0.01 + torch.rand(64, 64))).to(BF16)
    layer.to(BF16).to(dtype)
    before = layer.weight.detach().clone()
    optimizer = torch.optim.AdamW(layer.parameters(), lr=1e-5, weight_decay=0.0)
    for _ in range(10):
        layer(torch.randn(32, 64, dtype=dtype)).square().mean().backward()
        optimizer.step()
        optimizer.zero_grad()
    moved = float((layer.weight.detach() != before).float().mean())
    assert moved > 0.99 if dtype == torch.float32 else moved == 0


# restore_low_bits


@pytest.fixture
def loaded(tiny_model: Build) -> tuple[nn.Module, nn.Module]:
    """A float32 base, and a policy that was loaded from it in bfloat16 and upcast."""
    base = randomize(tiny_model("Llama"))
    convert_to_bitlinear(base)
    policy = copy.deepcopy(base).to(BF16)
    upcast_trainable(policy)
    return base, policy


def test_low_bits_come_back(loaded: tuple[nn.Module, nn.Module]) -> None:
    base, policy = loaded
    parameters = dict(policy.named_parameters())
    assert not any(torch.equal(parameters[name], tensor) for name, tensor in base.named_parameters())
    assert restore_low_bits(policy, readers(base), BF16) == len(parameters)
    for name, parameter in policy.named_parameters():
        assert parameter is parameters[name] and parameter.requires_grad
        assert torch.equal(parameter, base.get_parameter(name))


def test_low_bits_of_changed_tensors_stay_away(loaded: tuple[nn.Module, nn.Module]) -> None:
    """Rescaled, re-initialized or resized since, or never stored."""
    base, policy = loaded
    rescaled, resized = (f"model.layers.{index}.mlp.up_proj.weight" for index in (0, 1))
    unknown = "model.norm.weight"
    with torch.no_grad():
        policy.get_parameter(rescaled)[3, 5] *= 1.01  # one element, in the third digit
        policy.resize_token_embeddings(131)
        policy.get_submodule("model.layers.1.mlp").up_proj = BitLinear(64, 132, bias=False)
    stored = readers(base)
    del stored[unknown]
    stored["model.not_in_the_policy"] = lambda: pytest.fail("read without need")  # type: ignore[return-value]
    changed = {rescaled, resized, unknown, "model.embed_tokens.weight", "lm_head.weight"}
    before = {name: parameter.detach().clone() for name, parameter in policy.named_parameters()}
    assert changed < before.keys()
    assert restore_low_bits(policy, stored, BF16) == len(before) - len(changed)
    for name, parameter in policy.named_parameters():
        expected = before[name] if name in changed else base.get_parameter(name)
        assert torch.equal(parameter, expected), name


def test_low_bits_need_a_place(loaded: tuple[nn.Module, nn.Module]) -> None:
    """A tensor that is not float32 (frozen, so not upcast) has none; neither has one on the meta device."""
    base, policy = loaded
    name = "model.layers.0.mlp.up_proj.weight"
    policy.get_parameter(name).data = policy.get_parameter(name).data.to(BF16)
    policy.get_submodule("model.layers.1").to("meta")
    count = sum(not parameter.is_meta for parameter in policy.parameters())
    assert restore_low_bits(policy, readers(base), BF16) == count - 1
    assert policy.get_parameter(name).dtype == BF16


def test_low_bits_under_wrapped_names(loaded: tuple[nn.Module, nn.Module]) -> None:
    base, policy = loaded
    layers = policy.get_submodule("model.layers")
    layers[0] = checkpoint_wrapper(layers[0])
    assert any("_checkpoint_wrapped_module" in name for name, _ in policy.named_parameters())
    assert restore_low_bits(policy, readers(base), BF16) == len(list(base.parameters()))


# match_reference


def logits(model: nn.Module) -> Tensor:
    ids = torch.arange(40).reshape(2, 20) * 3 % 128
    with torch.no_grad(), torch.autocast("cpu", dtype=BF16):
        return model(ids).logits


@pytest.mark.parametrize("stored", [torch.float32, BF16])
@pytest.mark.parametrize(
    ("family", "options"),
    [("Llama", {"attention_bias": True, "mlp_bias": True, "tie_word_embeddings": True}), ("Qwen3", {})],
)
def test_rewards_start_at_zero(
    tiny_model: Build, family: str, options: dict[str, bool], stored: torch.dtype
) -> None:
    """As in DPO: both models loaded in bfloat16 from one base, and the policy then given float32."""
    base = randomize(tiny_model(family, **options)).to(stored)
    convert_to_bitlinear(base)
    policy, reference = copy.deepcopy(base).to(BF16), copy.deepcopy(base).to(BF16).requires_grad_(False)
    upcast_trainable(policy)
    restore_low_bits(policy, readers(base) if stored == torch.float32 else {}, BF16)
    assert not torch.equal(logits(policy), logits(reference))

    ternary = {
        f"{name}.weight" for name, module in reference.named_modules() if isinstance(module, BitLinear)
    }
    held = dict(reference.named_parameters())
    match_reference(policy, reference)
    assert torch.equal(logits(policy), logits(reference))
    for name, parameter in reference.named_parameters():
        assert parameter is held[name] and not parameter.requires_grad
        assert parameter.dtype == (BF16 if name in ternary else torch.float32)
        assert parameter.data_ptr() != policy.get_parameter(name).data_ptr()


def test_reference_does_not_follow_the_policy(tiny_model: Build) -> None:
    policy = randomize(tiny_model("Llama"))
    convert_to_bitlinear(policy)
    reference = copy.deepcopy(policy).to(BF16)
    match_reference(policy, reference)
    before = logits(reference)
    with torch.no_grad():
        for parameter in policy.parameters():
            parameter += 0.1
    assert torch.equal(logits(reference), before)
    assert not torch.equal(logits(policy), before)


def test_reference_with_other_shapes_is_left(tiny_model: Build) -> None:
    policy, reference = tiny_model("Llama"), tiny_model("Llama", vocab_size=96).to(BF16)
    convert_to_bitlinear(policy)
    convert_to_bitlinear(reference)
    match_reference(policy, reference)
    assert reference.get_parameter("lm_head.weight").shape == (96, 64)
    assert reference.get_parameter("lm_head.weight").dtype == BF16
    assert reference.get_parameter("model.norm.weight").dtype == torch.float32


# ternary_name_patterns


def check_patterns(model: nn.Module, patterns: Iterable[str]) -> None:
    """Exactly the BitLinear weights match, as Axolotl matches them: a string in a name."""
    ternary = {
        parameter
        for module in model.modules()
        if isinstance(module, BitLinear)
        for parameter in [module.weight]
    }
    assert ternary
    for name, parameter in model.named_parameters():
        assert any(pattern in name for pattern in patterns) == (parameter in ternary), name


SKIPS = [
    [],
    ["down_proj"],
    ["model.layers.1"],
    ["model.layers.0.self_attn", "model.layers.1.mlp.up_proj"],
    ["model.layers.1.self_attn.o_proj"],
]


@pytest.mark.parametrize("skip", SKIPS, ids=str)
@pytest.mark.parametrize("family", ["Llama", "Qwen3", "BitNet"])
def test_patterns(tiny_model: Build, family: str, skip: list[str]) -> None:
    model = tiny_model(family, num_hidden_layers=12)  # layers.1 and layers.11
    convert_to_bitlinear(model, skip)
    patterns = ternary_name_patterns(model)
    check_patterns(model, patterns)
    if not skip:
        assert len(patterns) == 7  # q, k, v, o, gate, up, down: no layer by layer list


def test_patterns_with_biases(tiny_model: Build) -> None:
    model = tiny_model("Llama", attention_bias=True, mlp_bias=True)
    convert_to_bitlinear(model)
    check_patterns(model, ternary_name_patterns(model))


def wrap(model: nn.Module, inner: bool) -> None:
    """Activation checkpointing as FSDP1 (whole layers) or Accelerate's FSDP2 (what is in them) applies it."""
    layers = model.get_submodule("model.layers")
    for index, layer in enumerate(layers):
        if inner:
            layer.self_attn, layer.mlp = checkpoint_wrapper(layer.self_attn), checkpoint_wrapper(layer.mlp)
        else:
            layers[index] = checkpoint_wrapper(layer)
    assert any("_checkpoint_wrapped_module" in name for name, _ in model.named_parameters())


@pytest.mark.parametrize("skip", SKIPS, ids=str)
@pytest.mark.parametrize("inner", [False, True], ids=["layers", "parts"])
def test_patterns_of_a_wrapped_model(tiny_model: Build, skip: list[str], inner: bool) -> None:
    model = tiny_model("Llama")
    convert_to_bitlinear(model, skip)
    wrap(model, inner)
    check_patterns(model, ternary_name_patterns(model))


@pytest.mark.parametrize("skip", [[], ["down_proj"]], ids=str)
def test_patterns_of_a_model_that_is_wrapped_later(tiny_model: Build, skip: list[str]) -> None:
    model = tiny_model("Llama")
    convert_to_bitlinear(model, skip)
    patterns = ternary_name_patterns(model)
    wrap(model, inner=False)
    check_patterns(model, patterns)


def test_patterns_where_a_dense_name_ends_alike() -> None:
    """``proj.weight`` is in ``o_proj.weight``."""
    block = nn.ModuleDict({"proj": BitLinear(8, 8), "o_proj": nn.Linear(8, 8), "norm": nn.LayerNorm(8)})
    model = nn.ModuleDict({"layers": nn.ModuleList([block, copy.deepcopy(block)])})
    patterns = ternary_name_patterns(model)
    assert patterns == ["layers.0.proj.weight", "layers.1.proj.weight"]
    check_patterns(model, patterns)


def test_ternary_codes_do_not_depend_on_the_latents_dtype() -> None:
    weight = torch.randn(64, 48)
    assert not torch.equal(weight, weight.to(BF16))
    for ours, theirs in zip(ternarize(weight), ternarize(weight.to(BF16)), strict=True):
        assert torch.equal(ours, theirs)
