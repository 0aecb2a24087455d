from __future__ import annotations

from importlib.util import find_spec
from pathlib import Path

import pytest

pytest.importorskip("playwright")

from axolotl_bitnet.report import write_report
from support import browser, reports

pytestmark = [
    pytest.mark.once,
    pytest.mark.skipif(find_spec("matplotlib") is None, reason="matplotlib is not installed"),
]


in_a_browser = pytest.mark.skipif(
    browser.find() is None, reason="no Chromium: CHROMIUM=$(scripts/browser.sh) installs and names one"
)
LOOK = {
    "title": "document.title",
    "width": "[document.scrollingElement.scrollWidth, innerWidth]",
    "outside": "[...document.querySelectorAll('body *')].filter(e => !e.closest('svg') &&"
    " e.getBoundingClientRect().right > WIDTH + 0.5).map(e => e.outerHTML.slice(0, 200))",
    "pictures": "[...document.querySelectorAll('svg')].map(e => [e.clientWidth, e.clientHeight])",
    "images": "Promise.all([...document.images].map(i => i.decode().then(() => i.naturalWidth > 0)))",
    "background": "getComputedStyle(document.body).backgroundColor",
    "line": "getComputedStyle(document.querySelector('#loss path[style*=\"--s0\"]')).stroke",
    "open": "document.querySelectorAll('details').forEach(d => d.open = true)",
    "width_open": "[document.scrollingElement.scrollWidth, innerWidth]",
}


@pytest.mark.slow
@in_a_browser
def test_in_a_browser(tmp_path: Path) -> None:
    long = "a-name-that-has-no-place-to-break-" * 6
    layers = [*reports.names(24), f"model.layers.24.mlp.{long}"]
    run = reports.record(
        reports.log(), config={"base_model": f"org/{long}", long: long}, versions={long[:30]: long}
    )
    folder = reports.write(
        tmp_path / "a <b>bold name", run=run, bitnet=reports.proof(layers), monitor=reports.moved(layers)
    )
    written = write_report(folder)
    seen = {}
    with browser.chromium(str(browser.find())) as chromium:
        for width, dark in ((360, False), (360, True), (1280, False), (1280, True)):
            ask = {name: script.replace("WIDTH", str(width)) for name, script in LOOK.items()}
            visit = browser.visit(chromium, written, width, 800, ask, dark)
            seen[width, dark] = visit.values
            assert visit.requests == [written.resolve().as_uri()]
            assert not visit.complaints
            assert visit.values["title"] == "a <b>bold name · ternary training report"
            assert visit.values["width"] == [width, width] and visit.values["width_open"] == [width, width]
            assert visit.values["outside"] == [] and all(visit.values["images"])
            assert len(visit.values["pictures"]) == 13
            assert all(w > 250 and h > 90 for w, h in visit.values["pictures"])
    for what in ("background", "line"):
        assert seen[360, False][what] != seen[360, True][what], "one theme for light and dark"


@in_a_browser
def test_the_browser_notices(tmp_path: Path) -> None:
    """What the test above must notice: a page that does what it must not."""
    bad = tmp_path / "bad.html"
    bad.write_text(
        "<meta name=viewport content='width=device-width'><title>x</title><p style='width: 900px'>wide</p>"
        "<img src='missing.png'>"
        "<script>console.error('no'); fetch('http://127.0.0.1:9/x').catch(() => 0)</script>"
    )
    ask = {"width": LOOK["width"], "outside": LOOK["outside"].replace("WIDTH", "360")}
    with browser.chromium(str(browser.find())) as chromium:
        visit = browser.visit(chromium, bad, 360, 800, ask)
    assert visit.values["width"][0] >= 900 and visit.values["outside"]
    assert len(visit.requests) == 3 and "no" in visit.complaints
