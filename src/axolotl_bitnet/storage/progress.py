"""Progress of long work. A writer or reader announces it here; a listener shows it.

Without a listener it costs nothing, and no writer has to pass a callback on.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from contextvars import ContextVar

Advance = Callable[[int], None]
"""Takes the number of bytes done since it was last called, from any thread."""

Listener = Callable[[str, int], Advance]
"""Takes what begins ("writing model.safetensors") and its size in bytes."""

_LISTENER: ContextVar[Listener | None] = ContextVar("listener", default=None)


@contextmanager
def listening(listener: Listener) -> Iterator[None]:
    """Within, ``listener`` is called for every work that begins."""
    token = _LISTENER.set(listener)
    try:
        yield
    finally:
        _LISTENER.reset(token)


def begin(what: str, total: int) -> Advance:
    """Announce work of ``total`` bytes; returns what to call as they are done."""
    listener = _LISTENER.get()
    return listener(what, total) if listener is not None else _unheard


def _unheard(count: int) -> None:
    pass
