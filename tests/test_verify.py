"""Verification finds one changed code and one changed scale, and says where."""

from __future__ import annotations

import json
import math
import random
import re
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file
from torch import Tensor, nn

from axolotl_bitnet.formats.export import open_checkpoint, pack_checkpoint
from axolotl_bitnet.formats.packed import pack_codes, unpack_codes
from axolotl_bitnet.model.convert import convert_to_bitlinear
from axolotl_bitnet.model.entry import CONFIG_KEY
from axolotl_bitnet.model.fingerprint import Fingerprint, TensorFingerprint, fingerprint_model
from axolotl_bitnet.plugin.artifacts import finish_run
from axolotl_bitnet.run_folder import RUN_FILE
from axolotl_bitnet.storage.atomic import CheckpointError, read_json, write_json
from axolotl_bitnet.storage.safetensors_stream import SINGLE
from axolotl_bitnet.verify.verify import VerificationReport, compare, verify_checkpoint


class Run:
    """A finished run: its output folder, the fingerprint of what trained, and the packed folder in it."""

    def __init__(self, model: nn.Module, folder: Path):
        convert_to_bitlinear(model)
        self.trained = fingerprint_model(model)
        self.folder, self.packed = folder, folder / "packed"
        model.save_pretrained(folder)
        finish_run(folder, self.trained, ["packed"], verify=True)
        self.layers = list(self.trained.tensors)

    def edit(self, change: Callable[[dict[str, Tensor]], Any]) -> None:
        tensors = load_file(self.packed / SINGLE)
        change(tensors)
        save_file(tensors, self.packed / SINGLE, {"format": "pt"})


@pytest.fixture(scope="session")
def _run(tiny_model: Callable[..., nn.Module], tmp_path_factory: pytest.TempPathFactory) -> Run:
    torch.manual_seed(5)
    return Run(tiny_model("Llama"), tmp_path_factory.mktemp("run"))


@pytest.fixture
def run(_run: Run, tmp_path: Path) -> Run:
    """A copy, to be damaged."""
    copy = object.__new__(Run)
    copy.__dict__ = dict(_run.__dict__)
    copy.folder, copy.packed = tmp_path / "run", tmp_path / "run" / "packed"
    shutil.copytree(_run.folder, copy.folder)
    return copy


def test_untouched(run: Run, tmp_path: Path) -> None:
    references: list[Path | str | Fingerprint] = [
        run.trained,
        run.folder,
        str(run.folder),
        run.folder / RUN_FILE,
    ]
    latents = tmp_path / "latents"
    shutil.copytree(run.folder, latents, ignore=shutil.ignore_patterns(RUN_FILE, "packed"))
    assert sorted(path.name for path in latents.iterdir()) == [
        "config.json",
        "generation_config.json",
        SINGLE,
    ]
    for reference in [*references, latents]:
        report = verify_checkpoint(run.packed, reference)
        assert report.ok and report.mismatches == []
        assert report.layers == 14
        assert report.weights == sum(t.shape[0] * t.shape[1] for t in run.trained.tensors.values())
        assert report.digest == run.trained.digest
        assert f"verified: 14 ternary layers, {report.weights:,} codes" in report.summary()


@pytest.mark.parametrize("seed", range(8))
def test_one_changed_code(run: Run, seed: int) -> None:
    """Two bits of one byte of the file are changed, wherever they are."""
    rng = random.Random(seed)
    name, shift = rng.choice(run.layers), 2 * rng.randrange(4)
    data = bytearray((run.packed / SINGLE).read_bytes())
    start = 8 + int.from_bytes(data[:8], "little")
    first, end = json.loads(data[8:start])[f"{name}.weight"]["data_offsets"]
    place = start + rng.randrange(first, end)
    old = data[place] >> shift & 3
    data[place] += (rng.choice([value for value in range(3) if value != old]) - old) << shift
    (run.packed / SINGLE).write_bytes(data)

    report = verify_checkpoint(run.packed, run.folder)
    assert not report.ok
    rows, columns = load_file(run.folder / SINGLE)[f"{name}.weight"].shape
    assert report.mismatches == [f"{name}: 1 of {rows * columns:,} codes differ"]
    assert report.summary() == f"NOT the trained model: {name}: 1 of {rows * columns:,} codes differ"
    assert report.checks[0].detail.startswith("1 in 1 layers; compared were ")
    assert compare(open_checkpoint(run.packed).fingerprint(), run.trained).mismatches == [
        f"{name}: codes differ"
    ]


@pytest.mark.parametrize("code", [0, 1, 2])
def test_bits_that_no_packer_writes(run: Run, code: int) -> None:
    name = run.layers[3]

    def change(tensors: dict[str, Tensor]) -> None:
        flat = tensors[f"{name}.weight"].view(-1)
        index = int((flat >> 4 & 3 == code).nonzero()[0])
        flat[index] |= 3 << 4

    run.edit(change)
    (line,) = verify_checkpoint(run.packed, run.folder).mismatches
    assert re.fullmatch(rf"{name}: [\d,]+ of [\d,]+ codes differ", line)


