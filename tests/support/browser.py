"""A real browser for the tests: headless Chromium, driven by Playwright.

Playwright brings the driver and no browser: the Chromium is ``$CHROMIUM``, or one on PATH.
"""

from __future__ import annotations

import os
import shutil
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from playwright.sync_api import Browser, sync_playwright

_NAMES = ("chromium", "chromium-headless-shell", "google-chrome", "google-chrome-stable", "chromium-browser")
_FLAGS = ["--no-sandbox", "--no-zygote", "--disable-gpu"]  # root, as in a container, gets no sandbox


def find() -> str | None:
    """The Chromium of this machine, if it has one."""
    named = os.environ.get("CHROMIUM")
    return named or next(filter(None, map(shutil.which, _NAMES)), None)


@contextmanager
def chromium(program: str) -> Iterator[Browser]:
    with sync_playwright() as driver:
        browser = driver.chromium.launch(executable_path=program, args=_FLAGS)
        try:
            yield browser
        finally:
            browser.close()


@dataclass
class Visit:
    """What a browser saw of one page."""

    requests: list[str] = field(default_factory=list)
    complaints: list[str] = field(default_factory=list)
    values: dict[str, Any] = field(default_factory=dict)


def visit(
    browser: Browser,
    page: Path,
    width: int,
    height: int,
    ask: dict[str, str],
    dark: bool = False,
    shot: Path | None = None,
) -> Visit:
    """Open a file and evaluate the JavaScript expressions of ``ask`` in it.

    Args:
        browser: it gets a new tab, which is closed at the end.
        page: the file.
        width, height: of the window, in CSS pixels; below 500 it says it is a phone.
        ask: expressions by name; promises are awaited.
        dark: what it answers to ``prefers-color-scheme``.
        shot: where to keep a picture of the window (PNG).
    """
    phone, seen = width < 500, Visit()
    tab = browser.new_page(
        viewport={"width": width, "height": height},
        device_scale_factor=2 if phone else 1,
        is_mobile=phone,
        color_scheme="dark" if dark else "light",
    )
    try:
        tab.on("request", lambda request: seen.requests.append(request.url))
        tab.on("console", lambda message: seen.complaints.append(message.text))
        tab.on("pageerror", lambda error: seen.complaints.append(str(error)))
        tab.goto(page.resolve().as_uri())
        seen.values = {name: tab.evaluate(expression) for name, expression in ask.items()}
        if shot is not None:
            tab.screenshot(path=shot)
    finally:
        tab.close()
    return seen
