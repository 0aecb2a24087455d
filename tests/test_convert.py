"""Which layers of which models become ternary, what is refused and how, and what the swap leaves alone."""

from __future__ import annotations

import contextlib
import json
import re
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from axolotl_bitnet.layers.bitlinear import BitLinear, bitlinear
from axolotl_bitnet.model.convert import convert_to_bitlinear
from axolotl_bitnet.model.entry import CONFIG_KEY
from axolotl_bitnet.model.layer_plan import ConversionError, Plan, plan_conversion
from axolotl_bitnet.ternary import DEFINITION

transformers = pytest.importorskip("transformers")

ATTENTION = ["q_proj", "k_proj", "v_proj", "o_proj"]
MLP = ["gate_proj", "up_proj", "down_proj"]


def layers_of(*groups: tuple[str, list[str]], layers: int = 2) -> list[str]:
    return [
        f"model.layers.{i}.{group}.{name}" for i in range(layers) for group, names in groups for name in names
    ]


DECODER = layers_of(("self_attn", ATTENTION), ("mlp", MLP))


def ternary_of(model: nn.Module) -> list[str]:
    return [name for name, module in model.named_modules() if type(module) is BitLinear]


def refusal(model: nn.Module, skip_modules: Any = ()) -> str:
    """The message of the refusal; the model must be untouched by it."""
    kinds = [type(module) for module in model.modules()]
    with pytest.raises(ConversionError) as caught:
        convert_to_bitlinear(model, skip_modules)
    assert [type(module) for module in model.modules()] == kinds
    assert not hasattr(getattr(model, "config", None), CONFIG_KEY)
    return str(caught.value)


# Which layers


@pytest.mark.parametrize("family", ["Llama", "Qwen3", "Qwen2", "BitNet", "Mistral"])
def test_decoders(tiny_model, family: str) -> None:
    model = tiny_model(family)
    others = {name: type(m) for name, m in model.named_modules() if name not in DECODER}
    assert convert_to_bitlinear(model, fuse=False) == DECODER == ternary_of(model)
    assert {name: type(m) for name, m in model.named_modules() if name not in DECODER} == others
    assert type(model.lm_head) is nn.Linear
    assert model.config.axolotl_bitnet == {
        "definition": DEFINITION,
        "converted": DECODER,
        "dense": ["lm_head"],
    }
    logits = model(torch.randint(3, 128, (2, 6))).logits
    assert torch.isfinite(logits).all()


def test_norms_inside_the_layers_stay(tiny_model) -> None:
    qwen, bitnet = tiny_model("Qwen3"), tiny_model("BitNet")
    kept = {id(m) for m in (*qwen.modules(), *bitnet.modules()) if type(m).__name__.endswith("RMSNorm")}
    convert_to_bitlinear(qwen)
    convert_to_bitlinear(bitnet)
    assert qwen.model.layers[0].self_attn.q_norm.weight.shape == (16,)
    assert bitnet.model.layers[0].self_attn.attn_sub_norm.weight.shape == (64,)
    assert bitnet.model.layers[1].mlp.ffn_sub_norm.weight.shape == (128,)
    assert {
        id(m) for m in (*qwen.modules(), *bitnet.modules()) if type(m).__name__.endswith("RMSNorm")
    } == kept


def test_biases_are_kept(tiny_model) -> None:
    model = tiny_model("Llama", attention_bias=True)
    bias = model.model.layers[0].self_attn.q_proj.bias
    convert_to_bitlinear(model)
    assert model.model.layers[0].self_attn.q_proj.bias is bias


def test_tied_model(tiny_model) -> None:
    model = tiny_model("Llama", tie_word_embeddings=True)
    assert model.lm_head.weight is model.model.embed_tokens.weight
    assert convert_to_bitlinear(model) == DECODER
    assert type(model.lm_head) is nn.Linear and model.lm_head.weight is model.model.embed_tokens.weight


@pytest.mark.parametrize("family", ["Llama", "Qwen3"])
@pytest.mark.parametrize("labels", [1, 4])
def test_reward_model(tiny_model, family: str, labels: int) -> None:
    model = tiny_model(family, "SequenceClassification", num_labels=labels)
    assert convert_to_bitlinear(model) == DECODER
    assert type(model.score) is nn.Linear
    assert model.config.axolotl_bitnet["dense"] == ["score"]


