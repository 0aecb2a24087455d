"""The table of formats: everything that has to know them knows the same ones."""

from __future__ import annotations

import shutil
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import get_args

import click
import pytest
import torch
from torch import nn
from transformers import AutoModelForCausalLM

from axolotl_bitnet.formats.export import export, open_checkpoint, pack_checkpoint
from axolotl_bitnet.formats.registry import FOLDERS, FORMATS
from axolotl_bitnet.model.fingerprint import Fingerprint
from axolotl_bitnet.run_folder import RUN_FILE
from axolotl_bitnet.storage import safetensors_stream
from axolotl_bitnet.storage.atomic import CheckpointError, read_json
from support.zoo import HAS_GGUF, MADE, make_run


@pytest.fixture(scope="module")
def run(tiny_model: Callable[..., nn.Module], tmp_path_factory: pytest.TempPathFactory) -> Path:
    return make_run(tiny_model, tmp_path_factory.mktemp("run"))


def test_every_format_is_recognized_by_what_it_is(run: Path) -> None:
    trained = Fingerprint.from_json(read_json(run / RUN_FILE)["fingerprint"])
    assert open_checkpoint(run).format == "latents"
    for name in MADE:
        found = open_checkpoint(run / FORMATS[name].path)
        assert found.format == name
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
    again = export("packed", src, tmp_path / "packed")
    assert (again / "model.safetensors").read_bytes() == (run / "packed" / "model.safetensors").read_bytes()


def test_a_folder_with_one_gguf_file_is_that_file(run: Path, tmp_path: Path) -> None:
    if not HAS_GGUF:
        pytest.skip("needs the gguf package")
    shutil.copy(run / FORMATS["gguf-tq1_0"].path, tmp_path)
    assert open_checkpoint(tmp_path).format.startswith("gguf")


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
    assert all(row.ways_to_run("some/path") for row in FORMATS.values())
    assert {entry.command.split()[0] for entry in FORMATS.values()} <= set(
        main.list_commands(click.Context(main))
    )
    assert FOLDERS == ("packed", "gguf", "dense", "mlx")
    assert all(Path(entry.path).parts[0] in FOLDERS and ".." not in entry.path for entry in FORMATS.values())


@pytest.mark.slow
def test_a_format_is_imported_when_it_is_used() -> None:
    """Validating a config, and the command line's help, import none."""
    code = (
        "import sys, axolotl_bitnet.formats.registry as r; names = list(r.FORMATS);"
        "own = sorted(n.split('.')[2] for n in sys.modules if n.startswith('axolotl_bitnet.formats.'));"
        "assert own == ['registry', 'ways_to_run'], own; assert 'torch' not in sys.modules;"
        "[row.format for row in r.FORMATS.values()]"
    )
    subprocess.run([sys.executable, "-c", code], check=True, timeout=120)


def test_packing_reads_the_config_and_each_header_once(run: Path, tmp_path: Path) -> None:
    torch.manual_seed(2)
    source = tmp_path / "source"
    model = AutoModelForCausalLM.from_pretrained(run)
    model.save_pretrained(source, max_shard_size="200KB")
    shards = sorted(path.name for path in source.glob("*.safetensors"))
    assert len(shards) > 2
    read: list[str] = []
    opened, parsed = safetensors_stream._places_in, Path.read_text
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(safetensors_stream, "_places_in", lambda path: read.append(path.name) or opened(path))
        patch.setattr(
            Path, "read_text", lambda self, **options: read.append(self.name) or parsed(self, **options)
        )
        pack_checkpoint(source, tmp_path / "packed")
    assert sorted(read) == sorted([*shards, "config.json", "model.safetensors.index.json"])
