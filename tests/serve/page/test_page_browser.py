"""The page in a browser, over a real model: search, compare, classify, keys, keyboard, telephone, faults."""

from __future__ import annotations

import base64
import json
import re
from collections.abc import Iterator
from pathlib import Path

import pytest
from playwright.sync_api import Browser, Locator, Page, expect, sync_playwright

import clipgraft as cg
from clipgraft.errors import OverloadedError, UnavailableError
from clipgraft.serve.api import create_app
from clipgraft.serve.args import ServiceArgs, WebArgs
from clipgraft.serve.messages import Classify, Describe, Search, Thumbnail
from clipgraft.serve.service import Service
from page_visits import Between, Site, chromium
from served_app import running

FIRST = 12
DROP = """([content, name, type]) => {
  const bytes = Uint8Array.from(atob(content), letter => letter.charCodeAt(0));
  const transfer = new DataTransfer();
  transfer.items.add(new File([bytes], name, {type}));
  const given = {dataTransfer: transfer, bubbles: true, cancelable: true};
  document.dispatchEvent(new DragEvent("dragover", given));
  document.dispatchEvent(new DragEvent("drop", given));
}"""


# Of this module, not of the session: while Playwright runs, no other test of the thread could start a loop.
@pytest.fixture(scope="module")
def browser() -> Iterator[Browser]:
    with sync_playwright() as playwright:
        launched = playwright.chromium.launch(executable_path=chromium(), args=["--no-sandbox"])
        yield launched
        launched.close()


class Visit:
    """A page of its own, and what it must not do."""

    def __init__(self, browser: Browser, url: str, **options: object) -> None:
        self.context = browser.new_context(**options)  # type: ignore[arg-type]
        self.page = self.context.new_page()
        self.asked: list[str] = []
        self.faults: list[str] = []
        self.page.set_default_timeout(20_000)
        self.page.on("request", lambda request: self.asked.append(request.url))
        self.page.on("console", lambda message: self._told(message.type, message.text))
        self.page.on("pageerror", lambda error: self.faults.append(str(error)))
        self.url = url
        self.page.goto(url)

    def _told(self, kind: str, text: str) -> None:
        # A browser writes every answer of 4xx and 5xx to its console, handled or not.
        if kind in ("error", "warning") and not text.startswith("Failed to load resource"):
            self.faults.append(text)

    def close(self) -> None:
        self.context.close()
        assert self.faults == []
        assert [url for url in self.asked if not url.startswith((self.url, "blob:" + self.url))] == []


@pytest.fixture
def visit(browser: Browser, site: Site) -> Iterator[Page]:
    """The page on a desk."""
    made = Visit(browser, site.url, viewport={"width": 1280, "height": 900})
    expect(made.page.locator("#main")).to_be_visible()
    yield made.page
    made.close()


def search(page: Page, text: str) -> None:
    page.locator("#text").fill(text)
    page.keyboard.press("Enter")
    expect(page.locator(".hit").first).to_be_visible()


def column(page: Page, title: str) -> Locator:
    return page.locator(f".column[data-title='{title}']:visible")


def settled(page: Page, title: str = "emoji", shown: int = FIRST) -> list[str]:
    """The scores of a column, once it has all its results and asks for nothing."""
    expect(page.locator(".column[aria-busy=true]")).to_have_count(0)
    expect(column(page, title).locator(".hit")).to_have_count(shown)
    return column(page, title).locator(".line > span:first-of-type").all_inner_texts()


def offline(scenes: Path, text: str | None = None, **options: object) -> list[str]:
    hits = cg.search.query(scenes / "encoded", text, model=cg.load("emoji"), k=FIRST, **options)  # type: ignore[arg-type]
    return [f"{hit.score:.3f}" for hit in hits]


def test_search_by_text(visit: Page, scenes: Path) -> None:
    """The search page finds something else than `clipgraft search`, or shows no pictures of it."""
    search(visit, "a cat")
    assert settled(visit) == offline(scenes, "a cat")
    for image in visit.locator(".hit img").all()[:4]:
        expect(image).to_have_attribute("src", re.compile("^blob:"))
    expect(visit.locator("#said")).to_have_text("emoji: 12 results")
    visit.get_by_role("button", name="Show more").click()
    settled(visit, shown=24)


def test_search_by_a_dropped_picture(visit: Page, site: Site, scenes: Path) -> None:
    """A dropped picture replaces the page, or finds other things than `clipgraft search` does."""
    picture = site.pictures / "val_00003.png"
    drop(visit, picture.read_bytes(), "mine.png", "image/png")
    assert settled(visit) == offline(scenes, image=picture)
    expect(visit.locator("#picture-name")).to_have_text("mine.png")
    visit.locator("#text").fill("a cat")
    visit.locator("#weight").fill("0.25")
    visit.locator("#text").press("Enter")
    expect(visit.locator(".hit b").first).to_have_text("1")
    assert settled(visit) == offline(scenes, "a cat", image=picture, image_weight=0.25)
    visit.get_by_role("button", name="Remove the picture").click()
    assert settled(visit) == offline(scenes, "a cat")


