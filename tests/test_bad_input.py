"""Damaged sources, wrong configs and disks that cannot be written, for every format: an error that names the
file, nothing lost, nothing left behind."""

from __future__ import annotations

import json
import logging
import os
import resource
import signal
import subprocess
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file
from torch import nn

from axolotl_bitnet.formats.export import export, open_checkpoint, pack_checkpoint
from axolotl_bitnet.formats.registry import Row
from axolotl_bitnet.formats.restore import restore_latents
from axolotl_bitnet.model.fingerprint import fingerprint_model
from axolotl_bitnet.storage import safetensors_stream as stream
from axolotl_bitnet.storage.atomic import CheckpointError, read_json, write_json
from axolotl_bitnet.storage.safetensors_stream import INDEX
from support import TINY
from support.marks import slow_but
from support.stored import Build, contents, edit_config, trained
from support.zoo import every_format

KEY = "model.layers.0.mlp.down_proj.weight"

Write = Callable[..., Path]


@pytest.fixture(scope="module")
def saved(tiny_model: Build, tmp_path_factory: pytest.TempPathFactory) -> tuple[nn.Module, Path]:
    """A model and its latents in shards, with the demo's tokenizer."""
    torch.manual_seed(5)
    folder = tmp_path_factory.mktemp("saved") / "latents"
    options = {"vocab_size": 1024, "hidden_size": 256, "intermediate_size": 512, "num_hidden_layers": 1}
    model = trained(lambda family, **more: tiny_model(family, **options, **more), "llama")
    model.save_pretrained(folder, max_shard_size="600KB")  # type: ignore[operator]
    for path in TINY.glob("model/token*"):
        (folder / path.name).write_bytes(path.read_bytes())
    assert len(list(folder.glob("*.safetensors"))) >= 4
    return model, folder


@pytest.fixture
def source(saved: tuple[nn.Module, Path], tmp_path: Path) -> Path:
    """A copy to damage."""
    folder = tmp_path / "source"
    folder.mkdir()
    for path in saved[1].iterdir():
        (folder / path.name).write_bytes(path.read_bytes())
    return folder


def shard_of(folder: Path, key: str = KEY) -> Path:
    return folder / read_json(folder / INDEX)["weight_map"][key]


def edit_shard(folder: Path, change: Callable[[dict[str, torch.Tensor]], Any], key: str = KEY) -> None:
    path = shard_of(folder, key)
    tensors = load_file(path)
    change(tensors)
    save_file(tensors, path, {"format": "pt"})


def edit_index(folder: Path, change: Callable[[dict[str, str]], Any]) -> None:
    index = read_json(folder / INDEX)
    change(index["weight_map"])
    write_json(folder / INDEX, index)


def twice(folder: Path) -> None:
    other = next(path for path in sorted(folder.glob("*.safetensors")) if path != shard_of(folder))
    save_file(load_file(other) | {KEY: load_file(shard_of(folder))[KEY]}, other, {"format": "pt"})


def twice_in_a_header(folder: Path) -> None:
    path = shard_of(folder)
    data = path.read_bytes()
    length = int.from_bytes(data[:8], "little")
    header = data[8 : 8 + length].decode().rstrip()
    again = json.dumps(json.loads(header)[KEY])
    header = f'{header[:-1]},"{KEY}":{again}}}'
    path.write_bytes(len(header).to_bytes(8, "little") + header.encode() + data[8 + length :])


def outside(name: str) -> Callable[[Path], None]:
    def damage(folder: Path) -> None:
        shard = shard_of(folder)
        shard.rename(folder.parent / shard.name)
        edit_index(folder, lambda places: places.update({KEY: name.format(shard.name, folder.parent)}))

    return damage


