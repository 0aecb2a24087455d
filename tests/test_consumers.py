"""Every export in the program that runs it: architectures, scalings of RoPE and tied heads, every pair of
values once. An export that no test runs in its consumer is how wrong ones ship.

Packed is compared with the model that trained; dense, MLX and GGUF with its codes / s, which none of the
three quantizes activations for. Over 300 tokens, so that positions count.
"""

from __future__ import annotations

import shutil
import sys
import time
from collections.abc import Iterator
from importlib import import_module
from pathlib import Path
from typing import Any

import pytest
import torch
import transformers
from torch import Tensor, nn

from axolotl_bitnet.formats.export import export, export_gguf, open_checkpoint
from axolotl_bitnet.formats.mlx_model import rope_scaling
from axolotl_bitnet.formats.registry import FORMATS
from axolotl_bitnet.layers.bitlinear import BitLinear
from axolotl_bitnet.storage.atomic import CheckpointError, read_json
from axolotl_bitnet.ternary import dequantize, ternarize
from axolotl_bitnet.verify.verify import verify_checkpoint
from support.llamacpp import LlamaCpp
from support.llamas import LLAMA3, YARN, build, save
from support.marks import slow_but
from support.stored import edit, edit_config

IDS = (torch.arange(300) * 37 % 500 + 3) % 512
SIZES = dict(
    hidden_size=128, intermediate_size=192, num_attention_heads=4, num_key_value_heads=2, head_dim=32
)
ROPES: dict[str, dict[str, Any]] = {
    "plain": {"rope_type": "default", "rope_theta": 1000.0},
    "llama3": LLAMA3,
    "linear": {"rope_type": "linear", "rope_theta": 1000.0, "factor": 4.0},
    "yarn": YARN,
}
HEADS = ("tied", "untied", "tied but different")
FAMILIES = ("Llama", "Mistral", "Qwen2", "Qwen3")
CASES = [
    (family, rope, HEADS[(i + j) % 3]) for i, family in enumerate(FAMILIES) for j, rope in enumerate(ROPES)
]
"""Each family with each rope and each head, and each rope with each head."""

MOST = {"packed": 1e-5, "dense": 1e-6, "mlx": 1e-4, "gguf-tq2_0": 5e-3}
"""Largest distance of logits, relative to the largest logit. llama.cpp computes in float16 here, as rows are
no multiple of 256."""

HEAD, EMBEDDING = "lm_head.weight", "model.embed_tokens.weight"
TABLE: dict[str, float] = {}


def trained(family: str, rope: str, head: str, folder: Path, **options: Any) -> tuple[nn.Module, Path]:
    torch.manual_seed(len(family + rope + head))
    extra = {"sliding_window": None} if family == "Mistral" else {}
    tied = {"tie_word_embeddings": head == "tied"}
    extra |= {"vocab_size": 520} if family == "Qwen2" else {}
    sizes = SIZES | {"rope_parameters": dict(ROPES[rope])}
    model = build(family, **(sizes | tied | extra | options))
    latents = save(model, folder / "latents")
    if head == "tied but different":
        edit_config(latents, lambda config: config.update(tie_word_embeddings=True))
    return model, latents


def in_bfloat16(model: nn.Module) -> nn.Module:
    """What is not ternary rounded as every export rounds it."""
    ternary = {f"{name}.weight" for name, layer in model.named_modules() if isinstance(layer, BitLinear)}
    for name, parameter in model.named_parameters():
        if name not in ternary:
            parameter.data = parameter.data.to(torch.bfloat16).to(torch.float32)
    return model


def dense_of(model: Any) -> nn.Module:
    """The same model with codes / s as plain matrices."""
    plain: nn.Module = type(model)(model.config).eval()
    values = dict(model.state_dict())
    for name, layer in model.named_modules():
        if isinstance(layer, BitLinear):
            values[f"{name}.weight"] = dequantize(*ternarize(layer.weight.detach())[:2]).to(torch.bfloat16)
    plain.load_state_dict(values)
    return plain


@torch.no_grad()
def logits(model: nn.Module) -> Tensor:
    with torch.compiler.set_stance("force_eager"):
        found: Tensor = model(IDS[None], use_cache=False).logits[0].float()
    return found


def in_transformers(folder: Path) -> Tensor:
    with torch.compiler.set_stance("force_eager"):
        model = transformers.AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32)
    return logits(model.eval())


