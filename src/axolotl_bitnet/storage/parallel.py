"""Work on blocks of a tensor in several threads, in order and in bounded memory.

Each thread computes with one thread of torch's own. A pool of OpenMP threads gains little on blocks, and is 3
to 10 times slower (measured) on a machine with other work, because its threads spin while they wait for one
another. torch drops the GIL while it computes, and Python while it reads.
"""

from __future__ import annotations

import os
from collections import deque
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from contextlib import contextmanager
from typing import TypeVar

import torch

Item = TypeVar("Item")
Result = TypeVar("Result")

BLOCK = 1 << 19
"""Elements of a block: its temporaries, some 12 bytes per element, are what a thread needs."""

MOST_THREADS = 8
"""Beyond it a disk is the limit, and the memory of the blocks would be felt."""


@contextmanager
def one_thread() -> Iterator[None]:
    """Within, torch computes in the calling thread alone; for what is done beside :func:`parallel_map`."""
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    try:
        yield
    finally:
        torch.set_num_threads(before)


def row_ranges(rows: int, columns: int, elements: int = BLOCK) -> list[tuple[int, int]]:
    """``(start, stop)`` of blocks of whole rows with at most about ``elements`` elements each."""
    step = max(1, elements // max(1, columns))
    return [(start, min(start + step, rows)) for start in range(0, rows, step)]


def parallel_map(function: Callable[[Item], Result], items: Sequence[Item]) -> Iterator[Result]:
    """``map(function, items)`` by as many threads as there are processors; at most twice as many results are
    kept waiting.

    ``torchrun`` sets OMP_NUM_THREADS to 1 because there are several ranks; packing, which one rank does, does
    not use that number.
    """
    threads = min(_processors(), MOST_THREADS, len(items))
    if threads <= 1:
        yield from map(function, items)
        return
    before = torch.get_num_threads()
    waiting: deque[Future[Result]] = deque()
    with ThreadPoolExecutor(threads, initializer=torch.set_num_threads, initargs=(1,)) as pool:
        try:
            for item in items:
                waiting.append(pool.submit(function, item))
                if len(waiting) >= 2 * threads:
                    yield waiting.popleft().result()
            while waiting:
                yield waiting.popleft().result()
        finally:
            for future in waiting:
                future.cancel()
            torch.set_num_threads(before)  # what threads that start later will take


def _processors() -> int:
    """Processors that this process may use; all there are where the system has no such list (macOS,
    Windows)."""
    affinity = getattr(os, "sched_getaffinity", None)
    return len(affinity(0)) if affinity is not None else os.cpu_count() or 1
