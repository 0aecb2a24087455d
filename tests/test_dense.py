"""The dense revert: bf16(codes / s), its codes and scales read back, and packed again to the same bytes."""

from __future__ import annotations

import copy
from functools import partial
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file
from torch import nn

import axolotl_bitnet
from axolotl_bitnet.formats.dense import DenseCheckpoint, magnitude_of
from axolotl_bitnet.formats.export import open_checkpoint, pack_checkpoint, revert_checkpoint
from axolotl_bitnet.formats.latent import LatentCheckpoint
from axolotl_bitnet.model.convert import convert_to_bitlinear
from axolotl_bitnet.model.entry import CONFIG_KEY
from axolotl_bitnet.model.fingerprint import fingerprint_model
from axolotl_bitnet.model.preflight import preflight
from axolotl_bitnet.storage import safetensors_stream as stream
from axolotl_bitnet.storage.atomic import CheckpointError, read_json
from axolotl_bitnet.storage.parallel import row_ranges
from axolotl_bitnet.storage.safetensors_stream import SINGLE
from axolotl_bitnet.ternary import EPSILON, dequantize, latents_of, scale_of
from support.marks import slow_but
from support.stored import (
    FAMILIES,
    IDS,
    SAVINGS,
    Build,
    by_hand,
    codes_and_scales,
    edit,
    same_files,
    save,
    trained,
)

# Scales


def every_g() -> torch.Tensor:
    """All bfloat16 from the definition's epsilon to 3.3e38: 128 mantissas, 144 exponents."""
    values = torch.arange(0x7F80, dtype=torch.int16).view(torch.bfloat16)
    return values[(values.float() >= EPSILON) & (values.float() < 3.3e38)]


def test_every_scale_of_the_definition_is_recoverable() -> None:
    """Proof by cases: s = bf16(1 / m) of m = bf16(1 / s), for every g there is."""
    s = scale_of(every_g())
    assert len(s) > 128 * 140
    magnitude = s.float().reciprocal().to(torch.bfloat16)
    assert torch.equal(scale_of(magnitude), s)
    assert torch.equal(dequantize(torch.ones(1), s, torch.bfloat16), magnitude)  # it is bf16(codes / s)
    # the inner rounding is what does it
    bare = torch.linspace(1, 2, 1000).reciprocal().to(torch.bfloat16)
    assert not torch.equal(scale_of(bare.float().reciprocal().to(torch.bfloat16)), bare)


def test_weights_are_within_their_rounding() -> None:
    s = scale_of(every_g())
    s = s[s.float() > 1e-30]  # where 1 / s is a normal number
    magnitude = s.float().reciprocal().to(torch.bfloat16)
    assert (magnitude.double() * s.double() - 1).abs().max() < 2**-8


def test_scales_that_bfloat16_weights_cannot_carry() -> None:
    codes = torch.tensor([[1, 0], [-1, 1]], dtype=torch.int8)
    found = {True: 0, False: 0}
    for mantissa in range(128):
        s = torch.tensor([1 + mantissa / 128]).to(torch.bfloat16)
        recoverable = torch.equal(scale_of(s.float().reciprocal()), s)
        found[recoverable] += 1
        if recoverable:
            assert torch.equal(scale_of(magnitude_of(codes, s)), s)
        else:
            with pytest.raises(ValueError, match=r"not bf16\(1 / bf16\(g\)\).*restore"):
                magnitude_of(codes, s)
    assert min(found.values()) > 10


SHAPES = [(4, 1), (1, 7), (12, 5), (64, 33), (131, 64)]