def drop(page: Page, content: bytes, name: str, kind: str) -> None:
    page.evaluate(DROP, [base64.b64encode(content).decode(), name, kind])
    expect(page.locator("#dropping")).to_be_hidden()


def test_pictures_that_cannot_be_used(visit: Page) -> None:
    """Somebody drops a text or a file that is too large, and nothing is said."""
    drop(visit, b"hello", "a.txt", "text/plain")
    expect(visit.locator("#query-fault")).to_contain_text("not a picture")
    drop(visit, b"\0" * 250_000, "large.png", "image/png")
    expect(visit.locator("#query-fault")).to_contain_text("large.png has 250 kB, more than this server takes")
    drop(visit, b"no picture at all", "broken.png", "image/png")
    expect(visit.locator("#query-fault")).to_be_hidden()
    expect(visit.locator(".column .note.fault")).to_contain_text("`image`")


def test_side_by_side_with_strength(visit: Page, site: Site, adapters: dict[str, Path], scenes: Path) -> None:
    """Columns show each other's results, the slider does nothing, or an adapter's fault hides the others."""
    search(visit, "a cat")
    visit.get_by_label("Adapter 1", exact=True).select_option("vi")
    visit.get_by_label("Adapter 2", exact=True).select_option("fr")
    base = settled(visit)
    for name in ("vi", "fr"):
        clip = cg.load("emoji")
        cg.load_adapter(clip, adapters[name], name=name)
        hits = cg.search.query(scenes / "encoded", "a cat", model=clip, k=FIRST)
        assert settled(visit, name) == [f"{hit.score:.3f}" for hit in hits] != base
    marks = column(visit, "vi").locator(".moved")
    expect(marks).to_have_count(FIRST)
    slider = visit.get_by_label("Strength of adapter 1")
    slider.fill("0")
    expect(column(visit, "vi").locator(".strength")).to_have_text("× 0.00")
    expect(marks.filter(has_text="=")).to_have_count(FIRST)
    assert settled(visit, "vi") == base
    slider.focus()
    for _ in range(4):
        visit.keyboard.press("ArrowRight")
    expect(column(visit, "vi").locator(".strength")).to_have_text("× 0.20")
    asked = [message for message in site.between.asked if isinstance(message, Search)]
    assert {message.using.adapter for message in asked} == {None, "vi", "fr"}
    visit.get_by_label("Adapter 2", exact=True).select_option("both")
    expect(column(visit, "both").locator(".fault")).to_contain_text("changes the image tower")
    assert settled(visit) == base


def test_classes(visit: Page, site: Site) -> None:
    """Probabilities of typed classes are not the model's, or not those of the chosen adapter."""
    visit.get_by_role("tab", name="Classes").click()
    expect(visit.locator("#class-note")).to_contain_text("Type a text above")
    visit.locator("#text").fill("a cat")
    visit.get_by_label("Adapter 1", exact=True).select_option("vi")
    visit.locator("#class-names").fill("a cat\na dog\n\na cat\n")
    visit.locator("#template").fill("{} alone")
    visit.get_by_role("button", name="Classify").click()
    expect(visit.locator(".bars")).to_have_count(2)
    answer = visit.request.post(
        f"{site.url}/classify",
        data={"input": "a cat", "classes": ["a cat", "a dog"], "templates": ["{} alone"]},
    ).json()
    shares = sorted(answer["data"][0]["probs"], reverse=True)
    assert column(visit, "emoji").locator(".value").all_inner_texts() == [f"{100 * p:.1f} %" for p in shares]
    assert column(visit, "vi").locator(".value small").count() == 2
    width = column(visit, "emoji").locator(".fill").first.evaluate("bar => bar.style.width")
    assert width == f"{100 * shares[0]:.2f}%"
    drop(visit, (site.pictures / "val_00003.png").read_bytes(), "mine.png", "image/png")
    expect(visit.locator("#class-note")).to_contain_text("The picture mine.png")
    visit.locator("#template").fill("no place")
    visit.get_by_role("button", name="Classify").click()
    expect(visit.locator("#class-note")).to_contain_text("needs {}")
    asked = [message for message in site.between.asked if isinstance(message, Classify)]
    assert {message.using.adapter for message in asked} == {None, "vi"}


