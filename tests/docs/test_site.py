"""The site that `make docs` builds: its search knows every page, and finds one in a browser."""

from __future__ import annotations

import functools
import http.server
import importlib.util
import json
import re
import shutil
import subprocess
import sys
import threading
from pathlib import Path

import pytest
from playwright.sync_api import sync_playwright

from page_visits import chromium

ROOT = Path(__file__).parents[2]
# The addresses of all links, those inside the search's own elements too.
LINKS = """() => {
    const found = [], walk = root => {
        root.querySelectorAll('a').forEach(a => found.push(a.href));
        root.querySelectorAll('*').forEach(e => e.shadowRoot && walk(e.shadowRoot));
    };
    walk(document);
    return found;
}"""


class Quiet(http.server.SimpleHTTPRequestHandler):
    """Serves files and says nothing."""

    def log_message(self, *_: object) -> None:
        """Nothing on standard error."""


@pytest.fixture(scope="module")
def site(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Built outside the repository, from what the Makefile copies."""
    if importlib.util.find_spec("zensical") is None or importlib.util.find_spec("mkdocstrings") is None:
        pytest.skip("the packages of `make docs` are not installed")
    work = tmp_path_factory.mktemp("site")
    (listed,) = re.findall(r"^DOCS := \$\(wildcard \*\.md\) (.+)$", (ROOT / "Makefile").read_text(), re.M)
    for name in (*(path.name for path in ROOT.glob("*.md")), *listed.split()):
        target = work / "build" / "docs" / name
        target.parent.mkdir(parents=True, exist_ok=True)
        if (ROOT / name).is_dir():
            shutil.copytree(ROOT / name, target)
        else:
            shutil.copy(ROOT / name, target)
    shutil.copy(ROOT / "mkdocs.yml", work)
    (work / "src").symlink_to(ROOT / "src")
    command = [sys.executable, "-m", "zensical", "build", "--strict", "--clean"]
    done = subprocess.run(command, cwd=work, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stdout + done.stderr
    return work / "build" / "site"


@pytest.mark.slow
def test_the_search_knows_every_page(site: Path) -> None:
    """A reader searches for what a page says, and that page is not among the results."""
    items = json.loads((site / "search.json").read_text(encoding="utf-8"))["items"]
    known = {item["location"].partition("#")[0] for item in items}
    pages = re.findall(r": (\S+)\.md$", (ROOT / "mkdocs.yml").read_text(encoding="utf-8"), re.M)
    places = {re.sub(r"(^|/)README$", r"\1", page).rstrip("/") for page in pages}
    assert len(places) > 40
    assert sorted(places - {place.rstrip("/") for place in known}) == []


@pytest.mark.slow
def test_a_reader_finds_a_page(site: Path) -> None:
    """The search field of the site does nothing."""
    path = chromium()
    handler = functools.partial(Quiet, directory=str(site))
    with http.server.ThreadingHTTPServer(("127.0.0.1", 0), handler) as server:
        thread = threading.Thread(target=server.serve_forever)
        thread.start()
        address = f"http://127.0.0.1:{server.server_address[1]}/"
        try:
            with sync_playwright() as playwright:
                browser = playwright.chromium.launch(executable_path=path, args=["--no-sandbox"])
                page = browser.new_page()
                page.goto(address)
                assert f"{address}docs/shell/#completion" not in page.evaluate(LINKS)
                page.keyboard.press("/")
                page.wait_for_timeout(1000)
                page.keyboard.type("completion fish")
                page.wait_for_function(f"({LINKS})().includes('{address}docs/shell/#completion')")
                browser.close()
        finally:
            server.shutdown()
            thread.join()