@pytest.mark.parametrize("elements", slow_but(1, [1 << 20, 40]))
def test_odd_shapes_and_all_mantissas(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, elements: int) -> None:
    """Read in one block of rows or in many."""

    matrices, expected = {}, {}
    for index in range(128):
        shape = SHAPES[index % len(SHAPES)]
        codes = torch.randint(-1, 2, shape, dtype=torch.int8)
        codes[0, 0], codes[-1, -1] = 1, -1
        s = scale_of(torch.tensor((1 + index / 128) * 2.0 ** -(index % 20)))
        try:
            matrices[f"l{index}"] = latents_of(codes, s)
        except ValueError:  # too few codes to meet the scale
            continue
        expected[f"l{index}"] = (codes, s)
    assert len(expected) > 100
    by_hand(tmp_path / "latents", matrices)
    revert_checkpoint(tmp_path / "latents", tmp_path / "dense")
    monkeypatch.setattr(stream, "row_ranges", partial(row_ranges, elements=elements))
    found = open_checkpoint(tmp_path / "dense")
    assert isinstance(found, DenseCheckpoint)
    for name, (codes, s) in expected.items():
        read = found.codes(name)
        assert torch.equal(read[0], codes) and torch.equal(read[1], s), name
        assert read[0].dtype == torch.int8 and read[1].dtype == torch.bfloat16


def test_zeros_have_the_definition_s_scale(tmp_path: Path) -> None:
    latents = by_hand(tmp_path / "latents", {"dead": torch.zeros(4, 8), "live": torch.randn(8, 4)})
    found = DenseCheckpoint(revert_checkpoint(latents, tmp_path / "dense"))
    for name in ("dead", "live"):
        for one, other in zip(found.codes(name), LatentCheckpoint(latents).codes(name), strict=True):
            assert torch.equal(one, other)


# Whole models


@pytest.mark.parametrize("family", slow_but(1, FAMILIES))
def test_the_revert_of_a_model(tiny_model: Build, tmp_path: Path, family: str) -> None:
    model = trained(tiny_model, family)
    expected = codes_and_scales(model)
    dense, packed = None, None
    for saving in SAVINGS:
        latents = save(model, tmp_path / saving, saving)
        written = revert_checkpoint(latents, tmp_path / f"{saving} dense")
        assert written == tmp_path / f"{saving} dense"
        if dense is None:
            dense = written
            packed = pack_checkpoint(latents, tmp_path / "packed")
        same_files(written, dense)  # whatever the latents' dtype and shards
    assert dense is not None and packed is not None
    same_files(revert_checkpoint(packed, tmp_path / "from packed"), dense)
    assert (dense / "chat_template.jinja").read_text() == "this is chat_template.jinja"

    # the bytes
    tensors = load_file(dense / SINGLE)
    assert {t.dtype for t in tensors.values()} == {torch.bfloat16}
    for name, parameter in model.named_parameters():
        codes, s = expected.get(name.removesuffix(".weight"), (None, None))
        value = parameter.detach() if codes is None else dequantize(codes, s)
        assert torch.equal(tensors[name], value.to(torch.bfloat16)), name
        if codes is not None:
            assert ((tensors[name] - value).abs() <= value.abs() / 256).all()
    tied = FAMILIES[family][1].get("tie_word_embeddings", False)
    assert ("lm_head.weight" in tensors) != tied

    # the config
    config = read_json(dense / "config.json")
    assert config["dtype"] == "bfloat16" and "quantization_config" not in config
    entry = config[CONFIG_KEY]
    assert entry.pop("format") == "dense" and entry == getattr(model.config, CONFIG_KEY)

    # read back, and packed again
    found = open_checkpoint(dense)
    assert isinstance(found, DenseCheckpoint) and found.fingerprint() == fingerprint_model(model)
    assert found.config == {**config, CONFIG_KEY: entry}
    assert config["rope_theta"] == config["rope_parameters"]["rope_theta"]
    for name, (codes, s) in expected.items():
        assert torch.equal(found.codes(name)[0], codes) and torch.equal(found.codes(name)[1], s)
    same_files(pack_checkpoint(dense, tmp_path / "packed again"), packed)
    same_files(revert_checkpoint(dense, tmp_path / "dense again"), dense)