def test_what_is_loaded(visit: Page, site: Site) -> None:
    """Nobody can see what is served and how busy it is, or each open page asks for it for ever."""
    visit.clock.install()
    visit.get_by_role("tab", name="What is loaded").click()
    rows = visit.locator("#adapters tbody tr")
    expect(rows).to_have_count(3)
    row = rows.filter(has=visit.locator("th", has_text="vi"))
    expect(row).to_contain_text(re.compile("loaded|registered"))
    expect(visit.locator("#served-facts")).to_contain_text("photos (40 rows)")
    expect(visit.locator("#busy dd").first).to_have_text("…")
    visit.clock.run_for(2100)
    expect(visit.locator("#busy dd").first).to_have_text("0")
    visit.get_by_role("tab", name="Results").click()
    before = described(site)
    visit.clock.run_for(20_000)
    search(visit, "a cat")
    settled(visit)
    assert described(site) == before >= 3


def described(site: Site) -> int:
    return [type(message) for message in site.between.asked].count(Describe)


def test_large_view(visit: Page, site: Site) -> None:
    """A result cannot be looked at closely, or its picture not used as the next query."""
    search(visit, "a cat")
    visit.locator(".hit").nth(1).click()
    dialog = visit.get_by_role("dialog")
    expect(dialog).to_contain_text("2 of 12")
    expect(dialog.locator("img")).to_have_attribute("src", re.compile("^blob:"))
    expect(dialog).to_contain_text(re.compile(r"images/val_\d+\.png"))
    visit.keyboard.press("ArrowLeft")
    expect(dialog).to_contain_text("1 of 12")
    expect(dialog.get_by_role("button", name="Previous")).to_be_disabled()
    visit.keyboard.press("Escape")
    expect(dialog).to_be_hidden()
    expect(visit.locator(".hit").nth(1)).to_be_focused()
    visit.keyboard.press("Enter")
    dialog.get_by_role("button", name="Search with this picture").click()
    expect(visit.locator("#picture-name")).to_contain_text("val_")
    assert [m.side for m in site.between.asked if isinstance(m, Thumbnail)].count(1024) >= 2


def test_by_keyboard_alone(visit: Page) -> None:
    """Somebody without a mouse cannot reach a control, or cannot see where they are."""
    expect(visit.locator("#text")).to_be_focused()
    visit.keyboard.type("a cat")
    visit.keyboard.press("Enter")
    settled(visit)
    reached = []
    for _ in range(12):
        visit.keyboard.press("Tab")
        focus = visit.locator(":focus")
        reached.append(
            focus.get_attribute("id") or focus.get_attribute("class") or focus.evaluate("e => e.tagName")
        )
        width = focus.evaluate(
            "e => getComputedStyle(e.id === 'file' ? e.nextElementSibling : e).outlineWidth"
        )
        assert width == "3px", reached
        if reached[-1] == "hit":
            break
    assert reached == [
        "file",
        "main",
        "SUMMARY",
        "adapter-1",
        "adapter-2",
        "tab-results",
        "results",
        "hit",
    ]
    visit.locator("#tab-results").focus()
    visit.keyboard.press("ArrowRight")
    expect(visit.locator("#tab-classes")).to_be_focused()
    expect(visit.locator("#classes")).to_be_visible()
    visit.keyboard.press("End")
    expect(visit.locator("#loaded")).to_be_visible()
    visit.keyboard.press("Home")
    expect(visit.locator("#results")).to_be_visible()


def test_every_control_has_a_name(visit: Page) -> None:
    """A screen reader says "edit" and "button" and nothing else."""
    visit.get_by_label("Adapter 1", exact=True).select_option("vi")
    search(visit, "a cat")
    nameless = visit.evaluate(
        """() => [...document.querySelectorAll("input, select, textarea, button")]
        .filter(e => !(e.getAttribute("aria-label") || e.labels?.length || e.textContent.trim()))
        .map(e => e.outerHTML)"""
    )
    assert nameless == []


@pytest.mark.parametrize("scheme", ["light", pytest.param("dark", marks=pytest.mark.slow)])
def test_on_a_telephone(browser: Browser, site: Site, scheme: str) -> None:
    """On a telephone the page must be moved sideways, columns are too narrow, or the dark one is white."""
    made = Visit(
        browser, site.url, viewport={"width": 360, "height": 740}, color_scheme=scheme, has_touch=True
    )
    page = made.page
    expect(page.locator("#main")).to_be_visible()
    page.get_by_label("Adapter 1", exact=True).select_option("vi")
    search(page, "a cat")
    settled(page)
    expect(page.locator(".column:visible")).to_have_count(1)
    page.locator(".switches").get_by_role("button", name="vi").tap()
    settled(page, "vi")
    for name in ("Classes", "What is loaded", "Results"):
        page.get_by_role("tab", name=name).tap()
        assert page.evaluate("document.documentElement.scrollWidth") <= 360
    small = page.evaluate(
        """() => [...document.querySelectorAll("button, select, .button")]
        .filter(e => e.offsetHeight && e.offsetHeight < 40).map(e => e.outerHTML)"""
    )
    assert small == []
    paper, ink = page.evaluate(
        "[getComputedStyle(document.documentElement).backgroundColor, getComputedStyle(document.body).color]"
    )
    light = {"light": 1, "dark": -1}[scheme]
    assert light * (brightness(paper) - brightness(ink)) > 400
    made.close()


