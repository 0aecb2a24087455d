"""The arithmetic of artifacts' sizes, compared with artifacts."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path

import pytest
import torch

from axolotl_bitnet.formats.registry import FORMATS
from axolotl_bitnet.formats.sizes import artifact_bytes
from axolotl_bitnet.model.outline import outline_of
from axolotl_bitnet.storage.safetensors_stream import CheckpointReader
from support.zoo import MADE, make_run


@pytest.fixture(scope="module", params=[False, True], ids=["head", "tied"])
def run(
    request: pytest.FixtureRequest,
    tiny_model: Callable[..., torch.nn.Module],
    tmp_path_factory: pytest.TempPathFactory,
) -> Path:
    folder = tmp_path_factory.mktemp("sizes") / "run"
    return make_run(tiny_model, folder, tie_word_embeddings=request.param)


def test_the_tensors_of_each_artifact_are_as_large_as_told(run: Path) -> None:
    outline, problems = outline_of(json.loads((run / "config.json").read_text()))
    assert problems == []
    told = artifact_bytes(outline, MADE, latent_bytes=4)
    assert told.keys() == {"latents", *MADE}
    for name, expected in told.items():
        path = run if name == "latents" else run / FORMATS[name].path
        if path.is_dir():
            entries = CheckpointReader(path).entries.values()
            count = sum(entry.dtype.itemsize * torch.Size(entry.shape).numel() for entry in entries)
            assert count == pytest.approx(expected, rel=0.005), name
        else:  # a header and a vocabulary come first
            assert 0 <= path.stat().st_size - expected < 100_000, name


def test_what_is_not_known_is_left_out(run: Path) -> None:
    outline, _ = outline_of(json.loads((run / "config.json").read_text()))
    assert artifact_bytes(outline, ["something"], 2) == {"latents": 2 * outline.parameters}
