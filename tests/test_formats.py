"""The table of formats: everything that has to know them knows the same ones."""

from __future__ import annotations

import shutil
from collections.abc import Callable
from pathlib import Path
from typing import get_args

import pytest
from torch import nn

from axolotl_bitnet.formats.registry import FOLDERS, FORMATS, format_of, open_checkpoint
from axolotl_bitnet.formats.usage import usages
from axolotl_bitnet.model.fingerprint import Fingerprint
from axolotl_bitnet.run_folder import RUN_FILE
from axolotl_bitnet.storage.atomic import CheckpointError, read_json
from support.zoo import HAS_GGUF, MADE, make_run


@pytest.fixture(scope="module")
def run(tiny_model: Callable[..., nn.Module], tmp_path_factory: pytest.TempPathFactory) -> Path:
    return make_run(tiny_model, tmp_path_factory.mktemp("run"))


def test_every_format_is_recognized_by_what_it_is(run: Path) -> None:
    trained = Fingerprint.from_json(read_json(run / RUN_FILE)["fingerprint"])
    assert format_of(open_checkpoint(run)) == "latents"
    for name in MADE:
        found = open_checkpoint(run / FORMATS[name].path)
        assert type(found).__name__ == FORMATS[name].reader
        assert found.fingerprint() == trained


def test_run_file_names_each(run: Path) -> None:
    artifacts = read_json(run / RUN_FILE)["artifacts"]
    assert list(artifacts) == MADE
    for name, entry in artifacts.items():
        assert entry["verified"] is True and entry["path"] == FORMATS[name].path and entry["bytes"] > 0
        assert (run / entry["path"]).exists()


@pytest.mark.parametrize("source", MADE)
def test_any_format_can_be_written_from_any_other(run: Path, tmp_path: Path, source: str) -> None:
    src = run / FORMATS[source].path
    if source.startswith("gguf"):
        with pytest.raises(CheckpointError):  # the folder holds two: which?
            open_checkpoint(src.parent)
    again = FORMATS["packed"].write(src, tmp_path / "packed")
    assert (again / "model.safetensors").read_bytes() == (run / "packed" / "model.safetensors").read_bytes()


def test_a_folder_with_one_gguf_file_is_that_file(run: Path, tmp_path: Path) -> None:
    if not HAS_GGUF:
        pytest.skip("needs the gguf package")
    shutil.copy(run / FORMATS["gguf-tq1_0"].path, tmp_path)
    assert format_of(open_checkpoint(tmp_path)).startswith("gguf")


def test_what_is_no_model(tmp_path: Path) -> None:
    with pytest.raises(CheckpointError, match="does not exist"):
        open_checkpoint(tmp_path / "nothing")
    (tmp_path / "notes.txt").write_text("text")
    if HAS_GGUF:
        with pytest.raises(CheckpointError, match="not a GGUF file"):
            open_checkpoint(tmp_path / "notes.txt")
    with pytest.raises(CheckpointError, match=r"config\.json does not exist"):
        open_checkpoint(tmp_path)


def test_config_command_line_and_card_know_the_same_formats() -> None:
    pytest.importorskip("axolotl")
    from axolotl_bitnet.cli.main import main
    from axolotl_bitnet.plugin.args import BitNetConfig

    (choices,) = get_args(BitNetConfig.model_fields["export"].annotation)
    assert list(get_args(choices)) == list(FORMATS)
    assert all(usages(name, "some/path") for name in FORMATS) and not usages("latents", "some/path")
    assert {entry.command.split()[0] for entry in FORMATS.values()} <= set(main.commands)
    assert FOLDERS == ("packed", "gguf", "dense", "mlx")
    assert all(Path(entry.path).parts[0] in FOLDERS and ".." not in entry.path for entry in FORMATS.values())
