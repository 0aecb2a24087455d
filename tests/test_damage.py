"""Damaged artifacts, by the hundred: whatever is wrong with a file, the commands end with an exit status and
a sentence, never a traceback, and leave no target behind.

The damage is drawn from a seed: bytes flipped, files cut and grown, values of the JSON files replaced. A case
that fails says its number; ``damaged(number)`` makes it again.
"""

from __future__ import annotations

import json
import os
import random
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from click.testing import CliRunner
from torch import nn

from axolotl_bitnet.cli.main import main
from support.marks import slow_but
from support.zoo import MADE, copy_of, make_run

KINDS = ["latents", *MADE]
CASES = int(os.environ.get("AXOLOTL_BITNET_DAMAGES", "25"))
"""A kind; more of them by hand."""

pytestmark = pytest.mark.once

VALUES: list[Any] = [None, True, -1, 0, 1e309, 2**70, "", "../x", [], {}, [[]], {"a": {}}, "bitnet", 3.5]


@pytest.fixture(scope="module")
def run(tiny_model: Callable[..., nn.Module], tmp_path_factory: pytest.TempPathFactory) -> Path:
    return make_run(tiny_model, tmp_path_factory.mktemp("damage"))


def places(value: Any, path: tuple[Any, ...] = ()) -> list[tuple[Any, ...]]:
    """Where something can be replaced in a JSON value."""
    inside = value.items() if isinstance(value, dict) else enumerate(value) if isinstance(value, list) else ()
    return [path] * bool(path) + [place for key, each in inside for place in places(each, (*path, key))]


def replace_value(file: Path, rng: random.Random) -> str:
    data = json.loads(file.read_text(encoding="utf-8"))
    *path, last = rng.choice(places(data))
    inner = data
    for key in path:
        inner = inner[key]
    inner[last] = new = rng.choice(VALUES)
    file.write_text(json.dumps(data), encoding="utf-8")
    return f"{file.name}: {[*path, last]} = {new!r}"


def hurt(file: Path, rng: random.Random) -> str:
    if file.suffix == ".json" and rng.random() < 0.6:
        return replace_value(file, rng)
    data = bytearray(file.read_bytes())
    how = rng.choice(["flip", "flip", "cut", "grow"])
    header = min(len(data), 4000)  # where most can go wrong
    at = rng.randrange(header if rng.random() < 0.7 else len(data))
    if how == "flip":
        for _ in range(rng.choice([1, 4, 64])):
            data[min(at + rng.randrange(64), len(data) - 1)] ^= 1 << rng.randrange(8)
    elif how == "cut":
        del data[at:]
    else:
        data += rng.randbytes(rng.choice([1, 100, 5000]))
    file.write_bytes(bytes(data))
    return f"{file.name}: {how} at {at}"


def damaged(run: Path, kind: str, number: int, folder: Path) -> tuple[Path, str]:
    rng = random.Random(f"{kind} {number}")
    artifact, _ = copy_of(run, kind, folder)
    files = (
        [artifact] if artifact.is_file() else sorted(path for path in artifact.iterdir() if path.is_file())
    )
    weights = [
        path for path in files if path.suffix in (".safetensors", ".gguf") or path.name == "config.json"
    ]
    return artifact, hurt(rng.choice(weights if rng.random() < 0.8 else files), rng)


@pytest.mark.parametrize("kind", slow_but(1, KINDS))
def test_damage_ends_in_a_sentence(run: Path, tmp_path: Path, kind: str) -> None:
    found = {0: 0, 1: 0, 2: 0}
    for number in range(CASES):
        folder = tmp_path / str(number)
        folder.mkdir()
        artifact, what = damaged(run, kind, number, folder)
        target = folder / "restored"
        for command in (
            ["inspect", str(artifact), "--json"],
            ["verify", str(artifact), "--against", str(run), "--no-run"],
            ["restore", str(artifact), str(target)],
        ):
            done = CliRunner().invoke(main, command)
            told = f"{kind} {number}, {what}, {command[0]}"
            if done.exception is not None and not isinstance(done.exception, SystemExit):
                raise AssertionError(f"{told}: {done.exception!r}") from done.exception
            assert done.exit_code in found, told
            assert done.output.strip(), told
            found[done.exit_code] += 1
            if done.exit_code:
                assert not target.exists(), told
        left = {path.name for path in folder.iterdir()} - {artifact.name, "restored"}
        assert not left, f"{kind} {number}: {left} left behind"
        shutil.rmtree(folder)
    print(f"{kind}: {CASES} damages, exit statuses {found}")
    assert found[2] and (found[0] or found[1]), "the damage is all of one kind"
