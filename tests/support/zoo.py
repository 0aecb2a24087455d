"""A finished run with an artifact of every format that can be made here, for tests that damage copies."""

from __future__ import annotations

import importlib.util
import json
import random
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file
from torch import Tensor, nn
from transformers import AutoTokenizer

from axolotl_bitnet.formats.gguf.reader import GGUFCheckpoint
from axolotl_bitnet.formats.gguf.ternary_type import TernaryType
from axolotl_bitnet.formats.mlx import pack_words, unpack_words
from axolotl_bitnet.formats.packed import pack_codes, unpack_codes
from axolotl_bitnet.formats.registry import FORMATS
from axolotl_bitnet.model.convert import convert_to_bitlinear
from axolotl_bitnet.model.fingerprint import fingerprint_model
from axolotl_bitnet.plugin.artifacts import finish_run
from axolotl_bitnet.storage.safetensors_stream import SINGLE
from support import TINY
from support.models import WIDE

HAS_GGUF = importlib.util.find_spec("gguf") is not None
MADE = [name for name in FORMATS if HAS_GGUF or not name.startswith("gguf")]
"""Names of the formats that this machine can make."""

every_format = pytest.mark.parametrize(
    "entry",
    [
        pytest.param(
            entry, id=name, marks=pytest.mark.skipif(name not in MADE, reason=f"{name} is not installed")
        )
        for name, entry in FORMATS.items()
    ],
)

Q = "model.layers.0.self_attn.q_proj"


def make_run(tiny_model: Callable[..., nn.Module], folder: Path, **options: Any) -> Path:
    """A run of a Llama whose rows are multiples of 256, with biases, a tokenizer and all artifacts."""
    torch.manual_seed(11)
    tokenizer = AutoTokenizer.from_pretrained(TINY / "model")
    sizes = WIDE | {"num_hidden_layers": 1}
    model = tiny_model("Llama", vocab_size=len(tokenizer), bos_token_id=None, **(sizes | options))
    convert_to_bitlinear(model)
    model.save_pretrained(folder)  # type: ignore[operator]
    tokenizer.save_pretrained(folder)
    finish_run(folder, fingerprint_model(model), MADE, verify=True)
    return folder


def copy_of(run: Path, kind: str, folder: Path) -> tuple[Path, Path]:
    """A copy of one artifact ("latents": of the run's own weights), to be damaged, and its reference."""
    if kind == "latents":
        target = folder / "latents"
        shutil.copytree(run, target, ignore=lambda *_: {entry.folder for entry in FORMATS.values()})
        (target / "bitnet.json").unlink()
        return target, run
    source = run / FORMATS[kind].path
    target = folder / source.name
    (shutil.copyfile if source.is_file() else shutil.copytree)(source, target)
    return target, run


def edit_tensors(folder: Path, change: Callable[[dict[str, Tensor]], Any]) -> None:
    tensors = load_file(folder / SINGLE)
    change(tensors)
    save_file(tensors, folder / SINGLE, {"format": "pt"})


def edit_gguf(file: Path, name: str, change: Callable[[Tensor, str], Tensor]) -> None:
    """Replace a tensor's bytes in place; ``change`` takes and gives them as uint8 (rows, bytes)."""
    checkpoint = GGUFCheckpoint(file)
    stored = checkpoint._header.tensors[name]
    rows = stored.shape[0] if len(stored.shape) > 1 else 1
    start, size, kind = stored.offset, stored.nbytes, checkpoint._kinds[stored.kind].lower()
    data = bytearray(file.read_bytes())
    old = torch.frombuffer(data[start : start + size], dtype=torch.uint8).reshape(rows, -1)
    new = change(old.clone(), kind).contiguous().view(torch.uint8)
    assert new.numel() == size and not torch.equal(new.reshape(-1), old.reshape(-1))
    data[start : start + size] = new.numpy().tobytes()
    file.write_bytes(data)


def ternary_type(name: str) -> TernaryType:
    """A type of GGUF tensors, by llama.cpp's name of it in lower case."""
    written: Any = FORMATS[f"gguf-{name}"].format
    type: TernaryType = written.type
    return type