@pytest.mark.parametrize("family", FAMILIES)
def test_loads_in_plain_transformers(tiny_model: Build, tmp_path: Path, family: str) -> None:
    """As nn.Linear layers with these weights, and nothing missing."""
    from transformers import AutoModelForCausalLM

    model = trained(tiny_model, family)
    dense = revert_checkpoint(save(model, tmp_path / "latents"), tmp_path / "dense")
    loaded, loading = AutoModelForCausalLM.from_pretrained(dense, dtype="auto", output_loading_info=True)
    assert loaded.dtype == torch.bfloat16
    assert not any(loading[key] for key in ("missing_keys", "unexpected_keys", "mismatched_keys"))
    linear = {name for name, module in loaded.named_modules() if type(module) is nn.Linear}
    assert linear >= set(codes_and_scales(model))

    kind, options, _ = FAMILIES[family]
    reference = tiny_model(kind, **options).eval()
    state = copy.deepcopy(model.state_dict())
    for name, (codes, s) in codes_and_scales(model).items():
        state[f"{name}.weight"] = dequantize(codes, s)
    reference.load_state_dict(
        {name: t.to(torch.bfloat16).float() for name, t in state.items() if "rotary" not in name}
    )
    with torch.no_grad():
        logits = loaded.float().eval()(IDS).logits
        assert torch.equal(logits, reference(IDS).logits) and logits.std() > 1e-3
        assert not torch.equal(logits, model(IDS).logits)  # no activation is quantized


# As a base


def test_as_a_base_of_a_ternary_run(tiny_model: Build, tmp_path: Path) -> None:
    """Re-scaled at once, so that it trains on as the model that it was."""
    from transformers import AutoModelForCausalLM

    model = trained(tiny_model, "llama")
    dense = revert_checkpoint(save(model, tmp_path / "latents"), tmp_path / "dense")
    for dtype in (torch.float32, torch.bfloat16):
        base = AutoModelForCausalLM.from_pretrained(dense, dtype=dtype)
        names = convert_to_bitlinear(base)
        assert fingerprint_model(base) != fingerprint_model(model)  # it would shrink
        found = preflight(base, names)
        assert set(found.rescaled) <= set(names) and found.shrunk == [] and found.warnings(False) == []
        assert fingerprint_model(base) == fingerprint_model(model)
        base.save_pretrained(tmp_path / "trained on")
        assert isinstance(open_checkpoint(tmp_path / "trained on"), LatentCheckpoint)
        assert LatentCheckpoint(tmp_path / "trained on").fingerprint() == fingerprint_model(model)


def test_as_a_base_of_a_dense_run(tiny_model: Build, tmp_path: Path) -> None:
    """Latents computed as dense weights are another model, and a user is told so; a revert is meant to be."""
    pytest.importorskip("axolotl.cli")
    from axolotl.utils.dict import DictDefault

    from axolotl_bitnet.plugin.base_model import holds_latents

    latents = save(trained(tiny_model, "llama"), tmp_path / "latents")
    dense = revert_checkpoint(latents, tmp_path / "dense")
    assert holds_latents(DictDefault({"base_model": str(latents)}))
    assert not holds_latents(DictDefault({"base_model": str(dense)}))


# Failures, each beside the success above


def flip_one(tensors: dict[str, torch.Tensor]) -> None:
    tensors["model.layers.1.mlp.up_proj.weight"][3, 5] = 0.5


def nan_in(tensors: dict[str, torch.Tensor]) -> None:
    tensors["model.layers.1.mlp.up_proj.weight"][127, 63] = float("nan")


@pytest.mark.parametrize("change", [flip_one, nan_in])
def test_what_is_not_ternary_any_more(tiny_model: Build, tmp_path: Path, change: Any) -> None:
    dense = revert_checkpoint(save(trained(tiny_model, "llama"), tmp_path / "latents"), tmp_path / "dense")
    edit(dense, change)
    message = r"dense: 'model\.layers\.1\.mlp\.up_proj\.weight' is not ternary"
    with pytest.raises(CheckpointError, match=message):
        open_checkpoint(dense).fingerprint()
    with pytest.raises(CheckpointError, match=message):
        pack_checkpoint(dense, tmp_path / "packed")
    assert sorted(path.name for path in tmp_path.iterdir()) == ["dense", "latents"]


