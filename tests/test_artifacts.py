"""The end of a run: what is left in the output folder, whatever happens."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file
from torch import nn

from axolotl_bitnet.formats.registry import FORMATS
from axolotl_bitnet.model.convert import convert_to_bitlinear
from axolotl_bitnet.model.fingerprint import Fingerprint, fingerprint_model
from axolotl_bitnet.plugin.artifacts import finish_run, made_in, refuse_taken, set_aside
from axolotl_bitnet.run_folder import RUN_FILE
from axolotl_bitnet.storage.atomic import CheckpointError, read_json
from axolotl_bitnet.storage.safetensors_stream import INDEX, SINGLE, SafetensorsWriter
from axolotl_bitnet.storage.weight_bytes import weight_bytes
from axolotl_bitnet.verify.verify import VerificationError, verify_checkpoint


@pytest.fixture
def build(tiny_model: Callable[..., nn.Module]) -> Callable[[], nn.Module]:
    def build() -> nn.Module:
        model = tiny_model("Llama", num_hidden_layers=1)
        convert_to_bitlinear(model)
        return model

    return build


def save(model: nn.Module, folder: Path, **options: Any) -> Fingerprint:
    model.save_pretrained(folder, **options)
    (folder / "tokenizer.json").write_text("{}")
    return fingerprint_model(model)


def left_in(folder: Path) -> set[str]:
    return {path.name for path in folder.iterdir()}


SAVED = {"config.json", "generation_config.json", "tokenizer.json", SINGLE}


@pytest.mark.parametrize("options", [{}, {"max_shard_size": "40KB"}], ids=["single", "shards"])
def test_packs_verifies_and_writes_it_down(
    build: Callable[[], nn.Module], tmp_path: Path, options: dict[str, str]
) -> None:
    trained = save(build(), tmp_path, **options)
    saved = left_in(tmp_path)
    report = finish_run(tmp_path, trained, ["packed"], verify=True)
    assert report.ok and report.layers == 7 and report.digest == trained.digest
    assert left_in(tmp_path) == saved | {"packed", RUN_FILE}
    assert left_in(tmp_path / "packed") == SAVED
    record = read_json(tmp_path / RUN_FILE)
    assert record["definition"] == 1 and Fingerprint.from_json(record["fingerprint"]) == trained
    assert set(record["converted"]) == set(trained.tensors) and record["dense"] == ["lm_head"]
    size = (tmp_path / "packed" / SINGLE).stat().st_size
    assert record["artifacts"] == {
        "packed": {
            "verified": True,
            "mismatches": [],
            "path": "packed",
            "bytes": size,
            "not_run_in": "transformers",
        }
    }
    assert weight_bytes(tmp_path / "packed") == size < weight_bytes(tmp_path) / 3
    assert verify_checkpoint(tmp_path / "packed", tmp_path).ok


def test_without_verification(build: Callable[[], nn.Module], tmp_path: Path) -> None:
    """The record does not claim what was not checked."""
    save(build(), tmp_path)
    report = finish_run(tmp_path, fingerprint_model(build()), ["packed"], verify=False)
    assert not report.ok
    assert read_json(tmp_path / RUN_FILE)["artifacts"]["packed"]["verified"] is None
    assert (tmp_path / "packed" / SINGLE).exists()


def test_no_artifact_verifies_the_latents(build: Callable[[], nn.Module], tmp_path: Path) -> None:
    trained = save(build(), tmp_path)
    assert finish_run(tmp_path, trained, [], verify=True).ok
    assert read_json(tmp_path / RUN_FILE)["artifacts"] == {"latents": {"verified": True, "mismatches": []}}
    assert left_in(tmp_path) == SAVED | {RUN_FILE}

    with pytest.raises(VerificationError, match=r"latents: NOT the trained model"):
        finish_run(tmp_path, fingerprint_model(build()), [], verify=True)
    assert read_json(tmp_path / RUN_FILE)["artifacts"]["latents"]["verified"] is False

    assert not finish_run(tmp_path, trained, [], verify=False).ok
    assert read_json(tmp_path / RUN_FILE)["artifacts"] == {}


def test_what_is_not_the_trained_model_gets_no_name(build: Callable[[], nn.Module], tmp_path: Path) -> None:
    save(build(), tmp_path)
    weights = (tmp_path / SINGLE).read_bytes()
    other = fingerprint_model(build())
    with pytest.raises(VerificationError, match="packed: NOT the trained model") as caught:
        finish_run(tmp_path, other, ["packed"], verify=True)
    assert str(tmp_path) in str(caught.value)
    assert left_in(tmp_path) == SAVED | {RUN_FILE}  # no packed, no half of it
    assert (tmp_path / SINGLE).read_bytes() == weights
    record = read_json(tmp_path / RUN_FILE)
    assert record["artifacts"]["packed"]["verified"] is False
    assert len(record["artifacts"]["packed"]["mismatches"]) == 7
    assert record["fingerprint"]["digest"] == other.digest


@pytest.mark.parametrize("calls", [0, 1, 9])
def test_disk_full_while_packing(
    build: Callable[[], nn.Module], tmp_path: Path, monkeypatch: pytest.MonkeyPatch, calls: int
) -> None:
    trained = save(build(), tmp_path)
    weights = (tmp_path / SINGLE).read_bytes()
    write, count = SafetensorsWriter._put, 0

    def disk_full(self: SafetensorsWriter, data: memoryview) -> None:
        nonlocal count
        count += 1
        if count > calls:
            raise OSError(28, "No space left on device")
        write(self, data)

    with monkeypatch.context() as patch:
        patch.setattr(SafetensorsWriter, "_put", disk_full)
        with pytest.raises(
            CheckpointError, match=r"packed cannot be written \(No space left.*free some space"
        ):
            finish_run(tmp_path, trained, ["packed"], verify=True)
    assert count == calls + 1
    assert left_in(tmp_path) == SAVED | {RUN_FILE}
    assert (tmp_path / SINGLE).read_bytes() == weights
    verdict = read_json(tmp_path / RUN_FILE)["artifacts"].pop("packed")
    assert verdict["verified"] is False and "No space left on device" in verdict["error"]
    assert finish_run(tmp_path, trained, ["packed"], verify=True).ok  # once there is space


# Several artifacts


SEVERAL = ["packed", "dense", "mlx"]


def test_several_artifacts(build: Callable[[], nn.Module], tmp_path: Path) -> None:
    trained = save(build(), tmp_path)
    assert finish_run(tmp_path, trained, reversed(SEVERAL), verify=True).ok
    assert left_in(tmp_path) == SAVED | {*SEVERAL, RUN_FILE}
    assert list(read_json(tmp_path / RUN_FILE)["artifacts"]) == SEVERAL
    assert list(made_in(tmp_path)) == SEVERAL
    for name in SEVERAL:
        assert verify_checkpoint(tmp_path / name, tmp_path).ok


@pytest.mark.parametrize("broken", SEVERAL)
@pytest.mark.parametrize("how", ["write", "proof"])
def test_one_that_fails_costs_no_other(
    build: Callable[[], nn.Module], tmp_path: Path, monkeypatch: pytest.MonkeyPatch, broken: str, how: str
) -> None:
    trained = save(build(), tmp_path)
    weights = (tmp_path / SINGLE).read_bytes()

    def fails(*args: Any, **options: Any) -> Any:
        raise OSError(28, "No space left on device")

    with monkeypatch.context() as patch:
        patch.setattr(type(FORMATS[broken].format), "write" if how == "write" else "open", fails)
        with pytest.raises((OSError, CheckpointError), match="No space left"):
            finish_run(tmp_path, trained, SEVERAL, verify=True)
    others = [name for name in SEVERAL if name != broken]
    assert left_in(tmp_path) == SAVED | {*others, RUN_FILE}
    assert (tmp_path / SINGLE).read_bytes() == weights
    artifacts = read_json(tmp_path / RUN_FILE)["artifacts"]
    assert artifacts[broken]["verified"] is False and "No space left" in artifacts[broken]["error"]
    assert all(artifacts[name]["verified"] is True for name in others) and list(made_in(tmp_path)) == others
    assert all(verify_checkpoint(tmp_path / name, tmp_path).ok for name in others)


def test_every_failure_is_told(build: Callable[[], nn.Module], tmp_path: Path) -> None:
    save(build(), tmp_path)
    with pytest.raises(VerificationError, match="packed: NOT") as caught:
        finish_run(tmp_path, fingerprint_model(build()), SEVERAL, verify=True)
    assert [note.split(":")[1].strip() for note in caught.value.__notes__] == ["dense", "mlx"]
    artifacts = read_json(tmp_path / RUN_FILE)["artifacts"]
    assert [len(artifacts[name]["mismatches"]) for name in SEVERAL] == [7, 7, 7]
    assert left_in(tmp_path) == SAVED | {RUN_FILE} and made_in(tmp_path) == {}
    assert made_in(tmp_path / "nowhere") == {}


def test_an_interrupt_is_not_swallowed(
    build: Callable[[], nn.Module], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    trained = save(build(), tmp_path)

    def interrupted(*_: Any, **__: Any) -> None:
        raise KeyboardInterrupt

    monkeypatch.setattr(SafetensorsWriter, "write", interrupted)
    with pytest.raises(KeyboardInterrupt):
        finish_run(tmp_path, trained, SEVERAL, verify=True)
    assert left_in(tmp_path) == SAVED | {RUN_FILE}


# A previous run in the same folder


def test_set_aside_of_nothing(tmp_path: Path) -> None:
    assert set_aside(tmp_path / "none") == []
    for name in ("config.json", "tokenizer.json", "adapter_model.safetensors", "model.safetensors.bak"):
        (tmp_path / name).write_text("{}")
    (tmp_path / "checkpoint-7").mkdir()
    (tmp_path / "checkpoint-7" / SINGLE).write_text("a checkpoint's")
    before = left_in(tmp_path)
    assert set_aside(tmp_path) == []
    assert left_in(tmp_path) == before
    assert (tmp_path / "checkpoint-7" / SINGLE).exists()


@pytest.mark.parametrize("options", [{}, {"max_shard_size": "40KB"}], ids=["single", "shards"])
def test_previous_run_is_replaced(
    build: Callable[[], nn.Module], tmp_path: Path, options: dict[str, str]
) -> None:
    """Its shards and index, too, when this run saves a single file."""
    finish_run(tmp_path, save(build(), tmp_path, **options), SEVERAL, verify=True)
    stale = {name for name in left_in(tmp_path) if name.startswith("model")} | {*SEVERAL, RUN_FILE}
    assert (INDEX in stale) == bool(options)
    assert set_aside(tmp_path) == sorted(stale)
    stale |= {"made-by-axolotl-bitnet"}
    assert left_in(tmp_path / "_previous") == stale
    assert left_in(tmp_path) == (SAVED - {SINGLE}) | {"_previous"}

    model = build()
    trained = save(model, tmp_path)
    assert left_in(tmp_path / "_previous") == stale  # until this run's are in place
    for leftover in (".mlx.partial-x", ".dense.old-y"):  # of a run that was killed
        (tmp_path / leftover).mkdir()
    assert finish_run(tmp_path, trained, ["packed"], verify=True).ok
    assert left_in(tmp_path) == SAVED | {"packed", RUN_FILE}
    head = load_file(tmp_path / SINGLE)["lm_head.weight"]
    assert torch.equal(head, model.get_parameter("lm_head.weight"))


def test_what_is_the_users_stays(build: Callable[[], nn.Module], tmp_path: Path) -> None:
    """Folders with the names of artifacts, in which nothing is ours; and a file beside one of ours."""
    finish_run(tmp_path, save(build(), tmp_path), ["packed"], verify=True)
    (tmp_path / "gguf").mkdir()
    (tmp_path / "gguf" / "model-TQ2_0.gguf").write_bytes(b"GGUF ... axolotl_bitnet.config ...")
    for name in ("mine.gguf", "model-TQ1_0.gguf"):
        (tmp_path / "gguf" / name).write_bytes(b"GGUF")
    for name in ("report", "dense", "mlx", "_previous", "_previous-2"):
        (tmp_path / name).mkdir()
        (tmp_path / name / "index.html").write_text("mine")
    (tmp_path / "dense" / "config.json").write_text('{"model_type": "llama"}')
    assert set_aside(tmp_path) == sorted([SINGLE, "packed", "gguf", RUN_FILE])
    mine = [
        "gguf/mine.gguf",
        "gguf/model-TQ1_0.gguf",
        "report/index.html",
        "dense/index.html",
        "mlx/index.html",
    ]
    mine += ["_previous/index.html", "_previous-2/index.html"]
    assert all((tmp_path / name).is_file() for name in mine)
    assert (tmp_path / "_previous-3" / "gguf" / "model-TQ2_0.gguf").is_file()
    assert finish_run(tmp_path, save(build(), tmp_path), ["packed"], verify=True).ok
    assert all((tmp_path / name).is_file() for name in mine)
    assert not (tmp_path / "_previous-3").exists()


def test_artifacts_of_a_run_that_was_killed_are_ours(build: Callable[[], nn.Module], tmp_path: Path) -> None:
    """Without a bitnet.json, by the entry that each carries."""
    finish_run(tmp_path, save(build(), tmp_path), SEVERAL, verify=True)
    (tmp_path / RUN_FILE).unlink()
    refuse_taken(tmp_path, SEVERAL)
    assert set(set_aside(tmp_path)) == {SINGLE, *(FORMATS[name].folder for name in SEVERAL)}


def test_an_export_over_something_else_is_refused_before_training(tmp_path: Path) -> None:
    refuse_taken(tmp_path / "none", SEVERAL)
    (tmp_path / "packed").mkdir()
    (tmp_path / "packed" / "config.json").write_text("{}")
    refuse_taken(tmp_path, ["dense"])
    with pytest.raises(CheckpointError, match=r"packed is not an artifact of an earlier run.*`bitnet.export"):
        refuse_taken(tmp_path, ["dense", "packed"])


@pytest.mark.parametrize("export", [["packed"], []])
def test_run_that_saved_nothing(build: Callable[[], nn.Module], tmp_path: Path, export: list[str]) -> None:
    """The previous run's weights never pass for this run's, and are not lost."""
    finish_run(tmp_path, save(build(), tmp_path), ["packed"], verify=True)
    weights = (tmp_path / SINGLE).read_bytes()
    set_aside(tmp_path)
    with pytest.raises(CheckpointError, match="holds neither"):
        finish_run(tmp_path, fingerprint_model(build()), export, verify=False)
    assert (tmp_path / "_previous" / SINGLE).read_bytes() == weights
    assert not (tmp_path / "packed").exists() and not (tmp_path / SINGLE).exists()


def test_previous_weights_outlive_a_failed_run_and_its_repetition(
    build: Callable[[], nn.Module], tmp_path: Path
) -> None:
    """Two runs in a row that save nothing: the last weights that exist are still there."""
    finish_run(tmp_path, save(build(), tmp_path), ["packed"], verify=True)
    weights = (tmp_path / SINGLE).read_bytes()
    for _ in range(2):
        set_aside(tmp_path)
        with pytest.raises(CheckpointError):
            finish_run(tmp_path, fingerprint_model(build()), ["packed"], verify=True)
    kept = [path.read_bytes() for path in tmp_path.rglob(SINGLE)]
    assert weights in kept, "the second set_aside deleted the first one's weights"


def test_previous_run_stays_when_this_one_fails_verification(
    build: Callable[[], nn.Module], tmp_path: Path
) -> None:
    finish_run(tmp_path, save(build(), tmp_path), ["packed"], verify=True)
    weights = (tmp_path / SINGLE).read_bytes()
    set_aside(tmp_path)
    save(build(), tmp_path)
    with pytest.raises(VerificationError):
        finish_run(tmp_path, fingerprint_model(build()), ["packed"], verify=True)
    assert not (tmp_path / "packed").exists()
    assert (tmp_path / "_previous" / SINGLE).read_bytes() == weights
    assert (tmp_path / SINGLE).read_bytes() != weights
