"""Checkpoints are read tensor by tensor and written whole or not at all."""

from __future__ import annotations

import os
from collections.abc import Callable
from contextlib import nullcontext
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file
from torch import Tensor, nn

from axolotl_bitnet.storage import safetensors_stream as stream
from axolotl_bitnet.storage.atomic import (
    CheckpointError,
    read_json,
    require_apart,
    whole_file,
    whole_folder,
    write_json,
)
from axolotl_bitnet.storage.parallel import row_ranges
from axolotl_bitnet.storage.safetensors_stream import (
    DTYPES,
    INDEX,
    SINGLE,
    CheckpointReader,
    Entry,
    SafetensorsWriter,
)


def entry(name: str, tensor: Tensor) -> Entry:
    return Entry(name, tensor.dtype, tuple(tensor.shape))


def random_tensor(dtype: torch.dtype, *shape: int) -> Tensor:
    if dtype == torch.bool:
        return torch.rand(shape) < 0.5
    if dtype.is_floating_point:
        return torch.randn(shape).to(dtype)
    return torch.randint(0, 120, shape).to(dtype)


def write(path: Path, tensors: dict[str, Tensor]) -> None:
    with SafetensorsWriter(path, [entry(name, tensor) for name, tensor in tensors.items()]) as writer:
        for name, tensor in tensors.items():
            writer.write(name, tensor)


def left_in(folder: Path) -> list[str]:
    return sorted(path.name for path in folder.iterdir())


def shards(folder: Path) -> dict[str, Tensor]:
    """Two shards and their index in ``folder``; returns their tensors."""
    tensors = {name: torch.randn(3, 5) for name in ("a", "b", "c")}
    save_file({"a": tensors["a"]}, folder / "model-00001-of-00002.safetensors")
    save_file({"b": tensors["b"], "c": tensors["c"]}, folder / "model-00002-of-00002.safetensors")
    files = {name: f"model-0000{1 + (name > 'a')}-of-00002.safetensors" for name in tensors}
    write_json(folder / INDEX, {"metadata": {}, "weight_map": files})
    return tensors


# The reader


@pytest.mark.parametrize("size", [None, "40KB"])
def test_reader_of_what_transformers_saves(
    tmp_path: Path, tiny_model: Callable[..., nn.Module], size: str | None
) -> None:
    model = tiny_model("Llama")
    model.save_pretrained(tmp_path, **({"max_shard_size": size} if size else {}))
    reader = CheckpointReader(tmp_path)
    state = model.state_dict()
    assert (tmp_path / INDEX).exists() == bool(size)
    assert (len(list(tmp_path.glob("model*.safetensors"))) > 2) == bool(size)
    assert list(reader.entries) == sorted(state)
    for name, tensor in state.items():
        assert reader.entries[name] == entry(name, tensor)
        assert reader.entries[name].nbytes == tensor.nbytes
        assert torch.equal(reader.tensor(name), tensor)


@pytest.mark.parametrize(("rows", "columns"), [(1, 1), (7, 13), (64, 5), (5, 64), (1, 300), (0, 7), (9, 0)])
@pytest.mark.parametrize("elements", [1, 33, 64, 1 << 22])
def test_blocks_of_rows_are_the_tensor(tmp_path: Path, rows: int, columns: int, elements: int) -> None:
    matrix = torch.randn(rows, columns).to(torch.bfloat16)
    write(tmp_path / SINGLE, {"w": matrix, "other": torch.ones(3)})
    reader = CheckpointReader(tmp_path)
    blocks = [reader.rows("w", *ends) for ends in row_ranges(rows, columns, elements)]
    assert torch.equal(torch.cat(blocks) if blocks else matrix[:0], matrix)
    assert all(block.numel() <= max(elements, columns) and block.shape[1] == columns for block in blocks)
    flat = [reader.elements("w", *ends) for ends in row_ranges(matrix.numel(), 1, elements)]
    assert torch.equal(torch.cat([*flat, matrix.flatten()[:0]]), matrix.flatten())


