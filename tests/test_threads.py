"""Blocks of rows by several threads: in order, a bounded number ahead, torch's threads as before."""

from __future__ import annotations

import threading
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from torch.utils._python_dispatch import TorchDispatchMode

from axolotl_bitnet import pack_checkpoint, restore_latents, revert_checkpoint
from axolotl_bitnet.formats.export import open_checkpoint
from axolotl_bitnet.storage import parallel as threads
from axolotl_bitnet.storage.parallel import one_thread, parallel_map, row_ranges
from axolotl_bitnet.verify.contents import compare_tensors
from support import stored


@pytest.fixture(autouse=True, params=[1, 2, 5])
def processors(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> int:
    count: int = request.param
    monkeypatch.setattr(threads.os, "sched_getaffinity", lambda _: set(range(count)), raising=False)
    return count


def test_results_in_order(processors: int) -> None:
    used = set()

    def slow_at_first(item: int) -> int:
        time.sleep(0.02 if item == 0 else 0.001)
        used.add(threading.get_ident())
        return item * item

    assert list(parallel_map(slow_at_first, range(30))) == [item * item for item in range(30)]
    assert len(used) == processors
    assert list(parallel_map(slow_at_first, [])) == []


def test_few_results_wait(processors: int) -> None:
    started: list[int] = []
    results: Iterator[None] = parallel_map(started.append, range(100))
    next(results)
    time.sleep(0.05)
    assert len(started) <= 2 * processors


def test_error_stops_the_work(processors: int) -> None:
    started: list[int] = []
    others = threading.enumerate()

    def fail(item: int) -> None:
        started.append(item)
        if item == 3:
            raise ZeroDivisionError

    with pytest.raises(ZeroDivisionError):
        list(parallel_map(fail, range(100)))
    assert len(started) < 20
    left = [thread for thread in threading.enumerate() if thread not in others]
    assert not [thread for thread in left if thread.name.startswith("ThreadPool")]


def test_a_thread_of_torch_each() -> None:
    torch.set_num_threads(3)
    try:
        inside = set(parallel_map(lambda _: torch.get_num_threads(), range(8)))
        assert inside == {1} or len(threads.os.sched_getaffinity(0)) == 1
        assert torch.get_num_threads() == 3
        with pytest.raises(ZeroDivisionError), one_thread():
            assert torch.get_num_threads() == 1
            raise ZeroDivisionError
        assert torch.get_num_threads() == 3
    finally:
        torch.set_num_threads(1)


class ThreadsOfEachOperation(TorchDispatchMode):
    """What torch's own number of threads is whenever the test's thread computes something."""

    def __init__(self) -> None:
        super().__init__()
        self.seen: set[int] = set()

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        self.seen.add(torch.get_num_threads())
        return func(*args, **(kwargs or {}))


def compare_with_itself(source: Path, _: Path) -> None:
    compare_tensors(open_checkpoint(source), open_checkpoint(source))


@pytest.mark.parametrize(
    "work",
    [
        pack_checkpoint,
        revert_checkpoint,
        restore_latents,
        lambda source, _: open_checkpoint(source).fingerprint(),
        compare_with_itself,
    ],
    ids=["pack", "revert", "restore", "fingerprint", "compare"],
)
def test_torch_has_no_pool_of_its_own(work: Callable[[Path, Path], Any], tmp_path: Path) -> None:
    source = stored.by_hand(tmp_path / "source", {"up": torch.randn(8, 16), "down": torch.randn(16, 8)})
    stored.edit(source, lambda tensors: tensors.update(norm=torch.ones(16)))
    if work is restore_latents:
        source = pack_checkpoint(source, tmp_path / "packed")
    torch.set_num_threads(3)
    try:
        with ThreadsOfEachOperation() as operations:
            work(source, tmp_path / "target")
        assert operations.seen == {1}
        assert torch.get_num_threads() == 3
    finally:
        torch.set_num_threads(1)


@pytest.mark.parametrize(
    ("rows", "columns", "elements"), [(10, 3, 7), (10, 3, 1), (1, 9, 4), (0, 3, 9), (4, 0, 2)]
)
def test_ranges_cover_the_rows(rows: int, columns: int, elements: int) -> None:
    ranges = row_ranges(rows, columns, elements)
    assert [row for start, stop in ranges for row in range(start, stop)] == list(range(rows))
    assert all((stop - start) * columns <= max(elements, columns) for start, stop in ranges)
