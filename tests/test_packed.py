"""Packed folders: the bytes, the config, and the logits that plain transformers computes from them."""

from __future__ import annotations

import contextlib
import copy
import os
import subprocess
import sys
from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from safetensors.torch import load_file, save_file
from torch import Tensor, nn

import axolotl_bitnet
from axolotl_bitnet.formats.export import pack_checkpoint
from axolotl_bitnet.formats.latent import LatentCheckpoint
from axolotl_bitnet.formats.packed import (
    PackedCheckpoint,
    _exclusions,
    pack_codes,
    packed_config,
    unpack_codes,
)
from axolotl_bitnet.layers.bitlinear import BitLinear
from axolotl_bitnet.model.convert import convert_to_bitlinear
from axolotl_bitnet.model.entry import CONFIG_KEY
from axolotl_bitnet.model.fingerprint import fingerprint_model
from axolotl_bitnet.model.layer_plan import Plan
from axolotl_bitnet.storage.atomic import CheckpointError, read_json, write_json
from axolotl_bitnet.storage.safetensors_stream import INDEX, SINGLE, Entry, SafetensorsWriter
from axolotl_bitnet.ternary import ternarize
from support.processes import python

Build = Callable[..., nn.Module]


def left_in(folder: Path) -> list[str]:
    return sorted(path.name for path in folder.iterdir())


def isolated_environment() -> dict[str, str]:
    """This process's, without the folder that our package is in and with transformers' compilation off."""
    source = str(Path(axolotl_bitnet.__file__).parents[1])
    paths = [path for path in os.environ.get("PYTHONPATH", "").split(os.pathsep) if path]
    paths = [path for path in paths if Path(path).resolve() != Path(source).resolve()]
    return os.environ | {
        "PYTHONPATH": os.pathsep.join(paths),
        "TORCH_COMPILE_DISABLE": "1",
        "HF_HUB_OFFLINE": "1",
    }


# Bytes


def random_codes(rows: int, columns: int) -> Tensor:
    return torch.randint(-1, 2, (rows, columns), dtype=torch.int8)


SHAPES = [(4, 1), (4, 7), (12, 5), (64, 33), (132, 64)]


