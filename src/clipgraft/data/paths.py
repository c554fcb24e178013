"""From an image path as written in a table to the file on this machine."""

from __future__ import annotations

import os
import unicodedata
from pathlib import Path, PureWindowsPath


def find_image(folder: Path, text: str) -> Path | str:
    """The image file that `text` names, relative to `folder`; where there is none, the reason in a few words.

    Windows separators are understood everywhere. Accented names match whether they are stored composed (NFC)
    or decomposed (NFD): macOS and zip archives change one into the other, and a table keeps what it was
    written with. The path is normalised (`a/../b.jpg` is `b.jpg`) so that one image is not counted as two.
    """
    try:
        for spelling in _spellings(text):
            path = Path(os.path.normpath(folder / spelling))
            if path.is_file():
                return path
    except (OSError, ValueError) as error:
        return f"the path cannot be read: {error.strerror if isinstance(error, OSError) else error}"
    return _why_missing(folder, text)


def _spellings(text: str) -> list[str]:
    forms = [text, text.replace("\\", "/")]
    forms += [unicodedata.normalize(form, forms[1]) for form in ("NFC", "NFD")]
    return list(dict.fromkeys(forms))


def _why_missing(folder: Path, text: str) -> str:
    if "://" in text:
        return "is an address; download the image first"
    if (folder / text).is_dir():
        return "is a folder, not an image"
    if os.name != "nt" and PureWindowsPath(text).drive:
        return "not found: it is a path on a Windows drive; make it relative to the table's folder"
    if Path(text).is_absolute():
        return "not found"
    if Path(text).is_file():
        return (
            f"not found in {folder}, but in the working directory; move the table there or write full paths"
        )
    return f"not found in {folder}"
