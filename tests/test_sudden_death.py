"""Kill -9 at random moments of the writing of every format: what has the name is whole, and the latents live.

:mod:`test_kills` kills at every change of the disk; this kills wherever the clock says, in the middle of a
write too: `make nightly`.
"""

from __future__ import annotations

import os
import random
import shutil
import signal
import time
from collections.abc import Callable
from pathlib import Path

import pytest
import torch

from axolotl_bitnet.formats.export import export, open_checkpoint
from axolotl_bitnet.formats.registry import Row
from axolotl_bitnet.model.fingerprint import Fingerprint, fingerprint_model
from axolotl_bitnet.storage.atomic import CheckpointError
from support import TINY
from support.stored import Build, contents, trained
from support.zoo import every_format

TRIES = 20
"""For each format, of which there are three at least, twice; half of them are to meet it alive."""


@pytest.fixture(scope="module")
def models(tiny_model: Build, tmp_path_factory: pytest.TempPathFactory) -> list[tuple[Path, Fingerprint]]:
    """The latents of two runs, of some 6 MiB, and what trained."""
    torch.manual_seed(6)
    root, result = tmp_path_factory.mktemp("models"), []
    options = {"vocab_size": 1024, "hidden_size": 256, "intermediate_size": 1024, "num_hidden_layers": 1}
    for name in ("old", "new"):
        model = trained(lambda family, **more: tiny_model(family, **options, **more), "llama")
        model.save_pretrained(root / name, max_shard_size="2MB")  # type: ignore[operator]
        for path in TINY.glob("model/token*"):
            (root / name / path.name).write_bytes(path.read_bytes())
        result.append((root / name, fingerprint_model(model)))
    return result


def killed_after(action: Callable[[], object], seconds: float) -> bool:
    """Whether ``action``, in a child, was killed; else it came to its end before."""
    child = os.fork()
    if child == 0:
        try:
            action()
        except BaseException:
            os._exit(1)
        os._exit(0)
    time.sleep(seconds)
    os.kill(child, signal.SIGKILL)
    _, status = os.waitpid(child, 0)
    assert os.WIFSIGNALED(status) or os.waitstatus_to_exitcode(status) == 0
    return os.WIFSIGNALED(status)


@pytest.mark.nightly
@every_format
@pytest.mark.parametrize("older", [False, True], ids=["no older", "over an older"])
def test_killed_at_random_moments(
    entry: Row, older: bool, models: list[tuple[Path, Fingerprint]], tmp_path: Path
) -> None:
    (old, trained_before), (new, trained_now) = models
    out, clock = tmp_path / "out" / entry.path, random.Random(f"{entry.name} {older}")
    latents = contents(new)
    export(entry.name, new, tmp_path / "imports" / entry.path)
    start = time.perf_counter()
    export(entry.name, old, tmp_path / "first" / entry.path)
    whole = time.perf_counter() - start
    kills = found = 0
    for _ in range(TRIES):
        shutil.rmtree(tmp_path / "out", ignore_errors=True)
        if older:
            shutil.copytree(tmp_path / "first", tmp_path / "out")
        kills += killed_after(
            lambda: export(entry.name, new, out, overwrite=True), clock.uniform(0, 1.1) * whole
        )
        assert contents(new) == latents
        try:
            read = entry.format.open(out).fingerprint()
            found += 1
        except CheckpointError as error:
            assert not out.exists() and str(out) in str(error)
            if older:  # between the two renames: both are there under hidden names
                hidden = [entry.format.open(path).fingerprint() for path in out.parent.glob(f".{out.name}.*")]
                assert trained_before in hidden and trained_now in hidden
        else:
            assert read == trained_now or (older and read == trained_before)
    assert kills >= TRIES // 2
    assert not older or found

    export(entry.name, new, out, overwrite=True)  # the next start
    assert open_checkpoint(out).fingerprint() == trained_now