DAMAGES: dict[str, tuple[Callable[[Path], Any], str]] = {
    "truncated shard": (
        lambda folder: os.truncate(shard_of(folder), shard_of(folder).stat().st_size - 7),
        r"safetensors cannot be read as safetensors",
    ),
    "empty shard": (lambda folder: os.truncate(shard_of(folder), 0), r"cannot be read as safetensors"),
    "missing shard": (
        lambda folder: shard_of(folder).unlink(),
        r"safetensors is missing: the index names it",
    ),
    "index to a parent": (outside("../{0}"), r"index\.json names '\.\./.*not a safetensors file of this"),
    "index to a path": (outside("{1}/{0}"), r"index\.json names '/.*not a safetensors file of this folder"),
    "index is not JSON": (lambda folder: (folder / INDEX).write_text("{"), r"index\.json cannot be read"),
    "tensor in two shards": (twice, rf"holds '{KEY}', and so does .*Save the model again"),
    "tensor twice in a header": (twice_in_a_header, rf"lists '{KEY}' twice in its header: save it again"),
    "integers": (
        lambda folder: edit_shard(folder, lambda t: t.update({KEY: t[KEY].to(torch.int32)})),
        rf"'{KEY}' is torch\.int32 .*, not latents",
    ),
    "float8": (
        lambda folder: edit_shard(folder, lambda t: t.update({KEY: t[KEY].to(torch.float8_e4m3fn)})),
        rf"'{KEY}' has the unsupported dtype F8_E4M3",
    ),
    "nan": (
        lambda folder: edit_shard(folder, lambda t: t[KEY].view(-1)[-1].fill_(torch.nan)),
        rf"'{KEY}' holds a NaN or an Inf",
    ),
    "inf": (
        lambda folder: edit_shard(folder, lambda t: t[KEY].view(-1)[0].fill_(torch.inf)),
        rf"'{KEY}' holds a NaN or an Inf",
    ),
    "width": (
        lambda folder: edit_shard(folder, lambda t: t.update({KEY: t[KEY][:, :256].clone()})),
        rf"'{KEY}' has shape \[256, 256\].*config.*\[256, 512\]",
    ),
    "another model's config": (
        lambda folder: edit_config(folder, lambda c: c.update(intermediate_size=1024)),
        r"'model\.layers\.0\.mlp\.down_proj\.weight' has shape \[256, 512\].*config.*\[256, 1024\]",
    ),
    "a layer less than the config": (
        lambda folder: edit_config(folder, lambda c: c.update(num_hidden_layers=2)),
        r"has no 'model\.layers\.1\.[a-z_.]+weight', which",
    ),
    "missing config": (lambda folder: (folder / "config.json").unlink(), r"config\.json does not exist"),
    "config is not JSON": (
        lambda folder: (folder / "config.json").write_text('{"a": 1'),
        r"config\.json cannot be read",
    ),
}


@every_format
@pytest.mark.parametrize("damage", DAMAGES)
def test_damaged_source(entry: Row, damage: str, source: Path, tmp_path: Path) -> None:
    make, message = DAMAGES[damage]
    make(source)
    before = contents(tmp_path)
    with pytest.raises(CheckpointError, match=message) as caught:
        export(entry.name, source, tmp_path / "out" / entry.path)
    assert str(source) in str(caught.value)
    assert contents(tmp_path) == before
    assert not list(tmp_path.glob("out/*")) or [*(tmp_path / "out").rglob("*")] == [tmp_path / "out" / "gguf"]


@every_format
def test_damaged_source_costs_no_older_artifact(
    entry: Row, saved: tuple[nn.Module, Path], source: Path, tmp_path: Path
) -> None:
    """A NaN is found halfway through the writing."""
    out = tmp_path / "out" / entry.path
    export(entry.name, source, out)
    DAMAGES["nan"][0](source)
    before = contents(tmp_path)
    with pytest.raises(CheckpointError, match="NaN"):
        export(entry.name, source, out, overwrite=True)
    assert contents(tmp_path) == before
    assert entry.format.open(out).fingerprint() == fingerprint_model(saved[0])


@every_format
def test_target_exists(entry: Row, saved: tuple[nn.Module, Path], source: Path, tmp_path: Path) -> None:
    out = tmp_path / "out" / entry.path
    out.parent.mkdir(parents=True)
    out.write_text("precious")
    with pytest.raises(CheckpointError, match=rf"{out.name} exists: name another .*--overwrite"):
        export(entry.name, source, out)
    assert out.read_text() == "precious" and list(out.parent.iterdir()) == [out]