def test_file_that_becomes_shorter_while_it_is_read(tmp_path: Path) -> None:
    write(tmp_path / SINGLE, {"w": torch.randn(8, 8)})
    reader = CheckpointReader(tmp_path)
    os.truncate(tmp_path / SINGLE, (tmp_path / SINGLE).stat().st_size - 4)
    assert reader.rows("w", 0, 7).shape == (7, 8)
    with pytest.raises(CheckpointError, match=r"model\.safetensors has become shorter while 'w' was read"):
        reader.tensor("w")


def test_reader_of_an_unknown_tensor(tmp_path: Path) -> None:
    save_file({"a": torch.zeros(2, 2)}, tmp_path / SINGLE)
    reader = CheckpointReader(tmp_path)
    assert torch.equal(reader.tensor("a"), torch.zeros(2, 2))
    with pytest.raises(CheckpointError, match="holds no tensor 'b'"):
        reader.tensor("b")


def test_reader_missing_shard(tmp_path: Path) -> None:
    tensors = shards(tmp_path)
    assert torch.equal(CheckpointReader(tmp_path).tensor("c"), tensors["c"])
    (tmp_path / "model-00002-of-00002.safetensors").unlink()
    with pytest.raises(CheckpointError, match=r"model-00002-of-00002\.safetensors is missing"):
        CheckpointReader(tmp_path)


def test_reader_follows_the_index_not_stale_files(tmp_path: Path) -> None:
    tensors = shards(tmp_path)
    save_file({"a": torch.zeros(1)}, tmp_path / "model-00001-of-00009.safetensors")
    assert torch.equal(CheckpointReader(tmp_path).tensor("a"), tensors["a"])


def test_reader_tensor_that_the_index_promises_and_no_shard_holds(tmp_path: Path) -> None:
    """Else a packed model would lack it without a word."""
    shards(tmp_path)
    index = read_json(tmp_path / INDEX)
    index["weight_map"]["d"] = "model-00001-of-00002.safetensors"
    write_json(tmp_path / INDEX, index)
    with pytest.raises(CheckpointError, match="'d'"):
        CheckpointReader(tmp_path)


def test_reader_refuses_a_tensor_in_two_shards(tmp_path: Path) -> None:
    tensors = shards(tmp_path)
    stray = {"a": torch.zeros(3, 5), "b": tensors["b"], "c": tensors["c"]}
    save_file(stray, tmp_path / "model-00002-of-00002.safetensors")
    with pytest.raises(CheckpointError, match=r"00002-of-00002\.safetensors holds 'a', and so does .*00001"):
        CheckpointReader(tmp_path)


def test_reader_refuses_a_name_twice_in_a_header(tmp_path: Path) -> None:
    """The safetensors package takes the last one without a word."""
    place = '"a":{"dtype":"F32","shape":[2],"data_offsets":[%d,%d]}'
    header = ("{" + place % (8, 16) + "," + place % (0, 8) + "}").encode()
    (tmp_path / SINGLE).write_bytes(len(header).to_bytes(8, "little") + header + bytes(8))
    assert list(load_file(tmp_path / SINGLE)) == ["a"]
    with pytest.raises(CheckpointError, match=r"model\.safetensors lists 'a' twice"):
        CheckpointReader(tmp_path)


def test_reader_follows_links(tmp_path: Path) -> None:
    """The hub's cache is made of them: its snapshots link to files elsewhere."""
    (tmp_path / "blobs").mkdir()
    (tmp_path / "model").mkdir()
    save_file({"a": torch.ones(3)}, tmp_path / "blobs" / "1234")
    (tmp_path / "model" / SINGLE).symlink_to(tmp_path / "blobs" / "1234")
    assert CheckpointReader(tmp_path / "model").tensor("a").tolist() == [1, 1, 1]


