"""Blocks of rows by several threads: in order, a bounded number ahead, torch's threads as before."""

from __future__ import annotations

import threading
import time
from collections.abc import Iterator

import pytest
import torch

from axolotl_bitnet.checkpoint import threads
from axolotl_bitnet.checkpoint.threads import one_thread, parallel_map, row_ranges


@pytest.fixture(autouse=True, params=[1, 2, 5])
def processors(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> int:
    count: int = request.param
    monkeypatch.setattr(threads.os, "sched_getaffinity", lambda _: set(range(count)))
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


@pytest.mark.parametrize(
    ("rows", "columns", "elements"), [(10, 3, 7), (10, 3, 1), (1, 9, 4), (0, 3, 9), (4, 0, 2)]
)
def test_ranges_cover_the_rows(rows: int, columns: int, elements: int) -> None:
    ranges = row_ranges(rows, columns, elements)
    assert [row for start, stop in ranges for row in range(start, stop)] == list(range(rows))
    assert all((stop - start) * columns <= max(elements, columns) for start, stop in ranges)