@pytest.mark.parametrize("toward", [torch.inf, -torch.inf])
@pytest.mark.parametrize("layer", [0, 7, -1])
def test_one_changed_scale(run: Run, toward: float, layer: int) -> None:
    """To the neighbouring bfloat16: the smallest change there is."""
    name = run.layers[layer]

    def change(tensors: dict[str, Tensor]) -> None:
        key = f"{name}.weight_scale"
        tensors[key] = torch.nextafter(tensors[key], torch.tensor([toward], dtype=torch.bfloat16))

    run.edit(change)
    (mismatch,) = verify_checkpoint(run.packed, run.folder).mismatches
    assert (
        mismatch.startswith(f"{name}: scale ") and f"trained {run.trained.tensors[name].scale:g}" in mismatch
    )


@pytest.mark.parametrize("value", [torch.nan, torch.inf, 0.0])
def test_scale_that_is_no_scale(run: Run, value: float) -> None:
    run.edit(lambda tensors: tensors[f"{run.layers[1]}.weight_scale"].fill_(value))
    (mismatch,) = verify_checkpoint(run.packed, run.folder).mismatches
    assert mismatch.startswith(f"{run.layers[1]}: scale")


def test_nan_scale_is_not_equal_to_itself() -> None:
    for scale in (2.0, math.nan):
        found = Fingerprint({"a": TensorFingerprint((4, 4), "0" * 16, scale, 16)})
        assert compare(found, found).ok == (scale == 2.0)


def test_swapped_layers(run: Run) -> None:
    first, second = (f"model.layers.{index}.mlp.down_proj" for index in (0, 1))

    def swap(tensors: dict[str, Tensor]) -> None:
        for part in ("weight", "weight_scale"):
            a, b = f"{first}.{part}", f"{second}.{part}"
            tensors[a], tensors[b] = tensors[b], tensors[a]

    run.edit(swap)
    report = verify_checkpoint(run.packed, run.folder)
    assert [line.split(":")[0] for line in report.mismatches] == [first, second]
    assert all(line.endswith(" codes differ") for line in report.mismatches)
    run.edit(swap)
    assert verify_checkpoint(run.packed, run.folder).ok


@pytest.mark.parametrize("change", ["rows", "columns", "transposed"])
def test_moved_codes(run: Run, change: str) -> None:
    """The same codes in another order: the count of each is right, and still it is found."""
    name = "model.layers.1.self_attn.q_proj"  # square

    def move(tensors: dict[str, Tensor]) -> None:
        codes = unpack_codes(tensors[f"{name}.weight"])
        moved = {"rows": codes.roll(1, 0), "columns": codes.flip(1), "transposed": codes.t().contiguous()}[
            change
        ]
        tensors[f"{name}.weight"] = pack_codes(moved)

    run.edit(move)
    (line,) = verify_checkpoint(run.packed, run.folder).mismatches
    assert re.fullmatch(rf"{name}: [\d,]+ of [\d,]+ codes differ", line)


def test_another_shape(run: Run) -> None:
    name = run.layers[0]
    run.edit(lambda tensors: tensors.update({f"{name}.weight": tensors[f"{name}.weight"][:-1].contiguous()}))
    assert verify_checkpoint(run.packed, run.folder).mismatches == [
        f"{name} has shape (60, 64), trained (64, 64)"
    ]


def edit_list(run: Run, change: Callable[[dict[str, list[str]]], Any]) -> None:
    config = read_json(run.packed / "config.json")
    change(config[CONFIG_KEY])
    write_json(run.packed / "config.json", config)


def test_missing_layer(run: Run) -> None:
    """Out of the list it is missing; in the list, but not in the file, the folder is not readable."""
    name = run.layers[5]
    run.edit(lambda tensors: tensors.pop(f"{name}.weight"))
    with pytest.raises(CheckpointError, match=f"layer '{name}' is not packed"):
        verify_checkpoint(run.packed, run.folder)
    edit_list(run, lambda entry: entry["converted"].remove(name))
    report = verify_checkpoint(run.packed, run.folder)
    assert report.mismatches[0] == f"{name} is missing" and not report.ok
    assert any(line.startswith("config: axolotl_bitnet.converted is") for line in report.mismatches)


def test_extra_layer(run: Run) -> None:
    donor = run.layers[5]

    def add(tensors: dict[str, Tensor]) -> None:
        for part in ("weight", "weight_scale"):
            tensors[f"lm_head.{part}"] = tensors[f"{donor}.{part}"].clone()

    run.edit(add)
    edit_list(run, lambda entry: entry["converted"].append("lm_head"))
    report = verify_checkpoint(run.packed, run.folder)
    assert report.mismatches[0] == "lm_head is ternary, but was not in training" and not report.ok