def in_mlx(folder: Path) -> Tensor:
    import mlx.core as mx
    import numpy as np
    from mlx_lm.utils import load_model

    with mx.stream(mx.cpu):
        model, _ = load_model(folder)
        model.set_dtype(mx.float32)
        return torch.from_numpy(np.array(model(mx.array(IDS[None].numpy())))[0])


def away(found: Tensor, expected: Tensor) -> float:
    return float((found - expected).abs().max() / expected.abs().max())


def note(consumer: str, error: float) -> None:
    TABLE[consumer] = max(error, TABLE.get(consumer, 0.0))


@pytest.fixture(scope="module", autouse=True)
def in_time() -> Iterator[None]:
    start = time.perf_counter()
    yield
    for consumer, error in TABLE.items():
        print(f"{consumer}: largest distance {error:.1e}")
    print(f"{time.perf_counter() - start:.0f} s")


@pytest.mark.parametrize(
    ("family", "rope", "head"), slow_but(1, CASES), ids=[" ".join(case) for case in CASES]
)
def test_every_export_computes_what_trained(family: str, rope: str, head: str, tmp_path: Path) -> None:
    model, latents = trained(family, rope, head, tmp_path)
    ternary = logits(in_bfloat16(model))
    dense = logits(dense_of(model))
    for name in MOST:
        target = tmp_path / Path(FORMATS[name].path).name
        if name.startswith("gguf"):
            try:
                import_module("gguf"), import_module("xllamacpp")
            except ImportError:
                continue
            if rope == "llama3" and family.startswith("Qwen"):
                with pytest.raises(CheckpointError, match=r"llama\.cpp loads its factors for Llama"):
                    export_gguf(latents, target)
                continue
            export_gguf(latents, target, embeddings="f16")
            found = LlamaCpp(target).logprobs(IDS.tolist(), dense.shape[-1])
            expected = dense[-1].log_softmax(-1)
            error, consumer = away(found, expected), "llama.cpp"
        elif name == "mlx":
            try:
                import_module("mlx_lm")
            except ImportError:
                continue
            export(name, latents, target)
            error, consumer = away(in_mlx(target), dense), "mlx-lm"
        else:
            export(name, latents, target)
            expected = ternary if name == "packed" else dense
            error, consumer = away(in_transformers(target), expected), "transformers"
        note(f"{name} in {consumer}", error)
        print(family, rope, head, name, f"{error:.1e}")
        assert error < MOST[name], f"{name} in {consumer}: {error:.1e} off"


@pytest.fixture(scope="module")
def odd(tmp_path_factory: pytest.TempPathFactory) -> tuple[nn.Module, Path]:
    """A scaled Llama whose config says tied, and whose head is its own; its MLX folder beside it."""
    pytest.importorskip("mlx_lm")
    model, latents = trained("Llama", "yarn", "tied but different", tmp_path_factory.mktemp("odd"))
    export("mlx", latents, latents.parent / "mlx")
    return dense_of(in_bfloat16(model)), latents


@pytest.mark.parametrize("key", ["rope_scaling", "tie_word_embeddings"])
def test_the_matrix_would_see_it(odd: tuple[nn.Module, Path], tmp_path: Path, key: str) -> None:
    """Without what the export writes for it, mlx-lm computes another model, and verify says so."""
    model, latents = odd
    copy = tmp_path / "mlx"
    shutil.copytree(latents.parent / "mlx", copy)
    edit_config(copy, lambda config: config.update({key: None if key == "rope_scaling" else True}))
    assert away(in_mlx(copy), logits(model)) > 10 * MOST["mlx"]
    report = verify_checkpoint(copy, latents, ["The capital of France is, as everybody knows"])
    assert not report.ok
    if key == "tie_word_embeddings":
        assert "programs that follow it lose the head" in report.mismatches[0]


@pytest.mark.slow
def test_verify_runs_mlx(odd: tuple[nn.Module, Path], monkeypatch: pytest.MonkeyPatch) -> None:
    _, latents = odd
    mlx = latents.parent / "mlx"
    report = verify_checkpoint(mlx, latents, ["The capital of France is"])
    found = {check.name: check.verdict for check in report.checks}
    assert report.ok and found["logits"] == found["greedy tokens"] == "same"
    assert found["8-bit activations"] == "not checked"

    assert rope_scaling(open_checkpoint(latents).config) == read_json(mlx / "config.json")["rope_scaling"]
    monkeypatch.setitem(sys.modules, "mlx_lm", None)
    monkeypatch.setitem(sys.modules, "mlx_lm.utils", None)
    report = verify_checkpoint(mlx, latents, ["The capital of France is"])
    assert report.ok and "pip install mlx-lm" in report.checks[-1].detail


