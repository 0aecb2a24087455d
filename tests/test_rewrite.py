"""What the folder formats share: little memory, whole folders, no source lost."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch

from axolotl_bitnet.formats.dense import DenseFormat
from axolotl_bitnet.formats.export import open_checkpoint, pack_checkpoint
from axolotl_bitnet.model.entry import CONFIG_KEY
from axolotl_bitnet.storage.atomic import CheckpointError, write_json
from axolotl_bitnet.storage.safetensors_stream import SINGLE, Entry, SafetensorsWriter
from support.processes import python
from support.stored import by_hand

MEMORY = """
import sys
import torch
from axolotl_bitnet.formats.export import export_mlx, revert_checkpoint
from axolotl_bitnet.formats.restore import restore_latents
function, source, target = sys.argv[1:]

def status(key):
    lines = open("/proc/self/status").read().splitlines()
    return next(int(line.split()[1]) * 1024 for line in lines if line.startswith(key))

torch.set_num_threads(2)
before = status("VmRSS")
globals()[function](source, target)
print(status("VmHWM") - before)  # the peak of this process; ru_maxrss would start from its parent's
"""
SIDE, LAYERS = 4096, 6
WRITERS = ["revert_checkpoint", "export_mlx", "restore_latents"]


@pytest.fixture(scope="module")
def large(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Six ternary and three dense matrices of 16 Mi elements, packed."""
    torch.manual_seed(3)
    root = tmp_path_factory.mktemp("large")
    matrix = torch.randn(SIDE, SIDE, dtype=torch.bfloat16)
    layers = [f"model.layers.{index}.proj" for index in range(LAYERS)]
    names = [f"dense.{index}.weight" for index in range(3)] + [f"{layer}.weight" for layer in layers]
    (root / "latents").mkdir()
    with SafetensorsWriter(
        root / "latents" / SINGLE, [Entry(name, matrix.dtype, matrix.shape) for name in names]
    ) as writer:
        for name in names:
            writer.write(name, matrix)
    write_json(root / "latents" / "config.json", {CONFIG_KEY: {"converted": layers, "dense": ["lm_head"]}})
    return pack_checkpoint(root / "latents", root / "packed")


@pytest.mark.once
@pytest.mark.slow
@pytest.mark.skipif(not Path("/proc/self/status").exists(), reason="peak memory is read from /proc")
@pytest.mark.parametrize("function", WRITERS)
def test_writing_needs_little_memory(large: Path, tmp_path: Path, function: str) -> None:
    """Twice the largest tensor and some slack."""
    done = python("-c", MEMORY, function, large, tmp_path / "out")
    peak, largest = int(done.stdout), SIDE * SIDE * 2
    print(f"{function}: peak {peak / 2**20:.0f} MiB, largest {largest / 2**20:.0f} MiB")
    assert largest / 8 < peak, "nothing was measured"
    assert peak < 2 * largest + 300 * 2**20
    written, source = open_checkpoint(tmp_path / "out"), open_checkpoint(large)
    assert (
        written.fingerprint().tensors[f"model.layers.{LAYERS - 1}.proj"]
        == (source.fingerprint().tensors[f"model.layers.{LAYERS - 1}.proj"])
    )


class Wrong(DenseFormat):
    """Announces one tensor, and writes none."""

    def entries(self, weight: Entry) -> list[Entry]:
        return [Entry(weight.name, torch.int8, weight.shape)]

    def tensors(self, weight: Entry, codes: torch.Tensor, s: torch.Tensor) -> list[torch.Tensor]:
        raise ValueError("no room for it")


def test_a_layout_that_cannot(tmp_path: Path) -> None:
    source = open_checkpoint(by_hand(tmp_path / "latents", {"a": torch.randn(4, 4)}))
    with pytest.raises(CheckpointError, match=r"latents: 'a\.weight': no room for it"):
        Wrong().write(source, tmp_path / "out")
    assert [path.name for path in tmp_path.iterdir()] == ["latents"]


class TooNarrow(Wrong):
    def entries(self, weight: Entry) -> list[Entry]:
        raise ValueError(f"has {weight.shape[1]} columns, and that is too few")


def test_a_weight_that_no_layout_holds_is_refused_before_anything_is_written(tmp_path: Path) -> None:
    source = open_checkpoint(by_hand(tmp_path / "latents", {"a": torch.randn(4, 4)}))
    with pytest.raises(CheckpointError, match=r"latents: 'a\.weight' has 4 columns, and that is too few"):
        TooNarrow().write(source, tmp_path / "out")
    assert [path.name for path in tmp_path.iterdir()] == ["latents"]
