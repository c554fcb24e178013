"""A table as every kind of source is read: its columns are chosen, and each row is checked or is a reason."""

from __future__ import annotations

import math
import re
from collections.abc import Callable, Generator, Sequence
from dataclasses import dataclass
from difflib import get_close_matches
from pathlib import Path, PurePath

from clipgraft.data.args import TableArgs
from clipgraft.errors import DataError
from clipgraft.pictures import IMAGE_SUFFIXES
from clipgraft.shown import shown_line

_NUMBERED = re.compile(r"(caption|title|text|sentence|description|comment)[ _-]?\d+", re.IGNORECASE)
_SHOWN = 12  # names of columns in one line


@dataclass(frozen=True)
class Row:
    """One row of a table that can be used.

    Attributes:
        number: counts in the table's `unit`.
        image: the path as written.
        texts: captions, or one label, without surrounding blanks; "" where a cell is empty.
        nulls: how many of the texts were nan or the like, and are empty now.
        remark: what a person may not have meant, though the row can be used.
    """

    number: int
    image: str
    texts: tuple[str, ...]
    nulls: int = 0
    remark: str = ""


@dataclass(frozen=True)
class BadRow:
    """One row that cannot be used.

    Attributes:
        number: counts in the table's `unit`.
        image: the path as written, "" where it is not known.
        reason: why, in a few words that do not repeat number and path.
        kind: what it is counted as, where the reason differs from row to row.
    """

    number: int
    image: str
    reason: str
    kind: str = ""


Rows = Generator[Row | BadRow, None, None]


@dataclass(frozen=True)
class Table:
    """An opened source whose columns are chosen.

    Attributes:
        source: the file or folder.
        folder: what relative image paths are relative to.
        kind: what it was read as, in a few words.
        unit: what a row number counts ("line", "row", "image").
        rows: reads the source again from its first row, at every call.
        notes: choices made for the user that they should see.
        has_texts: whether rows have texts of their own; without, each text is the image's path.
        labels: names that the source gives to classes, whether or not a row has them.
        has_images: whether rows name images; without, each image is as its text.
        inside: whether images lie inside the source, as bytes in the cells of a Parquet file.
        met: after all rows were read: what the source holds besides, and what was left out of it.
    """

    source: Path
    folder: Path
    kind: str
    unit: str
    rows: Callable[[], Rows]
    notes: tuple[str, ...] = ()
    has_texts: bool = True
    labels: tuple[str, ...] = ()
    has_images: bool = True
    inside: bool = False
    met: Callable[[], tuple[str, ...]] = tuple


_NULLS = frozenset(
    {"nan", "-nan", "none", "null", "n/a", "<na>", "#n/a", "#na", "#n/a n/a", "(null)", "\\n", "undefined"}
)
_NAN = frozenset({"nan", "-nan", "<na>", "#n/a", "#na", "n/a"})


def is_null(text: str) -> bool:
    """Tell whether a cell holds what a program writes for a missing text, such as pandas' nan.

    "NA" counts in capitals alone: "na" is a fruit in Vietnamese.
    """
    return len(text) <= 9 and (text == "NA" or text.lower() in _NULLS)


@dataclass(frozen=True)
class Cells:
    """What the cells of texts may hold.

    Attributes:
        labels: they are labels: a number is the text it is written as, and `none` may be a class.
        keep_nulls: nan and None are words like others.
        translations: they are translations of the text that stands in place of an image's path.
    """

    labels: bool = False
    keep_nulls: bool = False
    translations: bool = False

    @property
    def noun(self) -> str:
        """What a cell of texts is called."""
        return "label" if self.labels else "translation" if self.translations else "caption"

    def is_null(self, text: str) -> bool:
        """Tell whether a caption or label is what a program writes for a missing one."""
        if self.keep_nulls or not is_null(text):
            return False
        return not self.labels or text.lower() in _NAN


