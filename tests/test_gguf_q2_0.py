"""GGUF's Q2_0: its bytes one by one, the way back, and other types of that name. That llama.cpp runs it is
tested in tests/test_gguf_llamacpp.py, that it is verified and restored where every format is."""

from __future__ import annotations

import struct
from pathlib import Path

import numpy as np
import pytest
import torch
from torch import Tensor

from axolotl_bitnet.formats.export import export_gguf
from axolotl_bitnet.formats.gguf.q2_0 import decode, encode
from axolotl_bitnet.formats.gguf.reader import GGUFCheckpoint
from axolotl_bitnet.formats.gguf.ternary_type import scale_from_fp16, scale_to_fp16
from axolotl_bitnet.formats.latent import LatentCheckpoint
from axolotl_bitnet.storage.atomic import CheckpointError
from axolotl_bitnet.ternary import scale_of
from support.llamas import VARIANTS, build, save

pytest.importorskip("gguf")


def values(packed: np.ndarray) -> np.ndarray:
    """What llama.cpp makes of a row of blocks: d, then 16 bytes, low bits first, (code - 1) d."""
    row = []
    for block in packed.reshape(-1, 18):
        (d,) = struct.unpack("<e", block[:2].tobytes())
        row += [(int(byte) >> shift & 3) * d - d for byte in block[2:] for shift in (0, 2, 4, 6)]
    return np.array(row, dtype=np.float64)


@pytest.mark.parametrize("shape", [(1, 64), (3, 128), (5, 576), (17, 1344)])
def test_blocks_are_llama_cpp_s(shape: tuple[int, int]) -> None:
    codes = torch.randint(-1, 2, shape, dtype=torch.int8)
    s = scale_of(torch.rand(()) * 3)
    packed = encode(codes, scale_to_fp16(s))
    assert packed.shape == (shape[0], shape[1] // 64 * 18)
    for row, bytes in zip(codes, packed, strict=True):
        assert np.array_equal(values(bytes.numpy()), row.numpy() * float(scale_to_fp16(s)))
    back, d = decode(packed)
    assert torch.equal(back, codes) and d.shape == (shape[0], shape[1] // 64)
    assert torch.equal(scale_from_fp16(d.reshape(-1)), s.expand(d.numel()))


def test_blocks_of_zeros_have_the_scale_too() -> None:
    codes, d = decode(encode(torch.zeros(2, 128, dtype=torch.int8), torch.tensor([0.125]).half()))
    assert not codes.any() and d.tolist() == [[0.125, 0.125]] * 2


def test_a_code_of_2_is_refused() -> None:
    packed = encode(torch.zeros(1, 64, dtype=torch.int8), torch.tensor([1.0]).half())
    packed[0, 7] |= 3 << 4
    with pytest.raises(ValueError, match="a code of 2"):
        decode(packed)


@pytest.mark.parametrize("variant", ["llama", "tied", "biases", "no multiple of 256", "qwen2", "qwen3"])
def test_a_file_is_the_model(tmp_path: Path, variant: str) -> None:
    family, options = VARIANTS[variant]
    source = LatentCheckpoint(save(build(family, **options), tmp_path / "latents"))
    found = GGUFCheckpoint(export_gguf(source.folder, tmp_path / "model.gguf", "q2_0"))
    assert found.fingerprint() == source.fingerprint() and found.config == source.config
    kinds = {found.kind(key) for key in found.keys.values()}
    assert kinds == {"Q2_0"}  # rows of 192 and 320 too, where TQ2_0 falls back to F16


def described(file: Path, kind: int) -> bytearray:
    """The file, with ``kind`` as the type of the tensor blk.0.attn_q.weight."""
    data = bytearray(file.read_bytes())
    name = b"blk.0.attn_q.weight"
    at = data.index(name) + len(name) + 4 + 2 * 8
    assert struct.unpack_from("<I", data, at) == (42,)
    struct.pack_into("<I", data, at, kind)
    return data


@pytest.mark.parametrize(("kind", "name"), [(142, "PQ2_0"), (143, "PTQ1_0")])
def test_a_fork_s_types_are_refused_by_name(tmp_path: Path, kind: int, name: str) -> None:
    file = export_gguf(save(build(), tmp_path / "latents"), tmp_path / "model.gguf", "q2_0")
    file.write_bytes(described(file, kind))
    with pytest.raises(CheckpointError, match=rf"attn_q\.weight' has type {kind} \({name}"):
        GGUFCheckpoint(file)


def shrunk(packed: Tensor) -> Tensor:
    """Rows of blocks of 64 as rows of blocks of 128: a d, 32 bytes."""
    pairs = packed.reshape(packed.shape[0], -1, 2, 18)
    return torch.cat([pairs[:, :, 0, :], pairs[:, :, 1, 2:]], dim=-1).reshape(packed.shape[0], -1)


def test_blocks_of_128_are_told_apart_and_refused(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    from dataclasses import replace

    from axolotl_bitnet.formats.gguf import q2_0

    source = save(build(), tmp_path / "latents")
    older = replace(q2_0.Q2_0.type, block=128, nbytes=34, encode=lambda codes, d: shrunk(encode(codes, d)))
    with monkeypatch.context() as patch:
        patch.setattr(q2_0, "Q2_0", replace(q2_0.Q2_0, type=older))
        file = export_gguf(source, tmp_path / "older.gguf", "q2_0")
    with pytest.raises(CheckpointError, match=r"an older Q2_0 \(type 42 with blocks of 128 codes\)"):
        GGUFCheckpoint(file)


def test_a_file_that_was_cut_short_is_not_taken_for_an_older_one(tmp_path: Path) -> None:
    file = export_gguf(save(build(), tmp_path / "latents"), tmp_path / "model.gguf", "q2_0")
    file.write_bytes(file.read_bytes()[:-40_000])
    with pytest.raises(CheckpointError, match="cut short"):
        GGUFCheckpoint(file)
