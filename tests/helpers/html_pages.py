"""Parse HTML into a flat list of elements with attributes and text, and check that tags nest."""

from __future__ import annotations

from dataclasses import dataclass, field
from html.parser import HTMLParser
from pathlib import Path

VOID = {"meta", "br", "img", "input", "link", "hr"}


@dataclass(eq=False)
class Element:
    """A tag, the text inside it, and the elements around it."""

    tag: str
    attributes: dict[str, str]
    parents: tuple[Element, ...] = field(repr=False)
    text: str = field(default="", repr=False)

    def inside(self, tag: str, **attributes: str) -> bool:
        wanted = attributes.items()
        return any(p.tag == tag and wanted <= p.attributes.items() for p in self.parents)


@dataclass
class Page:
    """An HTML file and its elements in order."""

    path: Path
    html: str = field(repr=False)
    elements: list[Element] = field(default_factory=list, repr=False)

    def all(self, tag: str, **attributes: str) -> list[Element]:
        """List the elements of a tag that have these attributes; write `class_` for `class`."""
        wanted = {name.rstrip("_"): value for name, value in attributes.items()}.items()
        return [e for e in self.elements if e.tag == tag and wanted <= e.attributes.items()]

    @property
    def text(self) -> str:
        (body,) = self.all("body")
        return " ".join(body.text.split())


class _Reader(HTMLParser):
    def __init__(self, page: Page) -> None:
        super().__init__()
        self.page, self.open = page, list[Element]()

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        element = Element(tag, {name: value or "" for name, value in attrs}, tuple(self.open))
        self.page.elements.append(element)
        if tag not in VOID:
            self.open.append(element)

    def handle_startendtag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.handle_starttag(tag, attrs)
        if tag not in VOID:
            self.open.pop()

    def handle_endtag(self, tag: str) -> None:
        assert self.open, f"</{tag}> closes nothing"
        assert self.open[-1].tag == tag, f"</{tag}> closes <{self.open[-1].tag}>"
        self.open.pop()

    def handle_data(self, data: str) -> None:
        for element in self.open:
            element.text += data


def read_page(path: Path) -> Page:
    """Parse a page; an element that is not closed, or closed by another, is an error."""
    page = Page(path, path.read_text(encoding="utf-8"))
    reader = _Reader(page)
    reader.feed(page.html)
    reader.close()
    assert reader.open == []
    return page