@pytest.mark.parametrize("damage", ["dtype", "scale shape", "no scale"])
def test_layer_that_is_not_packed(run: Run, damage: str) -> None:
    name = run.layers[2]

    def change(tensors: dict[str, Tensor]) -> None:
        if damage == "dtype":
            tensors[f"{name}.weight"] = tensors[f"{name}.weight"].to(torch.int8)
        elif damage == "scale shape":
            tensors[f"{name}.weight_scale"] = tensors[f"{name}.weight_scale"].reshape(())
        else:
            del tensors[f"{name}.weight_scale"]

    run.edit(change)
    with pytest.raises(CheckpointError, match=f"layer '{name}' is not packed"):
        verify_checkpoint(run.packed, run.folder)


@pytest.mark.parametrize(
    ("quantization", "message"),
    [
        (None, "not latents"),
        ({"quant_method": "gptq"}, "is not a packed model's"),
        ({"quant_method": "bitnet", "linear_class": "autobitlinear"}, "is not a packed model's"),
    ],
)
def test_folder_that_is_not_packed(run: Run, quantization: dict[str, str] | None, message: str) -> None:
    config = read_json(run.packed / "config.json")
    config["quantization_config"] = quantization
    write_json(run.packed / "config.json", config)
    with pytest.raises(CheckpointError, match=message):
        verify_checkpoint(run.packed, run.trained)


def test_another_model(run: Run, tiny_model: Callable[..., nn.Module]) -> None:
    other = tiny_model("Llama")
    convert_to_bitlinear(other)
    report = verify_checkpoint(run.packed, fingerprint_model(other))
    assert len(report.mismatches) == 14
    assert report.summary().count("codes differ") == 5 and report.summary().endswith("; and 9 more")


def test_nothing_is_not_verified() -> None:
    assert not compare(Fingerprint({}), Fingerprint({})).ok
    assert not VerificationReport().ok


# The reference


def change_scale(data: dict[str, Any]) -> None:
    next(iter(data["fingerprint"]["tensors"].values()))["scale"] *= 2


def change_codes(data: dict[str, Any]) -> None:
    entry = next(iter(data["fingerprint"]["tensors"].values()))
    entry["codes"] = entry["codes"][::-1]


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (change_scale, "edited or damaged"),
        (change_codes, "edited or damaged"),
        (lambda data: data["fingerprint"]["tensors"].popitem(), "edited or damaged"),
        (lambda data: data["fingerprint"].update(digest="0" * 64), "edited or damaged"),
        (lambda data: data["fingerprint"].update(definition=2), "is of definition 2, this package has 1"),
        (lambda data: data["fingerprint"].pop("digest"), "no usable fingerprint"),
        (lambda data: data.pop("fingerprint"), "no usable fingerprint"),
        (lambda data: data.update(fingerprint="verified"), "no usable fingerprint"),
        (lambda data: data["fingerprint"].update(tensors=[]), "no usable fingerprint"),
    ],
)
def test_edited_run_file(run: Run, change: Callable[[dict[str, Any]], Any], message: str) -> None:
    """Refused, and not replaced by the latents beside it."""
    assert verify_checkpoint(run.packed, run.folder).ok
    data = read_json(run.folder / RUN_FILE)
    change(data)
    write_json(run.folder / RUN_FILE, data)
    for reference in (run.folder, run.folder / RUN_FILE):
        with pytest.raises(CheckpointError, match=message) as caught:
            verify_checkpoint(run.packed, reference)
        assert str(run.folder / RUN_FILE) in str(caught.value)


def test_reference_that_is_none(run: Run, tmp_path: Path) -> None:
    with pytest.raises(CheckpointError, match="does not exist"):
        verify_checkpoint(run.packed, tmp_path / "nowhere")
    with pytest.raises(CheckpointError, match="no reference for itself"):
        verify_checkpoint(run.packed, run.packed)


def test_changed_latents_are_another_reference(run: Run) -> None:
    (run.folder / RUN_FILE).unlink()
    assert verify_checkpoint(run.packed, run.folder).ok
    name = run.layers[-1]
    tensors = load_file(run.folder / SINGLE)
    tensors[f"{name}.weight"][0] *= -1
    save_file(tensors, run.folder / SINGLE, {"format": "pt"})
    (line,) = verify_checkpoint(run.packed, run.folder).mismatches
    assert re.fullmatch(rf"{name}: [\d,]+ of [\d,]+ codes differ", line)
    pack_checkpoint(run.folder, run.packed, overwrite=True)
    assert verify_checkpoint(run.packed, run.folder).ok
