"""The page's files, as a server sends them."""

from __future__ import annotations

import re
from pathlib import Path

import httpx
import pytest

from clipgraft.serve import page
from page_visits import Site

FOLDER = Path(page.__file__).parent
NAMES = sorted(path.name for path in FOLDER.iterdir() if path.is_file() and path.suffix != ".py")


def path_of(name: str) -> str:
    return "/" if name == "index.html" else f"/page/{name}"


@pytest.mark.parametrize("name", NAMES)
def test_each_file_is_sent_once_and_then_known(site: Site, name: str) -> None:
    """A script is missing, an old one is kept after an upgrade, or each visit loads everything anew."""
    first = httpx.get(site.url + path_of(name))
    assert first.status_code == 200
    assert first.content == (FOLDER / name).read_bytes()
    assert first.headers["Cache-Control"] == "no-cache"
    for tag in (first.headers["ETag"], f'"other", W/{first.headers["ETag"]}'):
        again = httpx.get(site.url + path_of(name), headers={"If-None-Match": tag})
        assert (again.status_code, again.content) == (304, b"")
    assert httpx.get(site.url + path_of(name), headers={"If-None-Match": '"old"'}).status_code == 200
    assert httpx.head(site.url + path_of(name)).headers["ETag"] == first.headers["ETag"]
    assert httpx.post(site.url + path_of(name)).status_code == 405


def test_the_browser_may_load_nothing_else(site: Site) -> None:
    """A caption that smuggles in markup runs a script, or tells another host what was searched for."""
    policy = httpx.get(site.url).headers["Content-Security-Policy"]
    rules = dict(rule.split(" ", 1) for rule in policy.split("; "))
    assert rules["default-src"] == "'none'"
    assert {rules["script-src"], rules["style-src"], rules["connect-src"]} == {"'self'"}
    assert "unsafe" not in policy
    markup = (FOLDER / "index.html").read_text(encoding="utf-8")
    assert not re.search(r"<script(?![^>]*\bsrc=)|<style|\sstyle=|\son\w+=|https?://", markup)
    for script in FOLDER.glob("*.js"):
        assert not re.search(
            r"innerHTML|outerHTML|insertAdjacentHTML|document\.write|\beval\(", script.read_text()
        )


def test_files_lie_below_the_address_of_the_page() -> None:
    """Behind a proxy that serves the page at /clip/, everything is looked for at / and not found."""
    markup = (FOLDER / "index.html").read_text(encoding="utf-8")
    assert re.findall(r'(?:src|href)="/', markup) == []
    for script in FOLDER.glob("*.js"):
        assert not re.search(r'"/\w', script.read_text()), script.name
