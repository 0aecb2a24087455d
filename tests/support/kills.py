"""Kill -9 at every point where a piece of code changes the disk.

The code runs in forked children. The k-th child is killed at the k-th change: before Python opens a file for
writing, renames, removes or makes anything, or halfway through a file that torch.save or safetensors write
(their compiled code is out of sight, so the file is cut in half first).
"""

from __future__ import annotations

import itertools
import os
import signal
import sys
import traceback
from collections.abc import Callable, Iterator
from typing import Any

import safetensors.torch
import torch
import transformers.modeling_utils

_CHANGES = {"os.rename", "os.remove", "os.mkdir", "os.rmdir", "os.truncate"}


def kill_at_every_change(action: Callable[[], Any], under: str) -> Iterator[int]:
    """Run ``action`` in children until one lives to its end; yields after each death, k from 1.

    Only changes to paths that hold the string ``under`` count. The caller puts the disk back in between.
    """
    for k in itertools.count(1):
        child = os.fork()
        if child == 0:
            _arm(k, under)
            try:
                action()
            except BaseException:
                traceback.print_exc()
                os._exit(1)
            os._exit(0)
        _, status = os.waitpid(child, 0)
        if not os.WIFSIGNALED(status):
            assert os.waitstatus_to_exitcode(status) == 0
            return
        assert os.WTERMSIG(status) == signal.SIGKILL
        yield k


def _arm(k: int, under: str) -> None:
    left = k

    def change(path: Any, cut: bool = False) -> None:
        nonlocal left
        if isinstance(path, (str, bytes, os.PathLike)) and under in os.fsdecode(path):
            left -= 1
            if left == 0:
                if cut:
                    os.truncate(path, os.path.getsize(path) // 2)
                os.kill(os.getpid(), signal.SIGKILL)

    def watch(event: str, args: tuple[Any, ...]) -> None:
        if event in _CHANGES or (event == "open" and isinstance(args[2], int) and args[2] & 3):
            change(args[0])

    def halved(save: Callable[..., Any]) -> Callable[..., Any]:
        def save_and_change(what: Any, path: Any, *args: Any, **kwargs: Any) -> Any:
            result = save(what, path, *args, **kwargs)
            change(path, cut=True)
            return result

        return save_and_change

    torch.save = halved(torch.save)
    transformers.modeling_utils.safe_save_file = halved(safetensors.torch.save_file)
    sys.addaudithook(watch)
