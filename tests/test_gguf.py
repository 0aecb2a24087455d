"""GGUF files: their bytes against the gguf package, the way back, what is refused; whole files or none."""

from __future__ import annotations

import json
import logging
import re
import shutil
import struct
import sys
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from safetensors.torch import load_file, save_file
from torch import Tensor

import axolotl_bitnet
from axolotl_bitnet import pack_checkpoint
from axolotl_bitnet.formats.export import export_gguf
from axolotl_bitnet.formats.gguf import writer as module
from axolotl_bitnet.formats.gguf.architecture import (
    ARCHITECTURES,
    architecture_of,
    row_order,
    shape_of,
    tensors_of,
)
from axolotl_bitnet.formats.gguf.metadata import metadata_of
from axolotl_bitnet.formats.gguf.reader import GGUFCheckpoint
from axolotl_bitnet.formats.gguf.ternary_type import scale_from_fp16, scale_to_fp16
from axolotl_bitnet.formats.gguf.tq import (
    BLOCK_BYTES,
    decode_blocks,
    encode_blocks,
)
from axolotl_bitnet.formats.latent import LatentCheckpoint
from axolotl_bitnet.model.entry import CONFIG_KEY
from axolotl_bitnet.model.fingerprint import fingerprint_model
from axolotl_bitnet.storage.atomic import CheckpointError, read_json, write_json
from axolotl_bitnet.storage.safetensors_stream import SINGLE, Entry, SafetensorsWriter
from axolotl_bitnet.ternary import EPSILON, scale_of
from support import ROOT, TINY
from support.llamas import VARIANTS, YARN, build, save
from support.marks import slow_but
from support.processes import python

gguf = pytest.importorskip("gguf")
KINDS = {"tq2_0": gguf.GGMLQuantizationType.TQ2_0, "tq1_0": gguf.GGMLQuantizationType.TQ1_0}


def random_codes(rows: int, columns: int) -> Tensor:
    return torch.randint(-1, 2, (rows, columns), dtype=torch.int8)


def random_scale() -> Tensor:
    return scale_of(
        torch.tensor(float(10 ** np.random.default_rng(int(torch.randint(2**31, ()))).uniform(-4.5, 4)))
    )


# Blocks