@pytest.mark.parametrize("damage", ["empty", "text", "truncated", "header"])
def test_reader_corrupted_file(tmp_path: Path, damage: str) -> None:
    path = tmp_path / SINGLE
    save_file({"a": torch.randn(8, 8)}, path)
    whole = path.read_bytes()
    CheckpointReader(tmp_path).tensor("a")
    path.write_bytes(
        {
            "empty": b"",
            "text": b"version https://git-lfs.github.com/spec/v1\n",
            "truncated": whole[:-9],
            "header": whole[:12] + b"\xff" + whole[13:],
        }[damage]
    )
    with pytest.raises(CheckpointError, match=r"model\.safetensors cannot be read as safetensors"):
        CheckpointReader(tmp_path)


@pytest.mark.parametrize("name", ["../evil.safetensors", "sub/x.safetensors", "x.bin", "..", ""])
def test_reader_refuses_files_outside_the_folder(tmp_path: Path, name: str) -> None:
    folder = tmp_path / "model"
    (folder / "sub").mkdir(parents=True)
    for path in (tmp_path / "evil.safetensors", folder / "sub/x.safetensors", folder / "x.bin"):
        save_file({"a": torch.zeros(1)}, path)
    save_file({"a": torch.zeros(1)}, folder / "x.safetensors")
    write_json(folder / INDEX, {"weight_map": {"a": "x.safetensors"}})
    assert list(CheckpointReader(folder).entries) == ["a"]
    write_json(folder / INDEX, {"weight_map": {"a": name}})
    with pytest.raises(CheckpointError, match="not a safetensors file of this folder"):
        CheckpointReader(folder)


def test_reader_refuses_an_absolute_path(tmp_path: Path) -> None:
    folder = tmp_path / "model"
    folder.mkdir()
    save_file({"a": torch.zeros(1)}, tmp_path / "x.safetensors")
    write_json(folder / INDEX, {"weight_map": {"a": str(tmp_path / "x.safetensors")}})
    with pytest.raises(CheckpointError, match="not a safetensors file of this folder"):
        CheckpointReader(folder)


@pytest.mark.parametrize("text", ["{", "[]", '{"weight_map": []}', '{"weight_map": {"a": 3}}', "{}"])
def test_reader_damaged_index(tmp_path: Path, text: str) -> None:
    shards(tmp_path)
    (tmp_path / INDEX).write_text(text)
    with pytest.raises(CheckpointError, match=r"model\.safetensors\.index\.json"):
        CheckpointReader(tmp_path)


def test_reader_pickle_only(tmp_path: Path) -> None:
    torch.save({"a": torch.zeros(1)}, tmp_path / "pytorch_model.bin")
    with pytest.raises(CheckpointError, match=r"pytorch_model\.bin is pickle.*save it as safetensors"):
        CheckpointReader(tmp_path)


def test_reader_nothing_there(tmp_path: Path) -> None:
    for folder in (tmp_path, tmp_path / "no" / "such"):
        with pytest.raises(CheckpointError, match=r"holds neither model\.safetensors nor") as caught:
            CheckpointReader(folder)
        assert str(folder) in str(caught.value) and "pickle" not in str(caught.value)


def test_reader_unsupported_dtype(tmp_path: Path) -> None:
    save_file({"w": torch.zeros(4, 4).to(torch.float8_e4m3fn)}, tmp_path / SINGLE)
    with pytest.raises(CheckpointError, match="'w' has the unsupported dtype F8_E4M3"):
        CheckpointReader(tmp_path)


# The writer


def test_written_file_is_read_by_safetensors(tmp_path: Path) -> None:
    """All dtypes, in an order and in sizes that leave wide ones at odd offsets."""
    tensors: dict[str, Tensor] = {}
    for index, (name, dtype) in enumerate(DTYPES.items()):
        for shape in [(3, 5), (7,), (2, 3, 1), (0,), (4, 0), ()]:
            tensors[f"{index}.{name}.{len(tensors)}"] = random_tensor(dtype, *shape)
    path = tmp_path / SINGLE
    write(path, tensors)
    back, reader = load_file(path), CheckpointReader(tmp_path)
    assert back.keys() == tensors.keys()
    for name, tensor in tensors.items():
        for found in (back[name], reader.tensor(name)):
            assert found.dtype == tensor.dtype and found.shape == tensor.shape
            assert torch.equal(found, tensor), name
    header = int.from_bytes(path.read_bytes()[:8], "little")
    assert header % 8 == 0
    assert path.stat().st_size == 8 + header + sum(tensor.nbytes for tensor in tensors.values())


