"""Bases of many shapes: each is trained five steps in Axolotl, packed, reloaded by plain transformers and
compared with the model that trained."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file
from torch import Tensor, nn

pytest.importorskip("axolotl.cli")

import transformers
from transformers import AutoTokenizer

from axolotl_bitnet.formats.packed import PackedCheckpoint
from axolotl_bitnet.layers.bitlinear import BitLinear
from axolotl_bitnet.model.layer_plan import ConversionError
from axolotl_bitnet.verify.verify import verify_checkpoint
from support import TINY
from support.models import tiny_config
from support.runs import Run, config, train

pytestmark = pytest.mark.slow

IDS = torch.arange(3, 51).reshape(2, 24)


@pytest.fixture(scope="module")
def tokenizer() -> Any:
    return AutoTokenizer.from_pretrained(TINY / "model")


def _text(tokenizer: Any, family: str, **overrides: Any) -> Any:
    vocabulary = -(-len(tokenizer) // 32) * 32
    defaults = {"vocab_size": vocabulary, "max_position_embeddings": 128}
    return tiny_config(family, **(defaults | overrides))


def _save(model: nn.Module, tokenizer: Any, folder: Path) -> Path:
    """A base on disk. Norms of 1 (or 0) and biases of 0 would hide much."""
    with torch.no_grad():
        for parameter in model.parameters():
            if parameter.dim() == 1:
                parameter += torch.randn_like(parameter) * 0.1
    model.save_pretrained(folder)  # type: ignore[operator]
    tokenizer.save_pretrained(folder)
    return folder


def _edit(path: Path, **entries: Any) -> None:
    path.write_text(json.dumps(json.loads(path.read_text()) | entries))


def _train_and_reload(
    tmp_path: Path, base: Path, head: str = "CausalLM", renamed: bool = False, **overrides: Any
) -> Run:
    """Five steps; then the packed model's float32 logits must be the trained model's, to the bit."""
    run = train(config(tmp_path, base, **({"max_steps": 5} | overrides)))
    assert len(run.losses) == 5 and run.losses[-1] < run.losses[0]
    out = tmp_path / "out"
    assert verify_checkpoint(out / "packed", out).ok
    with torch.compiler.set_stance("force_eager"), torch.no_grad():
        packed, loading = getattr(transformers, f"AutoModelFor{head}").from_pretrained(
            out / "packed", dtype=torch.float32, output_loading_info=True
        )
        assert not any(loading[key] for key in ("missing_keys", "unexpected_keys", "mismatched_keys"))
        left = {name for name, parameter in packed.named_parameters() if parameter.dtype == torch.bfloat16}
        assert bool(left) is renamed  # in a quantized model transformers casts only what it does not rename
        for name in left:
            packed.get_parameter(name).data = packed.get_parameter(name).data.float()
        logits = packed.eval()(input_ids=IDS).logits
        trained = _with_rounded_rest(run.model).eval()(input_ids=IDS).logits
    assert torch.equal(logits, trained)
    assert bool(trained.isfinite().all()) and trained.std() > 1e-3
    kinds = {name for name, module in packed.named_modules() if type(module).__name__ == "BitLinear"}
    assert kinds == _ternary(run.model)
    return run


def _ternary(model: nn.Module) -> set[str]:
    return {name for name, module in model.named_modules() if isinstance(module, BitLinear)}


def _with_rounded_rest(model: nn.Module) -> nn.Module:
    """All but the ternary weights rounded to bfloat16, in place, as a packed folder has them."""
    ternary = {f"{name}.weight" for name in _ternary(model)}
    for name, parameter in model.named_parameters():
        if name not in ternary:
            parameter.data = parameter.data.to(torch.bfloat16).to(torch.float32)
    return model


def _projections(prefix: str, *names: str) -> set[str]:
    return {f"{prefix}.{layer}.{name}" for layer in range(2) for name in names}


ATTENTION = [f"self_attn.{name}_proj" for name in "qkvo"]
MLP = [f"mlp.{name}_proj" for name in ("gate", "up", "down")]


def test_microsofts_bitnet(tokenizer: Any, tmp_path: Path) -> None:
    """Its bf16 model loads with AutoBitLinear layers: relu2, sub-norms, tied embeddings."""
    model = transformers.BitNetForCausalLM(_text(tokenizer, "BitNet", tie_word_embeddings=True))
    base = _save(model, tokenizer, tmp_path / "base")
    _edit(
        base / "config.json",
        quantization_config={
            "quant_method": "bitnet",
            "linear_class": "autobitlinear",
            "quantization_mode": "online",
            "modules_to_not_convert": ["lm_head"],
        },
    )
    run = _train_and_reload(tmp_path, base)
    assert run.model.config.hidden_act == "relu2" and hasattr(run.model.model.layers[0].mlp, "ffn_sub_norm")
    assert _ternary(run.model) == _projections("model.layers", *ATTENTION, *MLP)
    assert "lm_head.weight" not in load_file(tmp_path / "out" / "packed" / "model.safetensors")
    assert "quantization_config" not in json.loads((tmp_path / "out" / "config.json").read_text())


def test_a_dense_ternary_llama_keeps_its_codes(
    tokenizer: Any, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    """Falcon3-10B's "prequantized" base: one magnitude a matrix, heads wider than hidden / heads."""
    model = transformers.LlamaForCausalLM(_text(tokenizer, "Llama", head_dim=32, rope_theta=1000042))
    codes: dict[str, Tensor] = {}
    for index, (name, module) in enumerate(model.named_modules()):
        if isinstance(module, nn.Linear) and name != "lm_head":
            codes[name] = torch.randint(-1, 2, module.weight.shape, dtype=torch.int8)
            module.weight.data = codes[name] * (0.01 + 0.003 * index)
    base = _save(model.to(torch.bfloat16), tokenizer, tmp_path / "base")
    # The head, the embeddings and the norms learn; the ternary layers stay where re-scaling put them.
    block = {"learning_rate_multiplier": 1e-9, "learning_rate_scope": "ternary"}
    _train_and_reload(tmp_path, base, bitnet=block)
    packed = PackedCheckpoint(tmp_path / "out" / "packed")
    assert packed.keys.keys() == codes.keys()
    stored = load_file(base / "model.safetensors")
    for name in codes:
        found, scale = packed.codes(name)
        assert torch.equal(found, codes[name]), name
        magnitude = stored[f"{name}.weight"].abs().max().float()
        assert torch.equal(scale, (1 / magnitude).to(torch.bfloat16).reshape(1)), name