def brightness(colour: str) -> int:
    return sum(int(part) for part in re.findall(r"\d+", colour)[:3])


def test_busy_server(visit: Page, site: Site) -> None:
    """A moment of load ends in an error, or the page asks again at once and makes it worse."""
    failures = [OverloadedError("20 requests are waiting", 1), UnavailableError("the model restarts", 1)]
    site.between.failures[Search] = list(failures)
    visit.locator("#text").fill("a cat")
    visit.keyboard.press("Enter")
    expect(visit.locator(".column .note")).to_have_text("20 requests are waiting. Trying again in 1 s.")
    expect(visit.locator(".column .note")).to_have_text("the model restarts. Trying again in 1 s.")
    settled(visit)
    expect(visit.locator(".column .note")).to_be_hidden()


def test_start_while_the_model_loads(browser: Browser, site: Site) -> None:
    """Opened too early, the page stays empty for good."""
    site.between.failures[Describe] = [UnavailableError("the model is starting", 1)]
    made = Visit(browser, site.url)
    expect(made.page.locator("#waiting")).to_have_text("the model is starting. Trying again in 1 s.")
    expect(made.page.locator("#main")).to_be_visible()
    expect(made.page.locator("#waiting")).to_be_hidden()
    made.close()


def test_key(browser: Browser, site: Site, tmp_path: Path) -> None:
    """With keys, the page cannot be used, forgets the key at once, or keeps it for the next person."""
    keys = tmp_path / "keys"
    keys.write_text("secret\n", encoding="utf-8")
    with running(create_app(lambda: site.between, WebArgs(api_keys=keys))) as url:
        made = Visit(browser, url)
        page = made.page
        expect(page.get_by_label("API key")).to_be_focused()
        page.keyboard.type("wrong")
        page.keyboard.press("Enter")
        expect(page.locator("#key-why")).to_contain_text("not accepted")
        page.keyboard.type("secret")
        page.keyboard.press("Enter")
        search(page, "a cat")
        expect(page.locator(".hit img").first).to_have_attribute("src", re.compile("^blob:"))
        page.reload()
        expect(page.locator("#main")).to_be_visible()
        assert page.evaluate("[localStorage.length, document.cookie, location.href]") == [0, "", f"{url}/"]
        assert not any("secret" in address for address in made.asked)
        other = made.context.new_page()
        other.goto(url)
        expect(other.get_by_label("API key")).to_be_visible()
        made.close()


def test_nothing_served(browser: Browser) -> None:
    """A first start without a folder shows a search box that can only fail, and not what to do."""
    with (
        Service(cg.load("emoji"), ServiceArgs()) as bare,
        running(create_app(lambda: Between(bare), WebArgs())) as url,
    ):
        made = Visit(browser, url)
        page = made.page
        expect(page.locator("#no-folder")).to_contain_text("clipgraft encode photos/ encoded/ --model emoji")
        page.locator("#text").fill("a cat")
        page.keyboard.press("Enter")
        expect(page.locator("#compared")).to_be_hidden()
        page.get_by_role("tab", name="Classes").click()
        page.locator("#class-names").fill("a cat\na dog")
        page.get_by_role("button", name="Classify").click()
        expect(page.locator(".bars li")).to_have_count(2)
        made.close()


def test_hostile_captions_stay_text(browser: Browser, site: Site) -> None:
    """A caption with markup in it runs in the browser of everybody who finds the picture."""
    evil = "<img src=x onerror=document.title='owned'><script>document.title='owned'</script>"
    hits = [{"rank": 1, "score": 0.5, "row": 0, "path": evil, "caption": evil, evil: evil, "thumbnail": "/x"}]
    made = Visit(browser, site.url)
    made.page.route(
        "**/search", lambda route: route.fulfill(body=json.dumps({"folder": "photos", "hits": hits}))
    )
    search(made.page, evil)
    expect(made.page.locator(".caption")).to_have_text(evil)
    made.page.locator(".hit").click()
    expect(made.page.locator("#enlarged-caption")).to_have_text(evil)
    assert made.page.title() == "clipgraft"
    made.close()


def test_without_javascript(browser: Browser, site: Site) -> None:
    """With scripts switched off, the page is blank and says nothing."""
    made = Visit(browser, site.url, java_script_enabled=False)
    expect(made.page.locator("noscript .notice")).to_be_visible()
    made.close()