def test_no_tokenizer(source: Path, tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    """A warning for folders, which are models without one; GGUF files are not."""
    with caplog.at_level(logging.WARNING):
        pack_checkpoint(source, tmp_path / "with")
        assert "tokenizer" not in caplog.text
        for path in source.glob("*token*"):
            path.unlink()
        pack_checkpoint(source, tmp_path / "without")
    assert f"{source} holds no tokenizer, so the output has none" in caplog.text
    assert open_checkpoint(tmp_path / "without").fingerprint() == open_checkpoint(source).fingerprint()
    pytest.importorskip("gguf")
    with pytest.raises(CheckpointError, match=f"{source} holds no tokenizer, which a GGUF file must contain"):
        export("gguf-tq2_0", source, tmp_path / "x.gguf")
    assert not list(tmp_path.glob("*x.gguf*"))


def test_restoring_is_as_careful(source: Path, tmp_path: Path) -> None:
    packed = pack_checkpoint(source, tmp_path / "packed")
    path = packed / "model.safetensors"
    os.truncate(path, path.stat().st_size - 1)
    before = contents(tmp_path)
    with pytest.raises(CheckpointError, match=r"packed/model\.safetensors cannot be read as safetensors"):
        restore_latents(packed, tmp_path / "latents")
    assert contents(tmp_path) == before


# Reading artifacts that were damaged


@every_format
@pytest.mark.parametrize("cut", ["one byte", "half", "all"])
def test_truncated_artifact(entry: Row, cut: str, source: Path, tmp_path: Path) -> None:
    """Found when it is opened, or when the codes are read; never read as something else."""
    out = export(entry.name, source, tmp_path / entry.path)
    path = out if out.is_file() else out / "model.safetensors"
    size = path.stat().st_size
    os.truncate(path, {"one byte": size - 1, "half": size // 2, "all": 0}[cut])
    with pytest.raises(CheckpointError) as caught:
        entry.format.open(out).fingerprint()
    assert str(path) in str(caught.value)


# Disks


def limited(action: Callable[[], Any], limit: int) -> bytes:
    """What ``action`` says in a child that can write files of at most ``limit`` bytes."""
    read, write = os.pipe()
    child = os.fork()
    if child == 0:
        signal.signal(signal.SIGXFSZ, signal.SIG_IGN)
        resource.setrlimit(resource.RLIMIT_FSIZE, (limit, limit))
        try:
            action()
            os.write(write, b"written")
        except BaseException as error:
            os.write(write, f"{type(error).__name__}: {error}".encode())
        os._exit(0)
    os.close(write)
    with os.fdopen(read, "rb") as pipe:
        said = pipe.read()
    os.waitpid(child, 0)
    return said


@every_format
@pytest.mark.parametrize("limit", slow_but(1, [3000, 0, 200_000]))
def test_file_size_limit(entry: Row, limit: int, source: Path, tmp_path: Path) -> None:
    """In the header, and in the middle of the tensors."""
    out = tmp_path / "out" / entry.path
    out.parent.mkdir(parents=True)
    before = contents(tmp_path)
    said = limited(lambda: export(entry.name, source, out), limit).decode()
    assert said.startswith(f"CheckpointError: {out} cannot be written ("), said
    assert "File too large" in said or "requested and" in said  # numpy's words
    assert contents(tmp_path) == before and not list(out.parent.iterdir())
    assert limited(lambda: export(entry.name, source, out), 1 << 30) == b"written"


@pytest.fixture
def small_disk(tmp_path: Path) -> Iterator[Path]:
    disk = tmp_path / "disk"
    disk.mkdir()
    command = ["mount", "-t", "tmpfs", "-o", "size=300k", "tmpfs", str(disk)]
    if os.geteuid() or subprocess.run(command, capture_output=True).returncode:
        pytest.skip("only root can mount a small disk")
    yield disk
    subprocess.run(["umount", str(disk)], check=True)


@every_format
@pytest.mark.parametrize("checked", [True, False])
def test_full_disk(
    entry: Row, checked: bool, source: Path, small_disk: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Said before the writing begins; or, if others fill the disk meanwhile, when it is full."""
    if not checked:
        for module in (stream, __import__("axolotl_bitnet.formats.gguf.writer", fromlist=["gguf"])):
            monkeypatch.setattr(module, "require_space", lambda folder, needed: None, raising=False)
    out = small_disk / entry.path
    out.parent.mkdir(exist_ok=True)
    with pytest.raises(CheckpointError, match=r"(?i)no space|requested and") as caught:
        export(entry.name, source, out)
    assert str(out.parent) in str(caught.value)
    assert not list(out.parent.iterdir())


@every_format
def test_read_only_disk(entry: Row, source: Path, small_disk: Path) -> None:
    out = small_disk / entry.path
    subprocess.run(["mount", "-o", "remount,ro", str(small_disk)], check=True)
    with pytest.raises(CheckpointError, match=r"cannot be written \(Read-only file system\).*name another"):
        export(entry.name, source, out)


@every_format
def test_target_below_a_file(entry: Row, source: Path, tmp_path: Path) -> None:
    (tmp_path / "file").write_text("precious")
    with pytest.raises(CheckpointError, match=r"cannot be written \((Not a directory|File exists)\)"):
        export(entry.name, source, tmp_path / "file" / "deeper" / Path(entry.path).name)
    assert (tmp_path / "file").read_text() == "precious"
