"""The page in a browser: quiet console, no request, both themes, and no sideways scrolling on a telephone."""

from __future__ import annotations

import functools
import http.server
import json
import re
import shutil
import subprocess
import threading
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

import pytest
from PIL import Image, ImageStat

from html_pages import Page

NAMES = ("chromium", "chromium-browser", "google-chrome")
BROWSER = next((found for name in NAMES if (found := shutil.which(name))), None)
DARK = ("--blink-settings=preferredColorScheme=0",)
pytestmark = pytest.mark.skipif(
    BROWSER is None, reason="no chromium to open the page in: apt-get install chromium"
)
PROBE = """<!doctype html><iframe src="report.html" style="width:400px;height:900px;border:0"></iframe>
<script>
onload = () => {
  const inner = document.querySelector("iframe").contentWindow, page = inner.document;
  const root = page.documentElement, style = element => inner.getComputedStyle(element);
  const paper = id => { page.getElementById(id).click(); return style(root).backgroundColor; };
  const ink = () => style(page.querySelector(".chart text")).fill;
  const light = paper("theme-light"), lightInk = ink(), dark = paper("theme-dark"), darkInk = ink();
  const found = {width: root.scrollWidth, light, dark, lightInk, darkInk};
  found.broken = [...page.querySelectorAll("use")].filter(use => use.getBoundingClientRect().width == 0
    && use.closest(".thumb") && !use.closest("details")).length;
  const pre = document.createElement("pre"); pre.id = "found"; pre.textContent = JSON.stringify(found);
  document.body.append(pre);
};
</script>"""


@dataclass(frozen=True)
class Site:
    """A server of one folder, and the paths that were asked of it."""

    url: str
    folder: Path
    asked: list[str]


@pytest.fixture
def site(page: Page, tmp_path: Path) -> Iterator[Site]:
    shutil.copy(page.path, tmp_path / "report.html")
    (tmp_path / "probe.html").write_text(PROBE, encoding="utf-8")
    asked: list[str] = []

    class Handler(http.server.SimpleHTTPRequestHandler):
        def log_message(self, format: str, *values: object) -> None:
            asked.append(self.path)

    handler = functools.partial(Handler, directory=str(tmp_path))
    with http.server.ThreadingHTTPServer(("127.0.0.1", 0), handler) as server:
        thread = threading.Thread(target=server.serve_forever)
        thread.start()
        yield Site(f"http://127.0.0.1:{server.server_port}", tmp_path, asked)
        server.shutdown()
        thread.join()


def browse(site: Site, *words: str) -> subprocess.CompletedProcess[str]:
    """Run the browser headless, with a profile of its own that goes with the test."""
    assert BROWSER is not None
    profile = site.folder / "profile"
    flags = ["--headless", "--no-sandbox", "--disable-gpu", "--hide-scrollbars", f"--user-data-dir={profile}"]
    flags += ["--enable-logging=stderr", "--disable-background-networking", "--no-first-run"]
    return subprocess.run([BROWSER, *flags, *words], capture_output=True, text=True, timeout=120, check=True)


def test_it_opens_quietly(site: Site) -> None:
    """The browser blocks a part of the page, or fetches something for it."""
    done = browse(site, "--dump-dom", f"{site.url}/report.html")
    assert "CONSOLE" not in done.stderr, re.findall(r".*CONSOLE.*", done.stderr)
    assert set(site.asked) <= {"/report.html", "/favicon.ico"}
    assert "What was forgotten" in done.stdout


def test_themes_and_a_narrow_screen(site: Site) -> None:
    """The switch of themes does nothing, charts keep one theme's colours, or a telephone scrolls sideways."""
    done = browse(site, "--dump-dom", f"{site.url}/probe.html")
    match = re.search(r'<pre id="found">(.*?)</pre>', done.stdout)
    assert match is not None
    found = json.loads(match[1])
    assert found["width"] == 400
    assert found["broken"] == 0
    assert found["light"] == "rgb(252, 252, 250)"
    assert found["dark"] == "rgb(22, 24, 27)"
    assert found["lightInk"] != found["darkInk"]


@pytest.mark.parametrize(("flag", "dark"), [((), False), (DARK, True)])
def test_it_follows_the_reader_s_theme(site: Site, flag: tuple[str, ...], dark: bool) -> None:
    """Somebody who works in the dark gets a white page."""
    shot = site.folder / "shot.png"
    browse(site, *flag, "--window-size=900,700", f"--screenshot={shot}", f"{site.url}/report.html")
    with Image.open(shot) as picture:
        mean = ImageStat.Stat(picture.convert("L")).mean[0]
    assert (mean < 80) if dark else (mean > 200)


def test_it_prints(site: Site) -> None:
    """A printed report is empty, one page with the rest cut off, or without what is folded on the screen."""
    text = (site.folder / "report.html").read_text(encoding="utf-8")
    (site.folder / "open.html").write_text(text.replace("<details>", "<details open>"), encoding="utf-8")
    pages = []
    for name in ("report", "open"):
        out = site.folder / f"{name}.pdf"
        browse(site, f"--print-to-pdf={out}", f"{site.url}/{name}.html")
        content = out.read_bytes()
        assert content.startswith(b"%PDF")
        pages.append(len(re.findall(rb"/Type\s*/Page\b", content)))
    assert pages[0] == pages[1] > text.count("<section")