@pytest.mark.parametrize("name", ["lm_head", "embed_out", "score", "classifier"])
def test_heads_by_name(name: str) -> None:
    model = nn.Module()
    model.body = nn.Linear(8, 8)
    model.add_module(name, nn.Linear(8, 8))
    assert convert_to_bitlinear(model) == ["body"]


def test_head_by_getter() -> None:
    """A head with a name nobody foresaw is found by get_output_embeddings."""

    class Model(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.body, self.vocabulary = nn.Linear(8, 8), nn.Linear(8, 16)

        def get_output_embeddings(self) -> nn.Module:
            return self.vocabulary

    assert plan_conversion(Model()).dense == ["vocabulary"]
    assert convert_to_bitlinear(Model()) == ["body"]


def test_towers_and_routers_stay_dense() -> None:
    model = nn.ModuleDict(
        {
            "vision_tower": nn.ModuleDict({"q_proj": nn.Linear(8, 8)}),
            "visual": nn.Sequential(nn.Linear(8, 8)),
            "audio_tower": nn.Sequential(nn.Linear(8, 8)),
            "multi_modal_projector": nn.ModuleDict({"linear_1": nn.Linear(8, 8)}),
            "language_model": nn.ModuleDict(
                {
                    "gate": nn.Linear(8, 4),
                    "router": nn.Linear(8, 4),
                    "shared_expert_gate": nn.Linear(8, 1),
                    "gate_proj": nn.Linear(8, 8),
                }
            ),
        }
    )
    plan = plan_conversion(model)
    assert plan.converted == ["language_model.gate_proj"] and len(plan.dense) == 7
    assert ternary_of(model) == []  # a plan touches nothing


def test_vision_language_model_on_meta() -> None:
    text = dict(
        hidden_size=64, intermediate_size=128, num_hidden_layers=1, num_attention_heads=4, vocab_size=128
    )
    vision = dict(
        hidden_size=32, intermediate_size=64, num_hidden_layers=1, num_attention_heads=2, image_size=8
    )
    config = transformers.LlavaConfig(
        text_config=transformers.LlamaConfig(**text),
        vision_config=transformers.CLIPVisionConfig(patch_size=4, **vision),
    )
    with torch.device("meta"):
        model = transformers.LlavaForConditionalGeneration(config)
    converted = convert_to_bitlinear(model)
    assert len(converted) == 7 and all("language_model.layers.0." in name for name in converted)
    dense = model.config.axolotl_bitnet["dense"]
    assert "lm_head" in dense and any("vision_tower" in name for name in dense)
    assert any("projector" in name for name in dense)


def test_names_that_a_checkpoint_spells_otherwise(monkeypatch: pytest.MonkeyPatch, tiny_model) -> None:
    """transformers renames the towers of vision-language models when it saves them."""
    from transformers import core_model_loading

    def saved(_: Any, tensors: dict[str, Tensor]) -> dict[str, Tensor]:
        return {
            name.replace("model.layers.", "text.model.layers.").replace("0.mlp.", "0.ffn."): tensor
            for name, tensor in tensors.items()
        }

    monkeypatch.setattr(core_model_loading, "revert_weight_conversion", saved)
    model = tiny_model("Llama")
    names = convert_to_bitlinear(model)
    entry = model.config.axolotl_bitnet
    plan = Plan(entry["converted"], entry["dense"], entry["saved_as"])
    for name in names:
        (key,) = saved(model, {f"{name}.weight": None})
        assert plan.stem(name, {key}) == key.removesuffix(".weight")
        assert plan.stem(name, {f"{name}.weight"}) == name  # merged shards keep the model's own names
    assert len(entry["saved_as"]) == 2


@pytest.mark.parametrize("saved", [["up.weight", "gate.weight"], ["up.qkv"]])
def test_a_layer_saved_in_another_form_is_refused(
    monkeypatch: pytest.MonkeyPatch, tiny_model, saved: list[str]
) -> None:
    from transformers import core_model_loading

    monkeypatch.setattr(core_model_loading, "revert_weight_conversion", lambda *_: dict.fromkeys(saved))
    assert f"q_proj is saved as {', '.join(saved)}, which could not be packed" in refusal(tiny_model("Llama"))


# Microsoft's layers, as transformers loads them


def saved_bitnet(tiny_model, folder: Path, **quantization: Any) -> Path:
    model = tiny_model("BitNet").to(torch.bfloat16)
    model.save_pretrained(folder)
    config = json.loads((folder / "config.json").read_text())
    config["quantization_config"] = {"quant_method": "bitnet", **quantization}
    (folder / "config.json").write_text(json.dumps(config))
    return folder


def test_auto_bitlinear_online_becomes_bitlinear(tiny_model, tmp_path: Path) -> None:
    settings = dict(linear_class="autobitlinear", quantization_mode="online")
    folder = saved_bitnet(tiny_model, tmp_path / "base", **settings)
    model = transformers.AutoModelForCausalLM.from_pretrained(folder, dtype=torch.bfloat16)
    assert type(model.model.layers[0].mlp.up_proj).__name__ == "AutoBitLinear"
    weights = {name: model.get_submodule(name).weight for name in DECODER}
    keys = list(model.state_dict())
    assert convert_to_bitlinear(model) == DECODER == ternary_of(model)
    for name, weight in weights.items():
        layer = model.get_submodule(name)
        assert layer.weight is weight
        left = set(vars(layer)) - set(vars(BitLinear(4, 4))) - {"_is_hf_initialized"}
        assert not left, "something of AutoBitLinear is left"
        assert not layer._load_state_dict_pre_hooks
    assert list(model.state_dict()) == keys and not any("scale" in key for key in keys)
    assert torch.isfinite(model(torch.randint(3, 128, (1, 6))).logits).all()

    # transformers takes it for the plain model that it is now: it can be trained and saved
    assert not getattr(model, "is_quantized", False) and not hasattr(model, "hf_quantizer")
    assert not hasattr(model.config, "quantization_config")
    model.train()(torch.randint(3, 128, (1, 6))).logits.sum().backward()
    assert model.model.layers[0].mlp.up_proj.weight.grad.abs().max() > 0

    # what is saved can be loaded and converted again: the same latents, the same output
    ids = torch.randint(3, 128, (1, 6))
    model.save_pretrained(tmp_path / "trained")
    assert "quantization_config" not in json.loads((tmp_path / "trained" / "config.json").read_text())
    again = transformers.AutoModelForCausalLM.from_pretrained(tmp_path / "trained", dtype=torch.bfloat16)
    convert_to_bitlinear(again)
    assert torch.equal(again(ids).logits, model(ids).logits)


def test_auto_bitlinear_offline_is_refused() -> None:
    bitnet = transformers.integrations.bitnet
    model = nn.ModuleDict({"proj": bitnet.AutoBitLinear(8, 8, bias=False, online_quant=False)})
    assert "proj holds " in refusal(model) and "weight_scale" in refusal(model)


def test_auto_bitlinear_with_its_own_norm_is_refused() -> None:
    bitnet = transformers.integrations.bitnet
    model = nn.ModuleDict(
        {"proj": bitnet.AutoBitLinear(8, 8, bias=False, online_quant=True, use_rms_norm=True)}
    )
    assert "proj normalizes inside the layer" in refusal(model)


def test_packed_layers_are_refused() -> None:
    bitnet = transformers.integrations.bitnet
    model = nn.ModuleDict(
        {"proj": bitnet.BitLinear(8, 8, bias=False, dtype=torch.bfloat16), "o": nn.Linear(8, 8)}
    )
    message = refusal(model)
    assert re.search("proj is .*packed to 2 bits", message) and "\n  o " not in message


def test_auto_bitlinear_in_a_model_without_config() -> None:
    bitnet = transformers.integrations.bitnet
    model = nn.ModuleDict({"proj": bitnet.AutoBitLinear(8, 8, bias=False, online_quant=True)})
    assert convert_to_bitlinear(model) == ["proj"] == ternary_of(model)


def test_auto_bitlinear_keeps_the_hooks_of_others() -> None:
    bitnet = transformers.integrations.bitnet
    model = nn.ModuleDict({"proj": bitnet.AutoBitLinear(8, 8, bias=False, online_quant=True)})
    model.config = transformers.PretrainedConfig()
    seen = []
    model["proj"].register_load_state_dict_pre_hook(lambda *arguments: seen.append(1))
    convert_to_bitlinear(model)
    model.load_state_dict(model.state_dict())
    assert seen == [1], "a hook that was not AutoBitLinear's own was removed"


# Experts and mixers, which bypass their layers


def mixtral(tiny_model) -> nn.Module:
    return tiny_model("Mixtral", num_local_experts=4, num_experts_per_tok=2)


def test_fused_experts_are_refused_by_name(tiny_model) -> None:
    message = refusal(mixtral(tiny_model))
    assert "MixtralForCausalLM cannot be made ternary" in message
    for i in range(2):
        assert f"model.layers.{i}.mlp.experts (MixtralExperts) fuses its experts into 3-D tensors" in message
        assert f"add 'model.layers.{i}.mlp.experts' to skip_modules" in message


@pytest.mark.parametrize(
    "skip",
    [["experts"], ["*.experts"], ["mlp.experts"], [f"model.layers.{i}.mlp.experts" for i in range(2)]],
)
def test_fused_experts_can_be_left_dense(tiny_model, skip: list[str]) -> None:
    model = mixtral(tiny_model)
    assert convert_to_bitlinear(model, skip) == layers_of(("self_attn", ATTENTION)) == ternary_of(model)
    assert torch.isfinite(model(torch.randint(3, 128, (1, 6))).logits).all()


class Mixer(nn.Module):
    """Shaped like Mamba's: its fused kernel reads out_proj.weight."""

    def __init__(self) -> None:
        super().__init__()
        self.conv1d = nn.Conv1d(8, 8, 3)
        self.in_proj, self.out_proj = nn.Linear(8, 16), nn.Linear(8, 8)


def hybrid() -> nn.Module:
    layer = nn.ModuleDict({"mixer": Mixer(), "up_proj": nn.Linear(8, 8)})
    return nn.ModuleDict({"layers": nn.ModuleList([layer])})


def test_mixers_are_refused_by_name() -> None:
    assert "layers.0.mixer (Mixer) is a state-space mixer" in refusal(hybrid())


@pytest.mark.parametrize("skip", ["layers.0.mixer", "mixer", "*.mixer", "layers.*.mixer"])
def test_a_mixer_left_dense_is_dense_inside(skip: str) -> None:
    """However the mixer was named: its out_proj as BitLinear would train dense and ship ternary."""
    model = hybrid()
    assert convert_to_bitlinear(model, [skip]) == ["layers.0.up_proj"]
    assert type(model["layers"][0]["mixer"].out_proj) is nn.Linear


# skip_modules


@pytest.mark.parametrize(
    "pattern, skipped",
    [
        ("model.layers.0.mlp.up_proj", ["model.layers.0.mlp.up_proj"]),
        ("down_proj", [f"model.layers.{i}.mlp.down_proj" for i in range(2)]),
        ("mlp.down_proj", [f"model.layers.{i}.mlp.down_proj" for i in range(2)]),
        ("model.layers.1", [name for name in DECODER if ".1." in name]),
        ("model.layers.1.self_attn", [name for name in DECODER if ".1.self_attn." in name]),
        ("*.layers.0.*", [name for name in DECODER if ".0." in name]),
        ("*.[qk]_proj", [name for name in DECODER if name.endswith(("q_proj", "k_proj"))]),
        ("model.layers.?.mlp.up_proj", [f"model.layers.{i}.mlp.up_proj" for i in range(2)]),
        ("lm_head", []),  # dense anyway, and no error
    ],
)
def test_skip_modules(tiny_model, pattern: str, skipped: list[str]) -> None:
    model = tiny_model("Llama")
    expected = [name for name in DECODER if name not in skipped]
    assert convert_to_bitlinear(model, [pattern]) == expected == ternary_of(model)
    assert model.config.axolotl_bitnet["dense"] == [*skipped, "lm_head"]


def test_skip_modules_combine_and_take_any_iterable(tiny_model) -> None:
    model = tiny_model("Llama")
    converted = convert_to_bitlinear(model, (p for p in ["down_proj", "model.layers.0", "v_proj"]))
    skipped = ("down_proj", "v_proj")
    assert converted == [
        n for n in DECODER if not n.startswith("model.layers.0.") and not n.endswith(skipped)
    ]


@pytest.mark.parametrize(
    "pattern",
    [
        "donw_proj",
        "model.layers.7",
        "proj",
        "model.layers.0.mlp.up",
        "q_pro",
        "Down_proj",
        "*.layers.9.*",
        "",
    ],
)
def test_a_pattern_that_matches_nothing_is_an_error(tiny_model, pattern: str) -> None:
    message = refusal(tiny_model("Llama"), ["up_proj", pattern])
    assert f"skip_modules matches no linear layer: {[pattern]}" in message


def test_layer_1_is_not_layer_10(tiny_model) -> None:
    model = tiny_model("Llama", num_hidden_layers=11, intermediate_size=64)
    converted = convert_to_bitlinear(model, ["model.layers.1"])
    assert not any(n.startswith("model.layers.1.") for n in converted)
    assert sum(n.startswith("model.layers.10.") for n in converted) == 7


# What cannot be packed


@pytest.mark.parametrize("out_features", [1, 2, 6, 13])
def test_rows_that_fill_no_byte_are_refused(out_features: int) -> None:
    model = nn.ModuleDict({"good": nn.Linear(5, 8), "odd": nn.Linear(5, out_features)})
    message = refusal(model)
    assert f"odd has out_features = {out_features}, not a multiple of 4" in message and "good" not in message
    assert convert_to_bitlinear(model, ["odd"]) == ["good"]


def test_rows_of_a_real_model_are_refused(tiny_model) -> None:
    message = refusal(tiny_model("Llama", intermediate_size=130))
    for i in range(2):
        for name in ("gate_proj", "up_proj"):
            assert f"model.layers.{i}.mlp.{name} has out_features = 130" in message
    assert "down_proj" not in message  # 130 columns are no problem


def test_subclasses_are_refused() -> None:
    class LoraLinear(nn.Linear):
        pass

    model = nn.ModuleDict({"plain": nn.Linear(8, 8), "special": LoraLinear(8, 8)})
    message = refusal(model)
    assert (
        "special is a " in message
        and "LoraLinear, not a plain nn.Linear" in message
        and "plain is" not in message
    )
    assert convert_to_bitlinear(model, ["special"]) == ["plain"]
    assert type(model["special"]) is LoraLinear


def test_nothing_to_convert_is_an_error() -> None:
    assert "has no nn.Linear to convert" in refusal(nn.ModuleDict({"lm_head": nn.Linear(8, 8)}))
    assert "has no nn.Linear to convert" in refusal(nn.Sequential(nn.Embedding(4, 4)))


def test_many_problems_are_counted() -> None:
    message = refusal(nn.ModuleList([nn.Linear(4, 5) for _ in range(11)]))
    assert message.count("out_features") == 8 and "and 3 more" in message


# What the swap leaves


def test_parameters_hooks_and_flags_stay(tiny_model) -> None:
    model = tiny_model("Llama", attention_bias=True)
    layer = model.model.layers[0].self_attn.q_proj
    calls = []
    layer.register_forward_pre_hook(lambda *_: calls.append("before"))
    layer.register_forward_hook(lambda *_: calls.append("after"))
    layer.weight.register_hook(lambda gradient: calls.append("gradient"))
    layer.note = "kept"
    layer.weight.requires_grad_(True)
    layer.bias.requires_grad_(False)
    parameters = dict(model.named_parameters())
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
    before = layer.weight.detach().clone()

    convert_to_bitlinear(model)
    assert model.model.layers[0].self_attn.q_proj is layer and layer.note == "kept"
    after = dict(model.named_parameters())
    assert list(after) == list(parameters) and all(after[name] is parameters[name] for name in after)
    assert torch.equal(layer.weight, before) and not layer.bias.requires_grad
    model(torch.randint(3, 128, (1, 5))).logits.sum().backward()
    assert calls == ["before", "after", "gradient"]
    optimizer.step()  # made before the swap, and still the one that trains it
    assert not torch.equal(layer.weight, before)


def test_a_forward_on_the_instance_cannot_hide_the_class() -> None:
    """accelerate (device_map over several devices) binds nn.Linear's forward on the instance; it would be
    listed as ternary and compute densely. Refused or really ternary, but not that."""
    hooks = pytest.importorskip("accelerate.hooks")
    model = nn.Sequential(nn.Linear(8, 8))
    x = torch.randn(3, 8)
    hooks.add_hook_to_module(model[0], hooks.ModelHook())
    expected = bitlinear(x, model[0].weight, model[0].bias)
    with contextlib.suppress(ConversionError):
        convert_to_bitlinear(model)
        assert torch.equal(model(x), expected)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_meta_device_stays(tiny_model, dtype: torch.dtype) -> None:
    with torch.device("meta"):
        model = tiny_model("Llama").to(dtype)
    assert convert_to_bitlinear(model) == DECODER
    assert all(p.is_meta and p.dtype == dtype for p in model.parameters())
    model.to_empty(device="cpu")
    assert ternary_of(model) == DECODER


def test_plan_is_what_convert_does(tiny_model) -> None:
    model = tiny_model("Llama")
    plan = plan_conversion(model, ["up_proj"])
    assert ternary_of(model) == [] and not hasattr(model.config, CONFIG_KEY)
    assert convert_to_bitlinear(model, ["up_proj"]) == plan.converted
    linear = [name for name, module in model.named_modules() if isinstance(module, nn.Linear)]
    assert sorted(plan.converted + plan.dense) == sorted(linear)


def test_converting_twice_changes_nothing(tiny_model) -> None:
    model = tiny_model("Llama")
    first = convert_to_bitlinear(model, ["up_proj"])
    noted = json.dumps(model.config.axolotl_bitnet)
    parameters = [id(p) for p in model.parameters()]
    assert convert_to_bitlinear(model, ["up_proj"]) == first == ternary_of(model)
    assert json.dumps(model.config.axolotl_bitnet) == noted
    assert [id(p) for p in model.parameters()] == parameters


def test_config_never_calls_a_ternary_layer_dense(tiny_model) -> None:
    """Converted without, then again with skip_modules: refused or undone, for export trusts this list."""
    model = tiny_model("Llama")
    convert_to_bitlinear(model)
    with contextlib.suppress(ConversionError):
        convert_to_bitlinear(model, ["up_proj"])
    assert model.config.axolotl_bitnet["converted"] == ternary_of(model)
    assert not set(model.config.axolotl_bitnet["dense"]) & set(ternary_of(model))


def test_config_survives_a_save(tiny_model, tmp_path: Path) -> None:
    model = tiny_model("Llama")
    converted = convert_to_bitlinear(model, ["down_proj"])
    ids = torch.randint(3, 128, (1, 7))
    logits = model(ids).logits
    model.save_pretrained(tmp_path)
    written = json.loads((tmp_path / "config.json").read_text())[CONFIG_KEY]
    assert written == {
        "definition": DEFINITION,
        "converted": converted,
        "dense": model.config.axolotl_bitnet["dense"],
    }

    dense = transformers.AutoModelForCausalLM.from_pretrained(tmp_path)
    assert dense.config.axolotl_bitnet == written
    assert not torch.equal(dense(ids).logits, logits)  # the latents alone are another model
    assert convert_to_bitlinear(dense, dense.config.axolotl_bitnet["dense"]) == converted
    assert torch.equal(dense(ids).logits, logits)


def test_returned_list_is_not_the_config(tiny_model) -> None:
    model = tiny_model("Llama")
    converted = convert_to_bitlinear(model)
    converted.clear()
    assert model.config.axolotl_bitnet["converted"] == DECODER


def test_a_model_without_config_is_converted() -> None:
    model = nn.Sequential(nn.Linear(8, 16), nn.ReLU(), nn.Linear(16, 4, bias=False))
    x = torch.randn(3, 8)
    dense: Tensor = model(x)
    assert convert_to_bitlinear(model) == ["0", "2"]
    assert not torch.equal(model(x), dense)