@pytest.mark.parametrize("family", ["Qwen3", "Gemma2", "Gemma3"])
def test_decoders_with_norms_of_their_own(family: str, tokenizer: Any, tmp_path: Path) -> None:
    """Qwen3: norms on q and k. Gemma: four norms a layer that scale by 1 + weight, GeGLU, scaled and tied
    embeddings, soft-capped logits (2), sliding windows (3)."""
    gemma = family.startswith("Gemma")
    settings = _text(
        tokenizer,
        "Gemma3Text" if family == "Gemma3" else family,
        tie_word_embeddings=gemma,
        **({"sliding_window": 8} if gemma else {}),
    )
    model = getattr(transformers, f"{family}ForCausalLM")(settings)
    run = _train_and_reload(tmp_path, _save(model, tokenizer, tmp_path / "base"))
    assert _ternary(run.model) == _projections("model.layers", *ATTENTION, *MLP)
    fused = {type(module).__name__ for module in run.model.modules()} & {"SwiGLU", "RMSNorm"}
    assert fused == (set() if gemma else {"SwiGLU", "RMSNorm"})


def _experts(family: str, tokenizer: Any) -> nn.Module:
    counts = {
        "Mixtral": {"num_local_experts": 4},
        "Qwen3Moe": {"num_experts": 4, "moe_intermediate_size": 32},
    }
    settings = _text(tokenizer, family, num_experts_per_tok=2, **counts[family])
    return getattr(transformers, f"{family}ForCausalLM")(settings)


@pytest.mark.parametrize("family", ["Mixtral", "Qwen3Moe"])
def test_experts_are_refused_or_left_dense(family: str, tokenizer: Any, tmp_path: Path) -> None:
    base = _save(_experts(family, tokenizer), tokenizer, tmp_path / "base")
    with pytest.raises(
        ConversionError, match=r"fuses its experts .* add 'model.layers.0.mlp.experts' to skip"
    ):
        train(config(tmp_path, base))
    run = _train_and_reload(tmp_path, base, renamed=True, bitnet={"skip_modules": ["experts"]})
    assert _ternary(run.model) == _projections("model.layers", *ATTENTION)
    stored = load_file(tmp_path / "out" / "packed" / "model.safetensors")
    dense = [name for name in stored if ".experts." in name or name.endswith("gate.weight")]
    assert dense and {stored[name].dtype for name in dense} == {torch.bfloat16}


def _llava(tokenizer: Any, folder: Path) -> Path:
    tokenizer = AutoTokenizer.from_pretrained(TINY / "model")
    tokenizer.add_special_tokens({"additional_special_tokens": ["<image>"]})
    vision = transformers.CLIPVisionConfig(
        hidden_size=32,
        intermediate_size=64,
        num_hidden_layers=2,
        num_attention_heads=2,
        image_size=8,
        patch_size=4,
    )
    settings = transformers.LlavaConfig(
        text_config=_text(tokenizer, "Llama"),
        vision_config=vision,
        image_token_index=tokenizer.convert_tokens_to_ids("<image>"),
    )
    processor = transformers.LlavaProcessor(
        transformers.CLIPImageProcessor(size={"height": 8, "width": 8}), tokenizer, patch_size=4
    )
    base = _save(transformers.LlavaForConditionalGeneration(settings), tokenizer, folder)
    processor.save_pretrained(base)
    return base


def test_the_text_tower_of_a_vision_language_model(tokenizer: Any, tmp_path: Path) -> None:
    base = _llava(tokenizer, tmp_path / "base")
    run = _train_and_reload(tmp_path, base, "ImageTextToText", renamed=True, freeze_mm_modules=True)
    assert _ternary(run.model) == _projections("model.language_model.layers", *ATTENTION, *MLP)
    before, after = (load_file(root / "model.safetensors") for root in (base, tmp_path / "out"))
    assert before.keys() == after.keys()
    vision = [name for name in before if "vision" in name or "projector" in name]
    assert vision and all(torch.equal(before[name], after[name]) for name in vision)