def make_row(number: int, image: object, texts: object, cells_are: Cells, remark: str = "") -> Row | BadRow:
    """Check the cells of one row. `texts` is a string, None, or a list of strings."""
    of_text = cells_are.translations
    if image is not None and not isinstance(image, str):
        told = ("source", "text") if of_text else ("image", "a path")
        return BadRow(number, "", f"the {told[0]} is a {type(image).__name__}, not {told[1]}")
    path = (image or "").strip()
    if not path or (of_text and cells_are.is_null(path)):
        return BadRow(number, "", "no source text" if of_text else "no image path")
    cells = texts if isinstance(texts, list | tuple) else (texts,)
    if cells_are.labels:
        cells = [_number_as_text(cell) for cell in cells]
    kept, nulls = [], 0
    for cell in cells:
        if cell != cell:  # NaN
            nulls += 1
            cell = None
        if cell is not None and not isinstance(cell, str):
            return BadRow(number, path, f"the {cells_are.noun} is a {type(cell).__name__}, not text")
        text = (cell or "").strip()
        if text and cells_are.is_null(text):
            text, nulls = "", nulls + 1
        kept.append(text)
    if not (_is_unicode(path) and all(map(_is_unicode, kept))):
        return BadRow(number, ascii(path), "holds half a character (a lone surrogate)")
    return Row(number, path, tuple(kept), nulls, remark)


def _is_unicode(text: str) -> bool:
    if text.isascii():
        return True
    try:
        text.encode()
    except UnicodeEncodeError:
        return False
    return True


def _number_as_text(cell: object) -> object:
    # A table with one empty cell turns a column of whole numbers into floats, and the empty one into NaN.
    if isinstance(cell, float) and (math.isnan(cell) or cell.is_integer()):
        return None if math.isnan(cell) else str(int(cell))
    return str(cell) if isinstance(cell, int | float) else cell


@dataclass(frozen=True)
class Role:
    """What a column is for.

    Attributes:
        name: what its cells are, as a person says.
        option: the one that names it.
        default: the name that is tried first.
        usual: names that others use.
    """

    name: str
    option: str
    default: str
    usual: tuple[str, ...]


IMAGE = Role(
    "images",
    "csv_img_key",
    "filepath",
    (
        "image",
        "file_name",
        "path",
        "filename",
        "img",
        "image_path",
        "file_path",
        "image_name",
        "file",
        "jpg",
        "png",
        "webp",
    ),  # img2dataset's, of images themselves
)
CAPTION = Role(
    "captions",
    "csv_caption_key",
    "title",
    ("caption", "text", "captions", "sentence", "sentences", "comment", "description"),
)
LABEL = Role(
    "labels",
    "csv_label_key",
    "label",
    ("class", "category", "class_name", "label_name", "target", "labels", "y"),
)
SOURCE = Role(
    "source texts",
    "csv_source_key",
    "source",
    ("en", "english", "src", "source_text", "original"),
)
TARGET = Role(
    "translations",
    "csv_target_key",
    "target",
    ("translation", "translated", "tgt", "target_text"),
)


@dataclass(frozen=True)
class Wanted:
    """What a caller reads from a table: images with captions or labels, images, texts, or translations.

    Of translations, the source text stands where an image's path does.
    """

    text: Role = CAPTION
    needs_image: bool = True
    needs_text: bool = True
    image: Role = IMAGE

    def keys(self, args: TableArgs) -> tuple[str | None, str | None]:
        """Return the column names that the user gave for images and for texts."""
        return getattr(args, self.image.option, None), getattr(args, self.text.option, None)

    def cells(self, args: TableArgs) -> Cells:
        """Return what the cells of texts may hold."""
        return Cells(self.text is LABEL, args.keep_nulls, self.image is SOURCE)


PAIRS = Wanted()
TRANSLATIONS = Wanted(TARGET, image=SOURCE)
LABELS = Wanted(LABEL)
IMAGES = Wanted(needs_text=False)
TEXTS = Wanted(needs_image=False)