@pytest.mark.parametrize("kind", BLOCK_BYTES)
@pytest.mark.parametrize("shape", [(1, 256), (3, 512), (17, 1280), (256, 256), (5, 13312)])
def test_blocks_are_the_gguf_package_s(kind: str, shape: tuple[int, int]) -> None:
    codes, s = random_codes(*shape), random_scale()
    d = scale_to_fp16(s)
    packed = encode_blocks(codes, d, kind)
    values = codes.numpy().astype(np.float32) * d.numpy().astype(np.float32)
    assert packed.dtype == torch.uint8 and packed.shape == (shape[0], shape[1] // 256 * BLOCK_BYTES[kind])
    assert np.array_equal(packed.numpy(), gguf.quantize(values, KINDS[kind]))
    assert np.array_equal(gguf.dequantize(packed.numpy(), KINDS[kind]), values)
    back, scales = decode_blocks(packed, kind)
    assert torch.equal(back, codes) and bool((scales == d).all())
    assert torch.equal(scale_from_fp16(scales[0, :1]), s)


@pytest.mark.parametrize("kind", BLOCK_BYTES)
def test_a_block_of_zeros_has_the_scale_too(kind: str) -> None:
    """The gguf package's quantization would drop it, and with it that of a matrix of zeros."""
    packed = encode_blocks(
        torch.zeros(2, 256, dtype=torch.int8), scale_to_fp16(torch.tensor([8.0]).bfloat16()), kind
    )
    codes, d = decode_blocks(packed, kind)
    assert not codes.any() and d.tolist() == [[0.125], [0.125]]


def test_a_code_of_2_is_refused() -> None:
    packed = encode_blocks(random_codes(2, 256), torch.tensor([1.0]).half(), "tq2_0")
    packed[1, 5] |= 3 << 4
    with pytest.raises(ValueError, match="a code of 2"):
        decode_blocks(packed, "tq2_0")


def bfloat16_values() -> Tensor:
    """All that are positive and finite."""
    values = torch.arange(1, 2**15).to(torch.int16).view(torch.bfloat16)
    return values[torch.isfinite(values)]


def test_every_scale_of_the_definition_comes_back() -> None:
    """All mantissas and all exponents of g that fp16 can hold, from the definition's least g on."""
    g = bfloat16_values().float()
    g = g[(g >= float(torch.tensor(EPSILON).bfloat16())) & (g <= 65280)]
    assert g.numel() > 128 * 32
    for s in (scale_of(each) for each in g):
        assert torch.equal(scale_from_fp16(scale_to_fp16(s)), s)


def test_every_bfloat16_scale_in_fp16_s_normal_range_comes_back() -> None:
    s = bfloat16_values()
    s = s[(s.float() >= 2**-15) & (s.float() <= 2**14)]
    assert torch.equal(scale_from_fp16(s.float().reciprocal().half()), s)


@pytest.mark.parametrize("s", [0.0, -1.0, 1e-6, 1e9, float("inf"), float("nan")])
def test_a_scale_that_would_not_come_back_is_refused(s: float) -> None:
    with pytest.raises(ValueError, match="no fp16 reciprocal"):
        scale_to_fp16(torch.tensor([s]).bfloat16())


def test_order_of_rows_is_pairs_instead_of_halves() -> None:
    config = build(head_dim=8).config.to_dict()
    llama, qwen = ARCHITECTURES[0], ARCHITECTURES[2]
    for layer, heads in (("q_proj", 4), ("k_proj", 2)):
        for part in ("weight", "bias"):
            order = row_order(llama, shape_of(config), f"model.layers.1.self_attn.{layer}.{part}")
            expected = [
                head * 8 + half * 4 + i for head in range(heads) for i in range(4) for half in range(2)
            ]
            assert order is not None and order.tolist() == expected
            assert row_order(qwen, shape_of(config), f"model.layers.1.self_attn.{layer}.{part}") is None
    for other in ("self_attn.v_proj.weight", "self_attn.o_proj.weight", "mlp.up_proj.weight"):
        assert row_order(llama, shape_of(config), f"model.layers.0.{other}") is None


# Files


@pytest.fixture(scope="module")
def latents(tmp_path_factory: pytest.TempPathFactory) -> Path:
    torch.manual_seed(3)
    return save(build(), tmp_path_factory.mktemp("plain") / "latents")


@pytest.fixture(scope="module")
def file(latents: Path) -> Path:
    return export_gguf(latents, latents.parent / "model.gguf")


def same_model(found: GGUFCheckpoint, source: LatentCheckpoint) -> None:
    assert found.fingerprint() == source.fingerprint()
    assert list(found.entries) == list(source.entries) and found.keys == source.keys
    for key, entry in found.entries.items():
        assert entry.shape == source.entries[key].shape
        if key not in found.keys.values():
            tensor = found.tensor(key)
            assert tensor.dtype == entry.dtype and torch.equal(tensor, source.tensor(key).to(entry.dtype))


@pytest.mark.parametrize("type", BLOCK_BYTES)
@pytest.mark.parametrize("variant", slow_but(4, VARIANTS))
def test_a_file_is_the_model(tmp_path: Path, variant: str, type: str) -> None:
    """With random scales; codes and s exactly, norms and biases exactly, the rest rounded to bfloat16."""
    family, options = VARIANTS[variant]
    model = build(family, **options)
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if name.endswith("proj.weight"):
                parameter *= 10 ** torch.empty(()).uniform_(-2.5, 4)
    source = LatentCheckpoint(save(model, tmp_path / "latents"))
    file = export_gguf(source.folder, tmp_path / "model.gguf", type)
    found = GGUFCheckpoint(file)
    assert found.fingerprint() == fingerprint_model(model)
    assert found.config == source.config
    same_model(found, source)

    # Once more with the gguf package alone, and llama.cpp's names and rows written out.
    for tensor in gguf.GGUFReader(file).tensors:
        if tensor.name == "blk.1.attn_k.weight":
            kind = "F16" if options.get("hidden_size") == 192 else type.upper()
            assert tensor.tensor_type.name == kind
            codes, s = source.codes("model.layers.1.self_attn.k_proj")
            if family == "Llama":
                heads = shape_of(source.config).kv_heads
                codes = codes.unflatten(0, (heads, 2, -1)).transpose(1, 2).reshape(codes.shape)
            values = codes.numpy() * (1 / s.float()).half().float().numpy()
            assert np.array_equal(gguf.dequantize(tensor.data, tensor.tensor_type), values)
            break
    else:
        pytest.fail("no k")


@pytest.mark.parametrize("type", BLOCK_BYTES)
def test_a_packed_folder_gives_the_same_file(latents: Path, tmp_path: Path, type: str) -> None:
    """But for norms, which packing rounds to bfloat16 and a config that says so."""
    pack_checkpoint(latents, tmp_path / "packed")
    shutil.copytree(
        TINY / "model", tmp_path / "packed", dirs_exist_ok=True, ignore=lambda *_: ["config.json"]
    )
    one, other = (
        GGUFCheckpoint(export_gguf(source, tmp_path / f"{name}.gguf", type))
        for name, source in (("latents", latents), ("packed", tmp_path / "packed"))
    )
    assert one.fingerprint() == other.fingerprint()
    for key in ("model.embed_tokens.weight", "lm_head.weight"):
        assert torch.equal(one.tensor(key), other.tensor(key))
    again = export_gguf(tmp_path / "packed", tmp_path / "again.gguf", type)
    assert again.read_bytes() == (tmp_path / "packed.gguf").read_bytes()


@pytest.mark.parametrize("type", BLOCK_BYTES)
def test_any_other_byte_of_codes_is_seen(latents: Path, tmp_path: Path, type: str) -> None:
    file = export_gguf(latents, tmp_path / "model.gguf", type)
    expected = GGUFCheckpoint(file).fingerprint()
    tensors = [t for t in gguf.GGUFReader(file).tensors if t.tensor_type == KINDS[type]]
    data = file.read_bytes()
    for seed in range(20):
        random = np.random.default_rng(seed)
        tensor = tensors[random.integers(len(tensors))]
        block = random.integers(tensor.n_bytes // BLOCK_BYTES[type]) * BLOCK_BYTES[type]
        at = int(tensor.data_offset) + int(block) + int(random.integers(BLOCK_BYTES[type] - 2))
        changed = bytearray(data)
        # of TQ1_0's 256 bytes 13 are never written, and mean what their neighbours do
        changed[at] = (changed[at] + 16 + int(random.integers(200))) % 256
        file.write_bytes(changed)
        try:
            assert GGUFCheckpoint(file).fingerprint() != expected
        except CheckpointError as error:
            assert "a code of 2" in str(error)


def test_a_block_with_another_scale_is_refused(file: Path, tmp_path: Path) -> None:
    (tensor,) = (t for t in gguf.GGUFReader(file).tensors if t.name == "blk.0.ffn_up.weight")
    changed = bytearray(file.read_bytes())
    changed[int(tensor.data_offset) + 64] ^= 1
    (tmp_path / "model.gguf").write_bytes(changed)
    with pytest.raises(CheckpointError, match=r"blk\.0\.ffn_up\.weight' is not ternary: .* different scales"):
        GGUFCheckpoint(tmp_path / "model.gguf").codes("model.layers.0.mlp.up_proj")


def test_rows_that_fit_no_block_are_f16_and_named(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    source = save(build(intermediate_size=320), tmp_path / "latents")
    with caplog.at_level(logging.WARNING):
        file = export_gguf(source, tmp_path / "model.gguf")
    assert "2 ternary layers have rows that are no multiple of 256" in caplog.text
    assert "model.layers.0.mlp.down_proj.weight, model.layers.1.mlp.down_proj.weight" in caplog.text
    kinds = {t.name: t.tensor_type.name for t in gguf.GGUFReader(file).tensors}
    assert kinds["blk.0.ffn_down.weight"] == "F16" and kinds["blk.0.ffn_up.weight"] == "TQ2_0"
    same_model(GGUFCheckpoint(file), LatentCheckpoint(source))


def test_types_of_the_rest(latents: Path, tmp_path: Path) -> None:
    source = LatentCheckpoint(latents)
    for embeddings in ("bf16", "f16", "q8_0"):
        file = export_gguf(latents, tmp_path / f"{embeddings}.gguf", embeddings=embeddings)
        kinds = {t.name: t.tensor_type.name for t in gguf.GGUFReader(file).tensors}
        assert kinds["token_embd.weight"] == kinds["output.weight"] == embeddings.upper()
        assert kinds["blk.1.attn_norm.weight"] == "F32"
        tensor, expected = GGUFCheckpoint(file).tensor("lm_head.weight"), source.tensor("lm_head.weight")
        off = float((tensor - expected).norm() / expected.norm())
        assert off < {"bf16": 3e-3, "f16": 4e-4, "q8_0": 1e-2}[embeddings]


def test_a_skipped_layer_is_bfloat16(tmp_path: Path) -> None:
    import transformers

    config = build().config
    delattr(config, CONFIG_KEY)
    model = transformers.LlamaForCausalLM(config)
    axolotl_bitnet.convert_to_bitlinear(model, ["model.layers.0.self_attn"])
    source = save(model, tmp_path / "latents")
    file = export_gguf(source, tmp_path / "model.gguf")
    kinds = {t.name: t.tensor_type.name for t in gguf.GGUFReader(file).tensors}
    assert kinds["blk.0.attn_q.weight"] == "BF16" and kinds["blk.1.attn_q.weight"] == "TQ2_0"
    same_model(GGUFCheckpoint(file), LatentCheckpoint(source))


# Files from elsewhere: without our config in them


@pytest.fixture
def elsewhere(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(module, "CONFIG", "general.description")


@pytest.mark.parametrize(
    "variant", [name for name in VARIANTS if name not in ("llama3 rope", "no multiple of 256")]
)
@pytest.mark.usefixtures("elsewhere")
def test_a_file_from_elsewhere_is_read_by_its_metadata(tmp_path: Path, variant: str) -> None:
    family, options = VARIANTS[variant]
    source = LatentCheckpoint(save(build(family, **options), tmp_path / "latents"))
    found = GGUFCheckpoint(export_gguf(source.folder, tmp_path / "model.gguf"))
    same_model(found, source)
    assert sorted(found.names.converted) == sorted(source.names.converted)
    kept = metadata_of(architecture_of(found.config), found.config)
    wanted = metadata_of(architecture_of(source.config), source.config)
    assert kept == {key: v if isinstance(v, str) else pytest.approx(v, rel=1e-6) for key, v in wanted.items()}
    for key in (
        "tie_word_embeddings",
        "architectures",
        "eos_token_id",
        *({"attention_bias", "mlp_bias"} & options.keys()),
    ):
        assert found.config[key] == source.config[key]


@pytest.mark.usefixtures("elsewhere")
def test_what_metadata_do_not_tell_is_refused(tmp_path: Path) -> None:
    family, options = VARIANTS["llama3 rope"]
    file = export_gguf(save(build(family, **options), tmp_path / "latents"), tmp_path / "model.gguf")
    with pytest.raises(CheckpointError, match="table of factors"):
        GGUFCheckpoint(file)


def rewritten(source: Path, target: Path, architecture: str = "llama", dense: bool = False) -> Path:
    """A file with the tensors of another, by the gguf package."""
    writer = gguf.GGUFWriter(target, architecture)
    for tensor in gguf.GGUFReader(source).tensors:
        data = gguf.dequantize(tensor.data, tensor.tensor_type) if dense else tensor.data
        writer.add_tensor(tensor.name, data, raw_dtype=None if dense else tensor.tensor_type)
    writer.add_block_count(2)
    writer.add_embedding_length(256)
    writer.add_feed_forward_length(512)
    writer.add_head_count(4)
    writer.add_head_count_kv(2)
    writer.add_layer_norm_rms_eps(1e-5)
    writer.add_context_length(512)
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
    return target


def test_other_files_are_refused(file: Path, tmp_path: Path) -> None:
    assert (
        GGUFCheckpoint(rewritten(file, tmp_path / "fine.gguf")).fingerprint()
        == GGUFCheckpoint(file).fingerprint()
    )
    with pytest.raises(CheckpointError, match="architecture 'falcon' is not read"):
        GGUFCheckpoint(rewritten(file, tmp_path / "falcon.gguf", "falcon"))
    with pytest.raises(CheckpointError, match="holds no ternary layers"):
        GGUFCheckpoint(rewritten(file, tmp_path / "dense.gguf", dense=True))
    (tmp_path / "text.gguf").write_text("GGML?")
    for name in ("text.gguf", "missing.gguf"):
        with pytest.raises(CheckpointError, match="is not a GGUF file"):
            GGUFCheckpoint(tmp_path / name)


def test_a_damaged_file_is_told(file: Path, tmp_path: Path) -> None:
    """Cut anywhere, or bytes of its header changed: an error that names the file, or a file that reads."""
    data, target = file.read_bytes(), tmp_path / "model.gguf"
    start = int(min(t.data_offset for t in gguf.GGUFReader(file).tensors))
    random = np.random.default_rng(1)
    for length in [4, 8, 20, start - 1, len(data) - 1, *random.integers(4, len(data), 40).tolist()]:
        target.write_bytes(data[:length])
        with pytest.raises(CheckpointError, match=r"model\.gguf"):
            GGUFCheckpoint(target).fingerprint()
    told = 0
    for _ in range(150):
        changed = bytearray(data)
        at = int(random.integers(4, 400 if random.integers(2) else start))
        changed[at : at + 4] = struct.pack("<I", int(random.integers(2**32)))
        target.write_bytes(changed)
        try:
            GGUFCheckpoint(target)
        except CheckpointError:
            told += 1
    assert told > 10


# Refusals


@pytest.mark.parametrize(
    ("config", "reason"),
    [
        ({"architectures": ["BitNetForCausalLM"]}, "SiLU where it has a squared ReLU"),
        ({"architectures": ["LlamaForSequenceClassification"]}, "its head is a classifier"),
        ({"architectures": ["Gemma3ForConditionalGeneration"], "vision_config": {}}, "more than one tower"),
        ({"architectures": ["GptOssForCausalLM"]}, "has not been run in llama.cpp"),
        ({"architectures": None}, "names no architecture"),
        ({"hidden_act": "relu2"}, "hidden_act 'relu2'"),
        ({"rope_parameters": {"rope_type": "longrope"}}, "rope_type 'longrope'"),
        ({"rope_parameters": {"rope_type": "dynamic", "factor": 2.0}}, "rope_type 'dynamic'"),
        ({"rope_parameters": YARN | {"beta_fast": 16}}, "command line, not from the file"),
        ({"rope_parameters": YARN | {"mscale": 0.7}}, "yarn with mscale"),
        ({"rope_parameters": {"rope_theta": 1e4, "partial_rotary_factor": 0.5}}, "partial_rotary_factor"),
        ({"num_hidden_layers": 3}, r"has no 'model\.layers\.2\.input_layernorm\.weight'"),
        ({"num_hidden_layers": 1}, r"no place for 'model\.layers\.1\.input_layernorm\.weight'"),
        ({"intermediate_size": 256}, r"shape \[256, 512\], but by its config \[256, 256\]"),
        ({"hidden_size": "256"}, "hidden_size is '256'"),
        ({"vocab_size": 500}, r"shape \[512, 256\], but by its config \[500, 256\]"),
    ],
)
def test_refused_with_the_reason(latents: Path, tmp_path: Path, config: dict[str, Any], reason: str) -> None:
    source = tmp_path / "latents"
    shutil.copytree(latents, source)
    write_json(source / "config.json", read_json(source / "config.json") | config)
    with pytest.raises(CheckpointError, match=reason):
        export_gguf(source, tmp_path / "model.gguf")
    assert sorted(path.name for path in tmp_path.iterdir()) == ["latents"]


def changed_tensors(latents: Path, target: Path, **changes: Any) -> Path:
    shutil.copytree(latents, target)
    tensors = load_file(latents / SINGLE)
    for key, change in changes.items():
        tensors[key] = change(tensors[key])
    save_file(tensors, target / SINGLE, {"format": "pt"})
    return target


def test_weights_that_cannot_be_written_are_named(latents: Path, tmp_path: Path) -> None:
    key = "model.layers.1.mlp.up_proj.weight"
    cases = {
        "nan": (key, lambda w: w.index_fill(0, torch.tensor([3]), float("nan")), "holds a NaN", {}),
        "huge": (key, lambda w: w * 1e8, "no fp16 reciprocal", {}),
        "head": ("lm_head.weight", lambda w: w * 1e8, "beyond fp16's range", {"embeddings": "f16"}),
    }
    for name, (tensor, change, reason, options) in cases.items():
        source = changed_tensors(latents, tmp_path / name, **{tensor: change})
        with pytest.raises(CheckpointError, match=f"{tensor}.*{reason}"):
            export_gguf(source, tmp_path / "out" / "model.gguf", **options)
        assert not (tmp_path / "out").exists()
    # but a layer of zeros has its scale, if in no form without one
    source = changed_tensors(latents, tmp_path / "zero", **{key: torch.zeros_like})
    found = GGUFCheckpoint(export_gguf(source, tmp_path / "zero.gguf"))
    assert found.fingerprint() == LatentCheckpoint(source).fingerprint()


def test_what_is_asked_for_wrongly(latents: Path, file: Path, tmp_path: Path) -> None:
    target = tmp_path / "model.gguf"
    with pytest.raises(CheckpointError, match="type 'tq3_0'"):
        export_gguf(latents, target, "tq3_0")
    with pytest.raises(CheckpointError, match="embeddings 'q6_k'"):
        export_gguf(latents, target, embeddings="q6_k")
    with pytest.raises(CheckpointError, match="is a folder"):
        export_gguf(latents, tmp_path, overwrite=True)
    target.write_text("GGUF precious")
    with pytest.raises(CheckpointError, match=r"exists.*--overwrite"):
        export_gguf(latents, target)
    assert target.read_text() == "GGUF precious"
    export_gguf(latents, target, overwrite=True)
    assert target.read_bytes() == file.read_bytes() and target.stat().st_mode & 0o777 == 0o644


def test_without_the_gguf_package(latents: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "gguf", None)
    for call in (
        lambda: export_gguf(latents, tmp_path / "m.gguf"),
        lambda: GGUFCheckpoint(tmp_path / "m.gguf"),
    ):
        with pytest.raises(ImportError, match=r'pip install "axolotl-bitnet\[gguf\]"'):
            call()


# Whole files or none


def test_check_sees_the_whole_file_before_it_has_its_name(latents: Path, tmp_path: Path) -> None:
    target, seen = tmp_path / "model.gguf", []

    def check(work: Path) -> None:
        assert not target.exists() and work.parent == tmp_path
        seen.append(GGUFCheckpoint(work).fingerprint())
        if len(seen) == 1:
            raise ZeroDivisionError

    with pytest.raises(ZeroDivisionError):
        export_gguf(latents, target, check=check)
    assert list(tmp_path.iterdir()) == []
    export_gguf(latents, target, check=check)
    assert len(seen) == 2 and list(tmp_path.iterdir()) == [target]


@pytest.mark.parametrize("error", [OSError("No space left on device"), KeyboardInterrupt()])
def test_nothing_is_left_of_an_interrupted_file(
    latents: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, error: BaseException
) -> None:
    written = iter(range(100))

    def fail(*arguments: Any) -> Any:
        if next(written) == 7:
            raise error
        return original(*arguments)

    original = module._stored
    monkeypatch.setattr(module, "_stored", fail)
    (tmp_path / "model.gguf").write_text("GGUF precious")
    with pytest.raises(type(error)):
        export_gguf(latents, tmp_path / "model.gguf", overwrite=True)
    assert [path.name for path in tmp_path.iterdir()] == ["model.gguf"]
    assert (tmp_path / "model.gguf").read_text() == "GGUF precious"


MEMORY = """
import sys
import torch, transformers, gguf
from transformers import AutoTokenizer
from axolotl_bitnet.formats.export import export_gguf
from axolotl_bitnet.formats.gguf.reader import GGUFCheckpoint

def status(key):
    lines = open("/proc/self/status").read().splitlines()
    return next(int(line.split()[1]) * 1024 for line in lines if line.startswith(key))

before = status("VmRSS")
export_gguf(*sys.argv[1:], check=lambda path: GGUFCheckpoint(path).fingerprint())
print(status("VmHWM") - before)
"""


@pytest.mark.once
@pytest.mark.slow
@pytest.mark.skipif(not Path("/proc/self/status").exists(), reason="peak memory is read from /proc")
def test_writing_and_reading_need_little_memory(tmp_path: Path) -> None:
    """Of one of TQ1_0, which needs the more."""
    source = shutil.copytree(TINY / "model", tmp_path / "latents")
    sizes = {"hidden_size": 1024, "intermediate_size": 8192, "num_hidden_layers": 4, "head_dim": 256}
    config = read_json(source / "config.json") | sizes
    names = [name for name in tensors_of(ARCHITECTURES[0], shape_of(config)) if name.endswith("weight")]
    shapes = {name: tensors_of(ARCHITECTURES[0], shape_of(config))[name][1] for name in names}
    entries = [Entry(name, torch.float32, shape) for name, shape in shapes.items()]
    random = {shape: torch.randn(shape) for shape in set(shapes.values())}
    with SafetensorsWriter(source / SINGLE, entries) as writer:
        for name, shape in shapes.items():
            writer.write(name, random[shape])
    converted = [name.removesuffix(".weight") for name in names if "_proj" in name]
    write_json(source / "config.json", config | {CONFIG_KEY: {"converted": converted, "dense": ["lm_head"]}})
    largest, total = max(e.nbytes for e in entries), sum(e.nbytes for e in entries)
    assert total > 380 * 2**20
    done = python("-c", MEMORY, source, tmp_path / "model.gguf", "tq1_0", OMP_NUM_THREADS="1")
    peak = int(done.stdout)
    print(f"peak {peak / 2**20:.0f} MiB, largest {largest / 2**20:.0f} MiB, total {total / 2**20:.0f} MiB")
    assert largest / 8 < peak < 2 * largest + 300 * 2**20


def test_the_metadata_are_the_gguf_package_s(file: Path, latents: Path) -> None:
    """Our reading of the header against theirs."""
    theirs, ours = gguf.GGUFReader(file), GGUFCheckpoint(file)._header
    for key, field in theirs.fields.items():
        if not key.startswith("GGUF."):
            assert ours.metadata[key] == field.contents(), key
    assert json.loads(ours.metadata["axolotl_bitnet.config"]) == read_json(latents / "config.json")
    assert {t.name: int(t.data_offset) for t in theirs.tensors} == {
        n: t.offset for n, t in ours.tensors.items()
    }
    assert ours.metadata["general.name"] == "latents"


def test_python_of_the_page_runs(latents: Path, tmp_path: Path) -> None:
    page = (ROOT / "docs" / "gguf.md").read_text(encoding="utf-8")
    shutil.copytree(latents, tmp_path / "outputs" / "falcon-e-3b-sft")
    names: dict[str, Any] = {}
    for block in re.findall(r"```python\n(.*?)```", page, re.DOTALL):
        exec(compile(block.replace('"outputs', f'"{tmp_path}/outputs'), "gguf.md", "exec"), names)
    expected, s = LatentCheckpoint(latents).codes("model.layers.0.self_attn.q_proj")
    assert torch.equal(names["codes"], expected) and torch.equal(names["s"], s)
