"""Kill -9 at every change of the disk while a run is finished: nothing half-written is taken for whole, and
no run's weights are lost."""

from __future__ import annotations

import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from torch import nn

from axolotl_bitnet.formats.export import pack_checkpoint
from axolotl_bitnet.formats.latent import LatentCheckpoint
from axolotl_bitnet.formats.packed import PackedCheckpoint
from axolotl_bitnet.model.convert import convert_to_bitlinear
from axolotl_bitnet.model.fingerprint import Fingerprint, fingerprint_model
from axolotl_bitnet.plugin.artifacts import finish_run, set_aside
from axolotl_bitnet.run_folder import RUN_FILE
from axolotl_bitnet.storage.atomic import CheckpointError
from axolotl_bitnet.storage.safetensors_stream import INDEX
from axolotl_bitnet.verify.verify import verify_checkpoint
from support.kills import kill_at_every_change

pytestmark = pytest.mark.once  # whole files or none: our own writing

SHARDS = {"max_shard_size": "40KB"}


@pytest.fixture
def build(tiny_model: Callable[..., nn.Module]) -> Callable[[], nn.Module]:
    def build() -> nn.Module:
        model = tiny_model("Llama", num_hidden_layers=1)
        convert_to_bitlinear(model)
        return model

    return build


def finish(model: nn.Module, folder: Path, options: dict[str, Any]) -> None:
    """The end of a run, as Axolotl and the plugin do it."""
    trained = fingerprint_model(model)
    set_aside(folder)
    model.save_pretrained(folder, **options)  # type: ignore[operator]
    (folder / "tokenizer.json").write_text("{}")
    finish_run(folder, trained, ["packed"], verify=True)


def whole_weights(folder: Path) -> list[Fingerprint]:
    """Fingerprints of all latents that can be read whole, wherever they were moved."""
    found = []
    for place in [folder, *folder.glob("_previous*")]:
        if not (place / "config.json").exists():
            shutil.copy(folder / "config.json", place)
        try:
            found.append(LatentCheckpoint(place).fingerprint())
        except CheckpointError:
            continue
    return found


@pytest.mark.slow
@pytest.mark.parametrize("before, after", [({}, {}), (SHARDS, {}), ({}, SHARDS), (SHARDS, SHARDS)])
def test_killed_while_finishing(
    build: Callable[[], nn.Module], tmp_path: Path, before: dict[str, Any], after: dict[str, Any]
) -> None:
    old, new = build(), build()
    runs = {fingerprint_model(model).digest for model in (old, new)}
    start, out = tmp_path / "start", tmp_path / "out"
    finish(old, start, before)
    shutil.copytree(start, out)
    deaths = verified = refused = 0
    for _ in kill_at_every_change(lambda: finish(new, out, after), under=str(out)):
        deaths += 1
        try:
            verified += verify_checkpoint(out / "packed", out).ok
            assert PackedCheckpoint(out / "packed").fingerprint().digest in runs
            if (out / INDEX).exists() or (out / "model.safetensors").exists():  # then it is of these latents
                assert verify_checkpoint(out / "packed", LatentCheckpoint(out).fingerprint()).ok
        except CheckpointError as error:
            refused += 1
            assert str(out) in str(error)
        try:
            pack_checkpoint(out, tmp_path / "again", overwrite=True)
            assert PackedCheckpoint(tmp_path / "again").fingerprint().digest in runs
        except CheckpointError as error:
            assert str(out) in str(error)
        kept = {fingerprint.digest for fingerprint in whole_weights(out)}
        moving = any(out.glob("_previous")) and not (out / "_previous" / RUN_FILE).exists()
        if not (before and moving):  # shards in two folders, every one of them there
            assert kept & runs, sorted(str(path.relative_to(out)) for path in out.rglob("*"))

        finish(new, out, after)  # the next start
        assert verify_checkpoint(out / "packed", out).digest == fingerprint_model(new).digest
        assert not any(path.name.startswith(("_", ".")) for path in out.iterdir())
        shutil.rmtree(out)
        shutil.copytree(start, out)
    assert deaths > 20 and verified > 0 and refused > 10


@pytest.mark.slow
def test_killed_while_packing_over_an_older_one(build: Callable[[], nn.Module], tmp_path: Path) -> None:
    """By hand, with --overwrite: the name is the old one's, the new one's, or for an instant nobody's."""
    out, packed = tmp_path / "out", tmp_path / "packed"
    old, new = build(), build()
    old.save_pretrained(tmp_path / "old")  # type: ignore[operator]
    new.save_pretrained(out)  # type: ignore[operator]
    pack_checkpoint(tmp_path / "old", packed)
    runs = [fingerprint_model(old), fingerprint_model(new)]
    seen = []
    for _ in kill_at_every_change(lambda: pack_checkpoint(out, packed, overwrite=True), under=str(tmp_path)):
        try:
            seen.append(runs.index(PackedCheckpoint(packed).fingerprint()))
        except CheckpointError:
            assert not packed.exists()
            hidden = [PackedCheckpoint(path).fingerprint() for path in tmp_path.glob(".packed.*")]
            assert all(run in hidden for run in runs)
        shutil.rmtree(packed, ignore_errors=True)
        for path in tmp_path.glob(".packed.*"):
            shutil.rmtree(path)
        pack_checkpoint(tmp_path / "old", packed)
    assert seen == sorted(seen) and set(seen) == {0, 1} and len(seen) >= 8