@dataclass(frozen=True)
class Header:
    """The names of a file's columns, as one separator splits them.

    Attributes:
        names: of the columns.
        separator: "" where the kind of file has none.
        guess: the option that would have named this separator, "" where it is the default or was given.
        line: the first line, which may be a row and no header; "" where this kind of file names columns.
    """

    names: tuple[str, ...]
    separator: str = ""
    guess: str = ""
    line: str = ""


@dataclass(frozen=True)
class Columns:
    """Places of the columns to read, from 0. Where one kind is missing, both name the same column.

    Attributes:
        image, texts: places.
        is_header: whether the first line names the columns.
        has_texts: whether there are texts besides the image paths.
        notes: what was guessed.
    """

    image: int
    texts: tuple[int, ...]
    is_header: bool = True
    has_texts: bool = True
    notes: tuple[str, ...] = ()

    @property
    def has_images(self) -> bool:
        """Whether there are image paths besides the texts."""
        return not self.has_texts or self.image not in self.texts


def choose_columns(
    source: Path, headers: Sequence[Header], args: TableArgs, wanted: Wanted
) -> tuple[Header, Columns]:
    """Return the first header that has the wanted columns, and their places.

    Names that the user gave are taken as given. Where there are none, open_clip's defaults are tried first,
    then usual names, and the notes say which.

    Raises:
        DataError: no header has them; it names the option, the file's columns and the nearest name.
    """
    for optional in (False, True):
        for header in headers:
            found = _named(header, args, wanted, optional) or _numbered(header, args, wanted)
            if found is not None:
                return header, found
        if wanted.needs_image and wanted.needs_text:
            break
    raise _missing(source, max((header.names for header in headers), key=len), args, wanted)


def _named(header: Header, args: TableArgs, wanted: Wanted, optional: bool) -> Columns | None:
    """Find columns by name; with `optional`, one that is neither needed nor named may be missing."""
    names, (image_key, text_key) = header.names, wanted.keys(args)
    image, texts = _find(names, image_key, wanted.image), _find_texts(names, text_key, wanted.text)
    if wanted.image is SOURCE:
        image, texts = _other_of_two(names, (image_key, image), (text_key, texts))
    has_texts = bool(texts)
    if optional and not wanted.needs_text and text_key is None and image is not None:
        texts, has_texts = (image,), False
    if optional and not wanted.needs_image and image_key is None and texts:
        image = texts[0]
    if image is None or not texts:
        return None
    guessed = []
    if wanted.needs_image and image not in (image_key, wanted.image.default):
        guessed.append(f'`{wanted.image.option}` "{image}"')
    if has_texts and text_key is None and texts != (wanted.text.default,):
        guessed.append(f'`{wanted.text.option}` "{",".join(texts)}"')
    twice = tuple(
        f'column "{name}" stands there {names.count(name)} times: the first is read'
        for name in dict.fromkeys((image, *texts))
        if names.count(name) > 1
    )
    places = tuple(names.index(name) for name in texts)
    notes = (*twice, *_guess_notes([*guessed, header.guess]))
    return Columns(names.index(image), places, has_texts=has_texts, notes=notes)


def _numbered(header: Header, args: TableArgs, wanted: Wanted) -> Columns | None:
    """Find columns without names: by numbers, or as two columns of which one holds an image name."""
    names, keys = header.names, wanted.keys(args)
    if not header.line:
        return None
    images = [i for i, name in enumerate(names) if PurePath(name).suffix.lower() in IMAGE_SUFFIXES]
    if keys == (None, None) and wanted.image is IMAGE and len(names) == 2 and len(images) == 1:
        places = [images[0], 1 - images[0]]
    else:
        parts = [keys[0] or "", *(keys[1] or "").split(",")]
        places = [int(part) - 1 for part in parts if part.strip().isdecimal()]
        if len(places) < len(parts) or not all(0 <= place < len(names) for place in places):
            return None
    image, *texts = places
    is_row = image in images or names[image].isdecimal()
    how = "no header line: " if is_row else f"the first line is taken for a header ({header.line[:40]}): "
    where = ", ".join(str(place + 1) for place in texts)
    what = f"{wanted.image.name} from column {image + 1}, {wanted.text.name} from {where}"
    return Columns(image, tuple(texts), not is_row, notes=(how + what, *_guess_notes([header.guess])))