@pytest.mark.parametrize("shape", SHAPES)
def test_bytes_are_the_layout(shape: tuple[int, int]) -> None:
    codes = random_codes(*shape)
    before = codes.clone()
    packed = pack_codes(codes)
    quarters = (codes.numpy().astype(np.int64) + 1).reshape(4, shape[0] // 4, shape[1])
    expected = (quarters * np.array([1, 4, 16, 64])[:, None, None]).sum(axis=0)
    assert packed.dtype == torch.uint8 and packed.tolist() == expected.tolist()
    assert torch.equal(unpack_codes(packed), codes) and unpack_codes(packed).dtype == torch.int8
    assert torch.equal(codes, before)


def test_bytes_of_one_column() -> None:
    assert pack_codes(torch.tensor([[-1], [0], [1], [-1]], dtype=torch.int8)).tolist() == [[0b00_10_01_00]]
    assert unpack_codes(torch.tensor([[0b11_10_01_00]], dtype=torch.uint8)).flatten().tolist() == [
        -1,
        0,
        1,
        2,
    ]


@pytest.mark.parametrize("shape", SHAPES)
def test_bytes_are_transformers_own(shape: tuple[int, int]) -> None:
    from transformers.integrations.bitnet import pack_weights, unpack_weights

    codes = random_codes(*shape)
    packed = pack_codes(codes)
    assert torch.equal(packed, pack_weights(codes.clone()))  # it writes into its argument
    with torch.compiler.set_stance("force_eager"):
        assert torch.equal(unpack_weights(packed, dtype=torch.float32), codes.to(torch.float32))
        damaged = packed.clone()
        damaged[0, 0] ^= 1
        assert not torch.equal(unpack_weights(damaged, dtype=torch.float32), codes.to(torch.float32))


@pytest.mark.parametrize("rows", [1, 2, 3, 5, 66])
def test_rows_that_cannot_be_packed(rows: int) -> None:
    with pytest.raises(ValueError, match=f"{rows} rows cannot be packed: not a multiple of 4"):
        pack_codes(random_codes(rows, 8))


# What a plain transformers makes of a packed folder


@dataclass
class Case:
    family: str
    options: dict[str, Any] = field(default_factory=dict)
    skip: list[str] = field(default_factory=list)


CASES = {
    "llama": Case("Llama"),
    "llama tied with biases": Case(
        "Llama", {"tie_word_embeddings": True, "attention_bias": True, "mlp_bias": True}
    ),
    "qwen3": Case("Qwen3"),
    "bitnet": Case("BitNet"),
    "llama partly dense": Case(
        "Llama", {}, ["model.layers.0.self_attn", "model.layers.1.mlp.up_proj", "down_proj"]
    ),
}
SOURCES = {
    "float32": (torch.float32, {}),
    "float32 shards": (torch.float32, {"max_shard_size": "40KB"}),
    "bfloat16": (torch.bfloat16, {}),
    "bfloat16 shards": (torch.bfloat16, {"max_shard_size": "20KB"}),
}
IDS = torch.arange(48).reshape(2, 24) * 7 % 128
PLAIN = """
import sys
from pathlib import Path
import torch
from safetensors.torch import load_file, save_file
from transformers import AutoModelForCausalLM
torch.set_num_threads(1)
root, results = Path(sys.argv[1]), {}
ids = load_file(root / "ids.safetensors")["ids"]
for folder in sorted((root / "packed").iterdir()):
    model = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32).eval()
    with torch.no_grad():
        results[folder.name] = model(ids).logits.contiguous()
    kinds = {name: type(m).__module__ for name, m in model.named_modules() if type(m).__name__ == "BitLinear"}
    assert set(kinds.values()) == {"transformers.integrations.bitnet"}
    (root / "ternary" / folder.name).write_text("\\n".join(kinds))
save_file(results, root / "logits.safetensors")
assert "axolotl_bitnet" not in sys.modules
"""


@dataclass
class Zoo:
    """All cases: the model that trained, its latents four times, and what plain transformers made of it."""

    root: Path
    models: dict[str, nn.Module]
    logits: dict[str, Tensor]

    def packed(self, case: str, source: str = "float32") -> Path:
        return self.root / ("packed" if source == "float32" else source) / case

    def latents(self, case: str, source: str = "float32") -> Path:
        return self.root / "latents" / case / source


@pytest.fixture(scope="session")
def zoo(tiny_model: Build, tmp_path_factory: pytest.TempPathFactory) -> Zoo:
    torch.manual_seed(11)
    root = tmp_path_factory.mktemp("zoo")
    result = Zoo(root, {}, {})
    for case, options in CASES.items():
        model = tiny_model(options.family, **options.options).eval()
        convert_to_bitlinear(model, options.skip)
        with torch.no_grad():  # norms of 1 and biases of 0 would hide much
            for parameter in model.parameters():
                if parameter.dim() == 1:
                    parameter += torch.randn_like(parameter) * 0.3
        result.models[case] = model
        for source, (dtype, saving) in SOURCES.items():
            saved = copy.deepcopy(model).to(dtype)
            saved.save_pretrained(result.latents(case, source), **saving)
            pack_checkpoint(result.latents(case, source), result.packed(case, source))

    # The counterexample: one code of one layer is another.
    damaged = root / "packed" / "llama damaged"
    pack_checkpoint(result.latents("llama"), damaged)
    tensors = load_file(damaged / SINGLE)
    codes = unpack_codes(tensors["model.layers.1.mlp.up_proj.weight"])
    codes[17, 40] = codes[17, 40] % 2 * 2 - 1  # 0 to -1, others to 1
    codes[17, 41] = -1 if codes[17, 41] == 1 else codes[17, 41] + 1
    tensors["model.layers.1.mlp.up_proj.weight"] = pack_codes(codes)
    save_file(tensors, damaged / SINGLE, {"format": "pt"})

    (root / "ternary").mkdir()
    save_file({"ids": IDS}, root / "ids.safetensors")
    done = subprocess.run(
        [sys.executable, "-c", PLAIN, str(root)],
        env=isolated_environment(),
        cwd=root,
        capture_output=True,
        text=True,
        timeout=300,
    )
    assert done.returncode == 0, done.stderr
    result.logits = load_file(root / "logits.safetensors")
    return result


def logits(model: nn.Module) -> Tensor:
    with torch.no_grad():
        return model(IDS).logits


def with_rounded_rest(model: nn.Module) -> nn.Module:
    """The trained model with all but its ternary weights rounded to bfloat16, as a packed folder has them."""
    model = copy.deepcopy(model)
    ternary = {f"{name}.weight" for name, module in model.named_modules() if isinstance(module, BitLinear)}
    for name, parameter in model.named_parameters():
        if name not in ternary:
            parameter.data = parameter.data.to(torch.bfloat16).to(torch.float32)
    return model


@pytest.mark.parametrize("case", CASES)
@pytest.mark.slow
def test_logits_are_the_trained_model_s(zoo: Zoo, case: str) -> None:
    """To the bit, in float32, in a process that has never heard of this package."""
    trained = logits(with_rounded_rest(zoo.models[case]))
    assert torch.equal(zoo.logits[case], trained)
    assert trained.std() > 1e-3 and bool(trained.isfinite().all())
    assert not torch.equal(logits(zoo.models[case]), trained)  # the rounding of the rest does show


@pytest.mark.slow
def test_logits_show_two_codes(zoo: Zoo) -> None:
    assert not torch.equal(zoo.logits["llama damaged"], zoo.logits["llama"])


@pytest.mark.parametrize("case", CASES)
@pytest.mark.parametrize("source", list(SOURCES)[1:])
def test_every_source_gives_the_same_folder(zoo: Zoo, case: str, source: str) -> None:
    latents, one, other = zoo.latents(case, source), zoo.packed(case), zoo.packed(case, source)
    assert (latents / INDEX).exists() == ("shards" in source)
    dtype = next(iter(LatentCheckpoint(latents).reader.entries.values())).dtype
    assert dtype == SOURCES[source][0]
    assert left_in(one) == left_in(other) == ["config.json", "generation_config.json", SINGLE]
    for name in ("config.json", SINGLE):
        assert (one / name).read_bytes() == (other / name).read_bytes(), name


@pytest.mark.parametrize("case", CASES)
def test_skipped_layers_stay_dense(zoo: Zoo, case: str) -> None:
    """In transformers' eyes and in the file."""
    ternary = {name for name, module in zoo.models[case].named_modules() if isinstance(module, BitLinear)}
    dense = {
        name for name, module in zoo.models[case].named_modules() if isinstance(module, nn.Linear)
    } - ternary
    expected = {"lm_head"}
    if CASES[case].skip:
        expected |= {f"model.layers.0.self_attn.{x}_proj" for x in "qkvo"}
        expected |= {
            "model.layers.1.mlp.up_proj",
            "model.layers.0.mlp.down_proj",
            "model.layers.1.mlp.down_proj",
        }
    assert dense == expected
    assert set((zoo.root / "ternary" / case).read_text().split()) == ternary
    tensors = load_file(zoo.packed(case) / SINGLE)
    assert {name.removesuffix(".weight") for name, t in tensors.items() if t.dtype == torch.uint8} == ternary
    assert {name.removesuffix(".weight_scale") for name in tensors if name.endswith("_scale")} == ternary
    assert {t.dtype for t in tensors.values()} == {torch.uint8, torch.bfloat16}


@pytest.mark.parametrize("case", CASES)
def test_folder_holds_the_model(zoo: Zoo, case: str) -> None:
    model, found = zoo.models[case], PackedCheckpoint(zoo.packed(case))
    tensors = load_file(zoo.packed(case) / SINGLE)
    assert found.fingerprint() == fingerprint_model(model)
    for name, parameter in model.named_parameters():
        layer = name.removesuffix(".weight")
        if layer in found.keys:
            codes, scale = ternarize(parameter.detach())
            read = found.codes(layer)
            assert torch.equal(read[0], codes) and torch.equal(read[1], scale)
            assert found.entries[name].shape == codes.shape
            assert tensors[f"{layer}.weight_scale"].shape == (1,)
        else:
            assert torch.equal(tensors[name], parameter.detach().to(torch.bfloat16)), name
    tied = CASES[case].options.get("tie_word_embeddings", False)
    assert ("lm_head.weight" in tensors) != tied


# The config


@pytest.mark.parametrize("case", CASES)
@pytest.mark.parametrize("source", SOURCES)
def test_config(zoo: Zoo, case: str, source: str) -> None:
    before = read_json(zoo.latents(case, source) / "config.json")
    after = read_json(zoo.packed(case, source) / "config.json")
    quantization = after.pop("quantization_config")
    exclusions = quantization.pop("modules_to_not_convert")
    assert quantization == {
        "quant_method": "bitnet",
        "linear_class": "bitlinear",
        "quantization_mode": "offline",
    }
    assert exclusions == before[CONFIG_KEY]["dense"]
    assert after.pop("dtype") == "bfloat16" and "torch_dtype" not in after
    assert after.pop("rope_theta") == before["rope_parameters"]["rope_theta"] > 0
    assert before.pop("dtype") == ("float32" if "float32" in source else "bfloat16")
    before.pop("rope_theta", None)
    assert after == before


def test_config_details() -> None:
    names = Plan(["up"], ["lm_head"])
    old = {"torch_dtype": "float32", "rope_parameters": {"rope_theta": 1000042, "rope_type": "default"}}
    before = copy.deepcopy(old)
    new = packed_config(old, names)
    assert old == before  # the caller's is not touched
    assert new["rope_theta"] == 1000042 and new["rope_parameters"] == old["rope_parameters"]
    assert new["dtype"] == "bfloat16" and "torch_dtype" not in new
    assert packed_config(old | {"rope_theta": 7}, names)["rope_theta"] == 7
    for rope in ({}, {"rope_parameters": None}, {"rope_parameters": {"full_attention": {"rope_theta": 1}}}):
        assert "rope_theta" not in packed_config(rope, names)
    assert (
        packed_config({"quantization_config": {"linear_class": "autobitlinear"}}, names)[
            "quantization_config"
        ]
        == new["quantization_config"]
    )


LAYER = "model.layers.0"
TRAPS = {
    "prefix": Plan([f"{LAYER}.mlp.gate_proj", f"{LAYER}.mlp.up_proj"], [f"{LAYER}.mlp.gate"]),
    "number": Plan(["h.11", "h.12.a"], ["h.1"]),
    "suffix": Plan(["model.layers.0.in_proj", "b.in_proj"], ["proj", "in_proj"]),
    "head": Plan(["decoder.lm_head"], ["lm_head"]),
    "prefix of a head": Plan(["lm_head_norm.proj"], ["lm_head"]),
    "expression": Plan(["a.b+c.up", "a.bbc.up"], ["a.b+c", "a.b"]),
    "dot": Plan([f"{LAYER}.mlpxgate"], [f"{LAYER}.mlp.gate"]),
}


@pytest.mark.parametrize("trap", TRAPS)
def test_exclusions_as_transformers_reads_them(trap: str) -> None:
    """It takes an entry for a regular expression at the start, or for an end, of a module's name."""
    from transformers.quantizers.quantizers_utils import should_convert_module

    names = TRAPS[trap]
    exclusions = packed_config({}, names)["quantization_config"]["modules_to_not_convert"]
    assert exclusions == _exclusions(names) and len(exclusions) == len(names.dense)
    assert {
        name: should_convert_module(name, exclusions) for name in names.converted + names.dense
    } == dict.fromkeys(names.converted, True) | dict.fromkeys(names.dense, False)
    # the trap is one: the names as they are would keep a ternary layer dense
    assert not all(should_convert_module(name, names.dense) for name in names.converted)


def test_exclusions_stay_plain_where_they_can() -> None:
    """MLX and others read them as plain names."""
    dense = ["lm_head", "model.layers.1.mlp.down_proj"]
    names = Plan(["model.layers.0.mlp.down_proj", "model.layers.10.mlp.down_proj"], dense)
    assert _exclusions(names) == dense
    assert _exclusions(Plan(["a"], [])) == []


# What comes along


def test_companions_come_along_and_strays_do_not(zoo: Zoo, tmp_path: Path) -> None:
    source = tmp_path / "source"
    source.mkdir()
    for path in zoo.latents("llama").iterdir():
        (source / path.name).write_bytes(path.read_bytes())
    wanted = ["chat_template.jinja", "special_tokens_map.json", "tokenizer.json", "tokenizer_config.json"]
    strays = [
        "training_args.bin",
        "optimizer.pt",
        "README.md",
        "debug.log",
        "bitnet.json",
        "trainer_state.json",
    ]
    for name in wanted + strays:
        (source / name).write_text(f"this is {name}")
    (source / "checkpoint-3").mkdir()
    target = pack_checkpoint(source, str(tmp_path / "deep" / "packed"))
    assert target == tmp_path / "deep" / "packed"
    assert left_in(target) == sorted([*wanted, "config.json", "generation_config.json", SINGLE])
    assert all((target / name).read_text() == f"this is {name}" for name in wanted)
    assert (target / "generation_config.json").read_bytes() == (
        source / "generation_config.json"
    ).read_bytes()


def test_integers_are_kept(zoo: Zoo, tmp_path: Path) -> None:
    """Only floating-point tensors become bfloat16."""
    source = editable(zoo, tmp_path)
    extra = {"steps": torch.tensor(2**40 + 1), "mask": torch.rand(5) < 0.5, "half": torch.randn(3).half()}
    edit(source, lambda tensors: tensors.update(extra))
    tensors = load_file(pack_checkpoint(source, tmp_path / "packed") / SINGLE)
    assert torch.equal(tensors["steps"], extra["steps"]) and torch.equal(tensors["mask"], extra["mask"])
    assert torch.equal(tensors["half"], extra["half"].to(torch.bfloat16))


# What cannot be packed leaves nothing behind


def editable(zoo: Zoo, tmp_path: Path) -> Path:
    source = tmp_path / "source"
    source.mkdir()
    for path in zoo.latents("llama").iterdir():
        (source / path.name).write_bytes(path.read_bytes())
    return source


def edit(folder: Path, change: Callable[[dict[str, Tensor]], Any]) -> None:
    tensors = load_file(folder / SINGLE)
    change(tensors)
    save_file(tensors, folder / SINGLE, {"format": "pt"})


def edit_config(folder: Path, change: Callable[[dict[str, Any]], Any]) -> None:
    config = read_json(folder / "config.json")
    change(config)
    write_json(folder / "config.json", config)


LAST = "model.layers.1.self_attn.v_proj.weight"
FAILURES: dict[str, tuple[Callable[[Path], Any], str]] = {
    "not ternary": (
        lambda folder: edit_config(folder, lambda c: (c.pop(CONFIG_KEY), c.pop("model_type"))),
        "transformers has no architecture 'None' of its own",
    ),
    "no config": (lambda folder: (folder / "config.json").unlink(), "does not exist"),
    "no weights": (lambda folder: (folder / SINGLE).unlink(), "holds neither"),
    "nan": (
        lambda folder: edit(folder, lambda t: t[LAST].view(-1)[-1].fill_(torch.nan)),
        f"'{LAST}' holds a NaN or an Inf",
    ),
    "inf": (
        lambda folder: edit(folder, lambda t: t[LAST].view(-1)[0].fill_(-torch.inf)),
        f"'{LAST}' holds a NaN or an Inf",
    ),
    "missing layer": (lambda folder: edit(folder, lambda t: t.pop(LAST)), f"has no '{LAST}'"),
    "rows": (
        lambda folder: edit(folder, lambda t: t.update({LAST: t[LAST][:30].clone()})),
        f"'{LAST}' has 30 rows, not a multiple of 4",
    ),
    "truncated": (
        lambda folder: (folder / SINGLE).write_bytes((folder / SINGLE).read_bytes()[:-5]),
        "cannot be read as safetensors",
    ),
}


@pytest.mark.parametrize("failure", FAILURES)
def test_failures_name_the_cause_and_leave_nothing(zoo: Zoo, tmp_path: Path, failure: str) -> None:
    source = editable(zoo, tmp_path)
    pack_checkpoint(source, tmp_path / "good")
    damage, message = FAILURES[failure]
    damage(source)
    before = left_in(source)
    with pytest.raises(CheckpointError, match=message) as caught:
        pack_checkpoint(source, tmp_path / "packed")
    assert str(source) in str(caught.value)
    assert left_in(tmp_path) == ["good", "source"] and left_in(source) == before

    with pytest.raises(CheckpointError, match=message):  # nor is an older folder lost
        pack_checkpoint(source, tmp_path / "good", overwrite=True)
    assert left_in(tmp_path) == ["good", "source"]
    assert PackedCheckpoint(tmp_path / "good").fingerprint() == fingerprint_model(zoo.models["llama"])


def test_packed_folder_packed_again_is_itself(zoo: Zoo, tmp_path: Path) -> None:
    again = pack_checkpoint(zoo.packed("llama"), tmp_path / "again")
    for name in left_in(zoo.packed("llama")):
        assert (again / name).read_bytes() == (zoo.packed("llama") / name).read_bytes(), name
    assert left_in(again) == left_in(zoo.packed("llama"))
    with pytest.raises(CheckpointError, match="is not a packed model's"):
        PackedCheckpoint(zoo.latents("llama"))


def test_target_that_exists(zoo: Zoo, tmp_path: Path) -> None:
    target = tmp_path / "packed"
    pack_checkpoint(zoo.latents("llama"), target)
    with pytest.raises(CheckpointError, match=r"exists.*--overwrite"):
        pack_checkpoint(zoo.latents("qwen3"), target)
    assert PackedCheckpoint(target).fingerprint() == fingerprint_model(zoo.models["llama"])
    pack_checkpoint(zoo.latents("qwen3"), target, overwrite=True)
    assert PackedCheckpoint(target).fingerprint() == fingerprint_model(zoo.models["qwen3"])
    assert left_in(tmp_path) == ["packed"]


@pytest.mark.parametrize("target", ["runs/source", "runs/../runs/source", "link", "runs"])
def test_latents_are_never_overwritten(zoo: Zoo, tmp_path: Path, target: str) -> None:
    """Neither by packing a folder onto itself, nor onto one that it lies in."""
    (tmp_path / "runs").mkdir()
    source = editable(zoo, tmp_path / "runs")
    (tmp_path / "link").symlink_to(source)
    weights = (source / SINGLE).read_bytes()
    with contextlib.suppress(CheckpointError):
        pack_checkpoint(source, tmp_path / target, overwrite=True)
    assert (source / SINGLE).is_file() and (source / SINGLE).read_bytes() == weights


def test_check_sees_the_whole_folder_before_it_has_its_name(zoo: Zoo, tmp_path: Path) -> None:
    target = tmp_path / "packed"
    seen: list[list[str]] = []

    def check(work: Path) -> None:
        assert not target.exists() and work.parent == tmp_path
        assert PackedCheckpoint(work).fingerprint() == fingerprint_model(zoo.models["llama"])
        seen.append(left_in(work))
        if len(seen) == 1:
            raise ZeroDivisionError

    with pytest.raises(ZeroDivisionError):
        pack_checkpoint(zoo.latents("llama"), target, check=check)
    assert left_in(tmp_path) == []
    pack_checkpoint(zoo.latents("llama"), target, check=check)
    assert len(seen) == 2 and left_in(target) == seen[0]


# Memory

MEMORY = """
import sys
import torch
from axolotl_bitnet.formats.export import pack_checkpoint

def status(key):
    lines = open("/proc/self/status").read().splitlines()
    return next(int(line.split()[1]) * 1024 for line in lines if line.startswith(key))

torch.set_num_threads(2)
before = status("VmRSS")
pack_checkpoint(sys.argv[1], sys.argv[2])
print(status("VmHWM") - before)  # the peak of this process; ru_maxrss would start from its parent's
"""


@pytest.mark.once
@pytest.mark.slow
@pytest.mark.skipif(not Path("/proc/self/status").exists(), reason="peak memory is read from /proc")
def test_packing_needs_little_memory(tmp_path: Path) -> None:
    """Twice the largest tensor and some slack, far below the whole checkpoint."""
    rows = columns = 4096
    matrix = torch.randn(rows, columns)
    layers, source = [f"model.layers.{index}.proj" for index in range(6)], tmp_path / "latents"
    tensors = [f"dense.{index}.weight" for index in range(6)] + [f"{layer}.weight" for layer in layers]
    source.mkdir()
    entries = [Entry(name, matrix.dtype, (rows, columns)) for name in tensors]
    with SafetensorsWriter(source / SINGLE, entries) as writer:
        for name in tensors:
            writer.write(name, matrix)
    write_json(source / "config.json", {CONFIG_KEY: {"converted": layers, "dense": ["lm_head"]}})

    done = python("-c", MEMORY, source, tmp_path / "packed")
    peak, largest, total = int(done.stdout), matrix.nbytes, matrix.nbytes * len(tensors)
    assert total >= 750 * 2**20
    print(f"peak {peak / 2**20:.0f} MiB, largest {largest / 2**20:.0f} MiB, total {total / 2**20:.0f} MiB")
    assert largest / 8 < peak, "nothing was measured"
    assert peak < 2 * largest + 300 * 2**20
    assert peak < total / 2
    expected, _ = ternarize(matrix)
    assert torch.equal(PackedCheckpoint(tmp_path / "packed").codes(layers[-1])[0], expected)
