"""A real browser for the tests: headless Chromium, driven through the DevTools protocol over two pipes.

No driver and no package is needed, only a Chromium: ``$CHROMIUM``, or one on PATH.
"""

from __future__ import annotations

import base64
import fcntl
import json
import os
import select
import shutil
import signal
import time
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

_NAMES = ("chromium", "chromium-headless-shell", "google-chrome", "google-chrome-stable", "chromium-browser")
_FLAGS = (
    "--headless",
    "--no-sandbox",  # what it opens is our own; and root, as in a container, gets no sandbox
    "--no-first-run",
    "--no-zygote",
    "--disable-gpu",
    "--disable-dev-shm-usage",
    "--hide-scrollbars",  # as on a phone
    "--remote-debugging-pipe",  # fd 3 and fd 4
)


def find() -> str | None:
    """The Chromium of this machine, if it has one."""
    named = os.environ.get("CHROMIUM")
    return named or next(filter(None, map(shutil.which, _NAMES)), None)


@dataclass
class Visit:
    """What a browser saw of one page."""

    requests: list[str] = field(default_factory=list)
    complaints: list[str] = field(default_factory=list)
    values: dict[str, Any] = field(default_factory=dict)


class Browser:
    """One tab. Every call waits at most ``patience`` seconds."""

    def __init__(self, write: int, read: int, patience: float = 60) -> None:
        self._write, self._read, self._patience = write, read, patience
        self._buffer, self._last = b"", 0
        self._events: list[dict[str, Any]] = []
        self._session: str | None = None
        target = self._call("Target.createTarget", url="about:blank")["targetId"]
        self._session = self._call("Target.attachToTarget", targetId=target, flatten=True)["sessionId"]
        for domain in ("Page", "Runtime", "Network", "Log"):
            self._call(f"{domain}.enable")

    def visit(
        self,
        page: Path,
        width: int,
        height: int,
        ask: dict[str, str],
        dark: bool = False,
        shot: Path | None = None,
    ) -> Visit:
        """Open a file and evaluate the JavaScript expressions of ``ask`` in it.

        Args:
            page: the file.
            width, height: of the window, in CSS pixels; below 500 it says it is a phone.
            ask: expressions by name; promises are awaited.
            dark: what it answers to ``prefers-color-scheme``.
            shot: where to keep a picture of the window (PNG).
        """
        self._events.clear()
        scheme = [{"name": "prefers-color-scheme", "value": "dark" if dark else "light"}]
        self._call("Emulation.setEmulatedMedia", features=scheme)
        self._call(
            "Emulation.setDeviceMetricsOverride",
            width=width,
            height=height,
            deviceScaleFactor=2 if width < 500 else 1,
            mobile=width < 500,
        )
        self._call("Page.navigate", url=page.resolve().as_uri())
        while not any(event["method"] == "Page.loadEventFired" for event in self._events):
            self._events.append(self._receive())
        seen = Visit()
        for name, expression in ask.items():
            result = self._call(
                "Runtime.evaluate", expression=expression, returnByValue=True, awaitPromise=True
            )
            assert "exceptionDetails" not in result, result
            seen.values[name] = result["result"].get("value")
        if shot is not None:
            picture = self._call("Page.captureScreenshot", format="png")
            shot.write_bytes(base64.b64decode(picture["data"]))
        for event in self._events:
            method, parameters = event["method"], event["params"]
            if method == "Network.requestWillBeSent":
                seen.requests.append(parameters["request"]["url"])
            elif method in ("Runtime.consoleAPICalled", "Runtime.exceptionThrown", "Log.entryAdded"):
                seen.complaints.append(json.dumps(parameters))
        return seen

    def _call(self, method: str, **parameters: Any) -> dict[str, Any]:
        self._last += 1
        message: dict[str, Any] = {"id": self._last, "method": method, "params": parameters}
        if self._session:
            message["sessionId"] = self._session
        os.write(self._write, json.dumps(message).encode() + b"\0")
        while True:
            answer = self._receive()
            if answer.get("id") == self._last:
                assert "error" not in answer, f"{method}: {answer}"
                return answer["result"]
            if "method" in answer:
                self._events.append(answer)

    def _receive(self) -> dict[str, Any]:
        end = time.monotonic() + self._patience
        while b"\0" not in self._buffer:
            ready, _, _ = select.select([self._read], [], [], max(0.0, end - time.monotonic()))
            data = os.read(self._read, 1 << 20) if ready else b""
            if not data:
                raise TimeoutError("the browser does not answer")
            self._buffer += data
        message, self._buffer = self._buffer.split(b"\0", 1)
        return json.loads(message)


@contextmanager
def chromium(program: str, profile: Path) -> Iterator[Browser]:
    """A browser with a profile of its own, ended with the body."""
    pipes = [*os.pipe(), *os.pipe()]
    its_read, write, read, its_write = (fcntl.fcntl(fd, fcntl.F_DUPFD_CLOEXEC, 10) for fd in pipes)
    for fd in pipes:
        os.close(fd)
    actions = [
        (os.POSIX_SPAWN_DUP2, its_read, 3),
        (os.POSIX_SPAWN_DUP2, its_write, 4),
        (os.POSIX_SPAWN_OPEN, 2, os.devnull, os.O_WRONLY, 0),
    ]
    command = [program, *_FLAGS, f"--user-data-dir={profile}", "about:blank"]
    process = os.posix_spawnp(program, command, dict(os.environ), file_actions=actions)
    os.close(its_read)
    os.close(its_write)
    try:
        yield Browser(write, read)
    finally:
        os.kill(process, signal.SIGKILL)
        os.waitpid(process, 0)
        os.close(write)
        os.close(read)