def test_latents_are_not_taken_for_dense_nor_dense_for_latents(tiny_model: Build, tmp_path: Path) -> None:
    latents = save(trained(tiny_model, "llama"), tmp_path / "latents")
    dense = revert_checkpoint(latents, tmp_path / "dense")
    with pytest.raises(CheckpointError, match="is a dense revert"):
        LatentCheckpoint(dense)
    with pytest.raises(CheckpointError, match="is not a dense revert's"):
        DenseCheckpoint(latents)
    for name in ("model.layers.0.mlp.up_proj.weight", "model.layers.0.mlp.down_proj.weight"):
        edit(dense, lambda tensors, name=name: tensors.pop(name))  # type: ignore[misc]
        with pytest.raises(CheckpointError, match="has no floating-point matrix"):
            DenseCheckpoint(dense)


def test_nan_in_the_source(tmp_path: Path) -> None:
    weight = torch.randn(8, 8)
    weight[3, 3] = torch.inf
    latents = by_hand(tmp_path / "latents", {"good": torch.randn(4, 4), "rotten": weight})
    with pytest.raises(CheckpointError, match=r"latents: 'rotten\.weight' holds a NaN or an Inf"):
        revert_checkpoint(latents, tmp_path / "dense")
    assert [path.name for path in tmp_path.iterdir()] == ["latents"]


def test_targets(tmp_path: Path) -> None:
    latents = by_hand(tmp_path / "latents", {"a": torch.randn(4, 4)})
    before = {path.name: path.read_bytes() for path in latents.iterdir()}
    for target in (latents, tmp_path):
        with pytest.raises(CheckpointError, match="would replace its own source"):
            revert_checkpoint(latents, target, overwrite=True)
    assert {path.name: path.read_bytes() for path in latents.iterdir()} == before
    inside = revert_checkpoint(latents, latents / "dense")
    with pytest.raises(CheckpointError, match="exists"):
        revert_checkpoint(latents, inside)
    seen = []

    def refuse(work: Path) -> None:
        seen.append(DenseCheckpoint(work).fingerprint())
        raise RuntimeError("not this one")

    stamp = (inside / SINGLE).stat().st_mtime_ns
    with pytest.raises(RuntimeError, match="not this one"):
        revert_checkpoint(latents, inside, overwrite=True, check=refuse)
    assert seen == [LatentCheckpoint(latents).fingerprint()]
    assert (inside / SINGLE).stat().st_mtime_ns == stamp
    assert sorted(path.name for path in latents.iterdir()) == ["config.json", "dense", SINGLE]
    assert revert_checkpoint(latents, inside, overwrite=True) == inside
    assert (inside / SINGLE).stat().st_mtime_ns != stamp


def test_public_name() -> None:
    assert axolotl_bitnet.revert_checkpoint is revert_checkpoint


@pytest.mark.slow
def test_axolotl_trains_on_from_a_revert(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    """At a rate too low to flip a code, what is packed is what was reverted. Then a dense run, unwarned."""
    pytest.importorskip("axolotl.cli")
    from transformers import AutoConfig, AutoModelForCausalLM, AutoTokenizer

    from support import TINY
    from support.runs import config, train

    torch.manual_seed(3)
    latents, tokenizer = tmp_path / "latents", AutoTokenizer.from_pretrained(TINY / "model")
    model = AutoModelForCausalLM.from_config(AutoConfig.from_pretrained(TINY / "model"))
    convert_to_bitlinear(model)
    model.save_pretrained(latents)
    tokenizer.save_pretrained(latents)
    dense = revert_checkpoint(latents, tmp_path / "dense")

    with caplog.at_level("INFO"):
        run = train(config(tmp_path, dense, learning_rate=1e-9, max_steps=2))
    assert len(run.losses) == 2 and "base was dense ternary" in caplog.text
    packed = open_checkpoint(tmp_path / "out" / "packed")
    assert packed.fingerprint() == open_checkpoint(latents).fingerprint()
    assert "format" not in read_json(tmp_path / "out" / "config.json")[CONFIG_KEY]

    caplog.clear()
    with caplog.at_level("INFO"):
        train(
            config(tmp_path, dense, use_onebitllms=None, max_steps=1, output_dir=str(tmp_path / "dense out"))
        )
    assert "holds the latents" not in caplog.text