def flip_code(artifact: Path, kind: str, rng: random.Random) -> None:
    """Make one code of one layer another, anywhere in the file."""

    def flip(codes: Tensor) -> None:
        row, column = rng.randrange(codes.shape[0]), rng.randrange(codes.shape[1])
        old = int(codes[row, column])
        codes[row, column] = rng.choice([code for code in (-1, 0, 1) if code != old])

    def in_gguf(data: Tensor, stored_as: str) -> Tensor:
        type = ternary_type(stored_as)
        codes, d = type.decode(data)
        flip(codes)
        return type.encode(codes, d.reshape(-1)[:1])

    if kind.startswith("gguf"):
        name = rng.choice(["attn_q", "attn_k", "attn_v", "attn_output", "ffn_gate", "ffn_up", "ffn_down"])
        edit_gguf(artifact, f"blk.0.{name}.weight", in_gguf)
        return

    def in_folder(tensors: dict[str, Tensor]) -> None:
        key = rng.choice([key for key in tensors if key.endswith("_proj.weight")])
        old = tensors[key]
        if kind == "packed":
            codes = unpack_codes(old)
            flip(codes)
            tensors[key] = pack_codes(codes)
        elif kind == "mlx":
            codes = unpack_words(old)
            flip(codes)
            tensors[key] = pack_words(codes)
        elif kind == "dense":
            codes = old.sign().to(torch.int8)
            flip(codes)
            tensors[key] = codes.to(old.dtype) * old.abs().max()
        else:  # the largest latents: the mean stays, the sign does not
            place = int(old.abs().argmax()) if rng.random() < 0.5 else int(old.abs().argmin())
            value = old.reshape(-1)[place]
            old.reshape(-1)[place] = -value if value.abs() > old.abs().mean() else 2 * old.abs().mean()

    edit_tensors(artifact, in_folder)


def change_scale(artifact: Path, kind: str, rng: random.Random) -> None:
    """Make one layer's scale, or that of one of its blocks, its neighbour."""

    def next_one(tensor: Tensor) -> Tensor:
        return torch.nextafter(tensor, torch.full_like(tensor, torch.inf))

    def in_gguf(data: Tensor, stored_as: str) -> Tensor:
        row = rng.randrange(data.shape[0])
        place = 0 if stored_as == "q2_0" else ternary_type(stored_as).nbytes - 2  # in a block
        d = data[row, place : place + 2].view(torch.float16)
        data[row, place : place + 2] = next_one(d).view(torch.uint8)
        return data

    if kind.startswith("gguf"):
        edit_gguf(artifact, "blk.0.attn_q.weight", in_gguf)
        return

    def in_folder(tensors: dict[str, Tensor]) -> None:
        if kind == "packed":
            tensors[f"{Q}.weight_scale"] = next_one(tensors[f"{Q}.weight_scale"])
        elif kind == "mlx":
            row = rng.randrange(256)
            tensors[f"{Q}.scales"][row, 0] = next_one(tensors[f"{Q}.scales"][row, 0])
        else:
            tensors[f"{Q}.weight"] *= 1.05

    edit_tensors(artifact, in_folder)


def change_norm(artifact: Path, kind: str) -> None:
    """The smallest change of one value of the last norm."""

    def in_gguf(data: Tensor, stored_as: str) -> Tensor:
        values = data.view(torch.float32)
        values[0, 3] = torch.nextafter(values[0, 3], torch.tensor(9.0))
        return values

    def in_folder(tensors: dict[str, Tensor]) -> None:
        norm = tensors["model.norm.weight"]
        norm[3] = torch.nextafter(norm[3], torch.full_like(norm[3], 9.0))

    if kind.startswith("gguf"):
        edit_gguf(artifact, "output_norm.weight", in_gguf)
    else:
        edit_tensors(artifact, in_folder)


def change_tokenizer(artifact: Path, kind: str) -> None:
    old, new = b"<|im_start|>{{", b"<|im_sta7t|>{{"  # in the chat template
    for path in [artifact] if artifact.is_file() else sorted(artifact.glob("*")):
        data = path.read_bytes()
        if old in data and path.suffix != ".safetensors":
            path.write_bytes(data.replace(old, new, 1))
            return
    raise AssertionError("no chat template to change")


def change_config(artifact: Path, kind: str) -> None:
    if artifact.is_file():
        data = artifact.read_bytes()
        assert data.count(b'"rms_norm_eps":1e-06') == 1
        artifact.write_bytes(data.replace(b'"rms_norm_eps":1e-06', b'"rms_norm_eps":1e-05'))
        return
    config = json.loads((artifact / "config.json").read_text())
    config["rms_norm_eps"] = 1e-5
    (artifact / "config.json").write_text(json.dumps(config))