def test_writer_takes_any_strides_and_gradients(tmp_path: Path) -> None:
    transposed = nn.Parameter(torch.randn(6, 4)).t()
    write(tmp_path / SINGLE, {"t": transposed, "s": torch.arange(20).reshape(4, 5)[::2, 1::2]})
    back = load_file(tmp_path / SINGLE)
    assert torch.equal(back["t"], transposed)
    assert back["s"].tolist() == [[1, 3], [11, 13]]


def test_writer_says_pytorch(tmp_path: Path) -> None:
    """transformers refuses a file whose metadata does not name a framework."""
    from safetensors import safe_open

    write(tmp_path / SINGLE, {"a": torch.zeros(1)})
    with safe_open(tmp_path / SINGLE, framework="pt") as file:
        assert file.metadata() == {"format": "pt"}


A, B = torch.zeros(2, 3), torch.ones(4)


@pytest.mark.parametrize(
    ("name", "tensor"),
    [
        ("b", B),  # wrong order
        ("a", A.to(torch.bfloat16)),
        ("a", A.t()),
        ("a", torch.zeros(6)),
        ("c", A),
    ],
)
def test_writer_refuses_what_was_not_announced(tmp_path: Path, name: str, tensor: Tensor) -> None:
    entries = [entry("a", A), entry("b", B)]
    with (
        pytest.raises(CheckpointError, match=f"tensor '{name}' .* was announced as"),
        SafetensorsWriter(tmp_path / "x", entries) as writer,
    ):
        writer.write(name, tensor)


def test_writer_refuses_one_too_many(tmp_path: Path) -> None:
    with (
        pytest.raises(CheckpointError, match="announced as None"),
        SafetensorsWriter(tmp_path / "x", [entry("a", A)]) as writer,
    ):
        writer.write("a", A)
        writer.write("a", A)


def test_writer_notices_a_missing_tensor(tmp_path: Path) -> None:
    entries = [entry("a", A), entry("b", B)]
    with (
        pytest.raises(CheckpointError, match="'b' was announced but never written"),
        SafetensorsWriter(tmp_path / "x", entries) as writer,
    ):
        writer.write("a", A)
    with pytest.raises(ZeroDivisionError), SafetensorsWriter(tmp_path / "x", entries):
        raise ZeroDivisionError  # not hidden behind a missing tensor