@pytest.mark.parametrize("name", ["packed", "dense", "mlx", "gguf-tq2_0"])
def test_a_head_of_its_own_travels(name: str, tmp_path: Path) -> None:
    """And one that repeats the embedding is stored once."""
    if name.startswith("gguf"):
        pytest.importorskip("gguf")
    for head in ("tied but different", "equal"):
        _, latents = trained("Llama", "plain", "tied but different", tmp_path / head)
        if head == "equal":
            edit(latents, lambda tensors: tensors.update({EMBEDDING: tensors[HEAD].clone()}))
        target = tmp_path / head / Path(FORMATS[name].path).name
        export(name, latents, target)
        found = open_checkpoint(target)
        assert (HEAD in found.entries) == (head != "equal") and not found.head_unsaid
        assert found.config["tie_word_embeddings"] is (head == "equal")
        assert verify_checkpoint(target, latents).ok
    assert verify_checkpoint(target, tmp_path / "tied but different" / "latents").mismatches


def test_a_missing_head_is_forgiven_where_it_repeats_the_embedding_only(tmp_path: Path) -> None:
    _, latents = trained("Llama", "plain", "untied", tmp_path)
    packed = export("packed", latents, tmp_path / "packed")
    edit(packed, lambda tensors: tensors.pop(HEAD))
    edit_config(packed, lambda config: config.update(tie_word_embeddings=True))
    edit_config(latents, lambda config: config.update(tie_word_embeddings=True))
    assert f"'{HEAD}' is missing" in verify_checkpoint(packed, latents).mismatches


REFUSED = [
    ("Llama", {"rope_parameters": {"rope_type": "dynamic", "rope_theta": 1e4, "factor": 2.0}}, "'dynamic'"),
    ("Llama", {"rope_parameters": YARN | {"truncate": False}}, "truncate false"),
    ("Llama", {"hidden_act": "relu"}, "with silu only"),
    ("Mistral", {"sliding_window": 64}, "sliding_window: 64"),
    ("Qwen2", {"use_sliding_window": True, "sliding_window": 64}, "use_sliding_window"),
    ("Qwen3", {"attention_bias": True}, "no biases"),
    ("Gemma2", {"rope_parameters": LLAMA3}, "has not been run in mlx-lm"),
]


@pytest.mark.parametrize(("family", "options", "words"), REFUSED)
def test_what_mlx_would_compute_otherwise_is_refused(
    family: str, options: dict[str, Any], words: str
) -> None:
    config = getattr(transformers, f"{family}Config")(
        **({"max_position_embeddings": 512} | options)
    ).to_dict()
    refusals = FORMATS["mlx"].format.refusals(config, None)
    assert len(refusals) == 1 and words in refusals[0]


@pytest.mark.parametrize("factor", [None, 1.3, 1.0])
def test_yarn_s_attention_factor_reaches_mlx(tmp_path: Path, factor: float | None) -> None:
    pytest.importorskip("mlx_lm")
    rope = YARN | ({} if factor is None else {"attention_factor": factor})
    model, latents = trained("Qwen3", "yarn", "untied", tmp_path, rope_parameters=rope)
    found = in_mlx(export("mlx", latents, tmp_path / "mlx"))
    assert away(found, logits(dense_of(in_bfloat16(model)))) < MOST["mlx"]


def test_a_base_whose_head_is_lost_is_told_before_training(tmp_path: Path) -> None:
    pytest.importorskip("axolotl.cli")
    from axolotl.utils.dict import DictDefault

    from axolotl_bitnet.plugin.base_model import lost_head

    for head, lost in (("tied", False), ("untied", False), ("tied but different", True)):
        _, base = trained("Llama", "plain", head, tmp_path / head)
        warning = lost_head(DictDefault({"base_model": str(base)}))
        assert (warning is not None) == lost
        if warning:
            assert f"'{HEAD}', which differs from its embedding" in warning
    edit(base, lambda tensors: tensors.update({EMBEDDING: tensors[HEAD].clone()}))
    assert lost_head(DictDefault({"base_model": str(base)})) is None
    assert lost_head(DictDefault({"base_model": str(tmp_path)})) is None