def _other_of_two(
    names: Sequence[str], source: tuple[str | None, str | None], targets: tuple[str | None, tuple[str, ...]]
) -> tuple[str | None, tuple[str, ...]]:
    """Of a table of two columns, the one that is not named beside the one that is found.

    `source` and `targets` are the name that the user gave, and what was found.
    """
    (source_key, found), (target_key, texts) = source, targets
    if len(names) == 2 and found is not None and not texts and target_key is None:
        texts = tuple(name for name in names if name != found)
    if len(names) == 2 and found is None and len(texts) == 1 and source_key is None:
        found = next((name for name in names if name != texts[0]), None)
    return found, texts


def _find(names: Sequence[str], key: str | None, role: Role) -> str | None:
    if key is not None:
        return key if key in names else None
    folded = {name.casefold(): name for name in reversed(names)}
    return next((folded[name] for name in (role.default, *role.usual) if name in folded), None)


def _find_texts(names: Sequence[str], key: str | None, role: Role) -> tuple[str, ...]:
    """Find the column of texts, or several: joined by commas, or captions named `caption_0` and on."""
    found = _find(names, key, role)
    if found is not None or role is LABEL:
        return () if found is None else (found,)
    if key is not None:
        parts = tuple(part.strip() for part in key.split(","))
        return parts if len(parts) > 1 and all(part in names for part in parts) else ()
    return tuple(name for name in names if role is CAPTION and _NUMBERED.fullmatch(name))


def _guess_notes(guessed: Sequence[str]) -> tuple[str, ...]:
    told = " ".join(filter(None, guessed))
    return (f"guessed from the header: {told}",) if told else ()


def _missing(source: Path, names: Sequence[str], args: TableArgs, wanted: Wanted) -> DataError:
    image_key, text_key = wanted.keys(args)
    no_image = wanted.needs_image and _find(names, image_key, wanted.image) is None
    role, key = (wanted.image, image_key) if no_image else (wanted.text, text_key)
    missing = role.default if key is None else key
    if role in (CAPTION, TARGET) and "," in missing:
        missing = next((part.strip() for part in missing.split(",") if part.strip() not in names), missing)
    there = ", ".join(f'"{_short(name)}"' for name in names[:_SHOWN]) + (
        ", ..." if len(names) > _SHOWN else ""
    )
    advice = _advice(role, missing, names, wanted)
    return DataError(f'{source}: `{role.option}`: no column "{missing}"; it has {there}; {advice}')


def _advice(role: Role, missing: str, names: Sequence[str], wanted: Wanted) -> str:
    if any(PurePath(name).suffix.lower() in IMAGE_SUFFIXES for name in names):
        return (
            f"the first line must be a header that names the columns, such as {IMAGE.default}<TAB>"
            f"{wanted.text.default}; or give their numbers from 1: `{IMAGE.option}='1'` "
            f"`{wanted.text.option}='2'`"
        )
    if len(names) == 1 and any(mark in names[0] for mark in ",;|\t"):
        return "it reads as one column: give the separator with `csv_separator`"
    folded = {name.casefold(): name for name in names}
    near = get_close_matches(missing.casefold(), folded, n=1)
    return (
        f'did you mean "{_short(folded[near[0]])}"?' if near else f"name the right one with `{role.option}`"
    )


def _short(name: str) -> str:
    """Shorten a column's name for a message; it may hold line breaks."""
    return shown_line(name if len(name) <= 40 else name[:37] + "...")