def test_writer_of_blocks(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Of any size, whatever is brought to the disk in between."""
    monkeypatch.setattr(stream, "FLUSH", 100)
    tensors = {"m": torch.randn(9, 7), "none": torch.zeros(0, 3), "x": torch.randn(5).bfloat16()}
    with SafetensorsWriter(tmp_path / SINGLE, [entry(*item) for item in tensors.items()]) as writer:
        for name, tensor in tensors.items():
            writer.write_blocks(name, tensor.flatten().split(10))
    back = load_file(tmp_path / SINGLE)
    assert all(torch.equal(back[name], tensor) for name, tensor in tensors.items())


@pytest.mark.parametrize(
    ("name", "blocks", "message"),
    [
        ("a", [A[:1]], "'a' has 3 elements, and was announced"),
        ("a", [A, A[:1]], "'a' has 9 elements, and was announced"),
        ("a", [A.to(torch.bfloat16)], r"'a' is torch\.bfloat16, and was announced"),
        ("b", [B], "'b' was announced as"),
    ],
)
def test_writer_refuses_blocks_of_something_else(
    tmp_path: Path, name: str, blocks: list[Tensor], message: str
) -> None:
    with (
        pytest.raises(CheckpointError, match=message),
        SafetensorsWriter(tmp_path / "x", [entry("a", A), entry("b", B)]) as writer,
    ):
        writer.write_blocks(name, blocks)


# Folders whole or none


def test_folder_appears_at_the_end(tmp_path: Path) -> None:
    target = tmp_path / "deep" / "out"
    with whole_folder(target) as work:
        (work / "file").write_text("new")
        assert not target.exists() and work.parent == target.parent
    assert (target / "file").read_text() == "new"
    assert left_in(target.parent) == ["out"]
    assert target.stat().st_mode & 0o777 == 0o755


@pytest.mark.parametrize("error", [ZeroDivisionError, KeyboardInterrupt, SystemExit, OSError])
def test_folder_on_an_error(tmp_path: Path, error: type[BaseException]) -> None:
    with pytest.raises(error), whole_folder(tmp_path / "out") as work:
        (work / "sub").mkdir()
        (work / "sub" / "file").write_text("half")
        raise error
    assert left_in(tmp_path) == []


def old_folder(folder: Path) -> Path:
    folder.mkdir()
    (folder / "file").write_text("old")
    (folder / "stale").write_text("old")
    return folder


def ours(path: Path) -> bool:
    return path.name in ("file", "stale")


def test_a_folder_with_anything_else_is_not_replaced(tmp_path: Path) -> None:
    target = old_folder(tmp_path / "out")
    (target / "checkpoint-3").mkdir()
    with (
        pytest.raises(CheckpointError, match="checkpoint-3, which would be lost"),
        whole_folder(target, ours),
    ):
        pytest.fail("must not be entered")
    (target / "checkpoint-3").rmdir()
    with pytest.raises(CheckpointError, match="holds notes"), whole_folder(target, ours) as work:
        (work / "file").write_text("new")
        (target / "notes").write_text("written in the meantime")
    assert left_in(target) == ["file", "notes", "stale"] and left_in(tmp_path) == ["out"]


@pytest.mark.parametrize("link", [False, True])
def test_a_file_or_a_link_is_not_replaced_by_a_folder(tmp_path: Path, link: bool) -> None:
    target = tmp_path / "out"
    old_folder(tmp_path / "elsewhere")
    target.symlink_to(tmp_path / "elsewhere") if link else target.write_text("mine")
    refused = pytest.raises(CheckpointError, match="is a link" if link else "is a file")
    with refused, whole_folder(target, ours):
        pytest.fail("must not be entered")
    assert left_in(tmp_path) == ["elsewhere", "out"]
    assert target.is_symlink() if link else target.read_text() == "mine"


@pytest.mark.parametrize("before", [None, b"", b"GGUF of before", b"my notes"])
def test_a_file_replaces_one_of_its_kind(tmp_path: Path, before: bytes | None) -> None:
    target = tmp_path / "model.gguf"
    if before is not None:
        target.write_bytes(before)
    refused = before == b"my notes"
    with (
        pytest.raises(CheckpointError, match="of another kind") if refused else nullcontext(),
        whole_file(target, True, b"GGUF") as work,
    ):
        work.write_bytes(b"GGUF, new")
    assert target.read_bytes() == (before if refused else b"GGUF, new")
    assert left_in(tmp_path) == ["model.gguf"]


def test_a_target_is_never_around_its_source(tmp_path: Path) -> None:
    (tmp_path / "run" / "packed").mkdir(parents=True)
    (tmp_path / "link").symlink_to(tmp_path / "run")
    for target in (tmp_path / "run" / "packed", tmp_path / "run", tmp_path, tmp_path / "link"):
        with pytest.raises(CheckpointError, match="would replace its own source"):
            require_apart(tmp_path / "run" / "packed", target)
    require_apart(tmp_path / "run", tmp_path / "run" / "packed")


def test_folder_that_exists(tmp_path: Path) -> None:
    target = old_folder(tmp_path / "out")
    with pytest.raises(CheckpointError, match=r"out exists.*--overwrite"), whole_folder(target):
        pytest.fail("must not be entered")
    assert (target / "file").read_text() == "old" and left_in(tmp_path) == ["out"]

    with whole_folder(target, ours) as work:
        (work / "file").write_text("new")
        assert (target / "file").read_text() == "old"
    assert left_in(target) == ["file"] and (target / "file").read_text() == "new"
    assert left_in(tmp_path) == ["out"]


@pytest.mark.parametrize("error", [ZeroDivisionError, KeyboardInterrupt])
def test_folder_that_exists_on_an_error(tmp_path: Path, error: type[BaseException]) -> None:
    target = old_folder(tmp_path / "out")
    with pytest.raises(error), whole_folder(target, ours) as work:
        (work / "file").write_text("half")
        raise error
    assert left_in(target) == ["file", "stale"] and (target / "file").read_text() == "old"
    assert left_in(tmp_path) == ["out"]


@pytest.mark.parametrize("fails", [1, 2])
def test_folder_that_exists_when_renaming_fails(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, fails: int
) -> None:
    """The swap is two renames; whichever fails, the old folder is where it was."""
    target = old_folder(tmp_path / "out")
    rename, calls = Path.rename, 0

    def rename_or_fail(self: Path, to: Path) -> Path:
        nonlocal calls
        calls += 1
        if calls == fails:
            raise OSError("renaming failed")
        return rename(self, to)

    monkeypatch.setattr(Path, "rename", rename_or_fail)
    with pytest.raises(OSError, match="renaming failed"), whole_folder(target, ours) as work:
        (work / "file").write_text("new")
    assert (target / "file").is_file(), f"the old folder went: {left_in(tmp_path)}"
    assert (target / "file").read_text() == "old"
    assert left_in(tmp_path) == ["out"]


# JSON


def test_json_round_trip(tmp_path: Path) -> None:
    data: dict[str, Any] = {"b": [1, 2.5, None], "a": {"naïve": "±1.58 bits 三"}}
    write_json(tmp_path / "x.json", data)
    assert read_json(tmp_path / "x.json") == data
    assert "三" in (tmp_path / "x.json").read_text(encoding="utf-8")
    write_json(tmp_path / "x.json", {"again": 1})
    assert read_json(tmp_path / "x.json") == {"again": 1} and left_in(tmp_path) == ["x.json"]


def test_json_is_written_whole_or_not_at_all(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    path = tmp_path / "x.json"
    write_json(path, {"a": 1})
    (tmp_path / "link").hardlink_to(path)
    write_json(path, {"a": 1})  # a new file under the name: the old one's bytes are not written over
    assert not path.samefile(tmp_path / "link")
    (tmp_path / "link").unlink()
    with pytest.raises(TypeError):
        write_json(path, {"a": object()})
    assert read_json(path) == {"a": 1} and left_in(tmp_path) == ["x.json"]

    write_text = Path.write_text

    def disk_full(self: Path, data: str, **options: Any) -> int:
        write_text(self, data[: len(data) // 2], **options)
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(Path, "write_text", disk_full)
    with pytest.raises(OSError, match="No space"):
        write_json(path, {"a": 2})
    assert read_json(path) == {"a": 1}


@pytest.mark.parametrize(
    ("content", "message"),
    [
        (None, "does not exist"),
        (b"{", "cannot be read"),
        (b"\xff\xfe\x00", "cannot be read"),
        (b"[1]", "no JSON object"),
    ],
)
def test_json_errors_name_the_file(tmp_path: Path, content: bytes | None, message: str) -> None:
    path = tmp_path / "config.json"
    if content is not None:
        path.write_bytes(content)
    with pytest.raises(CheckpointError, match=message) as caught:
        read_json(path)
    assert str(path) in str(caught.value)


def test_json_of_a_folder(tmp_path: Path) -> None:
    with pytest.raises(CheckpointError, match="cannot be read"):
        read_json(tmp_path)
