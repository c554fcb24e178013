"""Records of our own on disk (JSON and `.pt` files), read into dataclasses whose every field is checked.

Such a file may come from elsewhere, be cut short, or be of another version: a value of another type, a
missing key, nesting without end, NaN, infinity or a number that no field can hold is one line that names the
file and the field. Fields that count are declared as `Whole`, measures as `Finite`, switches as `Flag`, since
pydantic would take "3" for a number and "yes" for a switch.
"""

from __future__ import annotations

import json
import math
import zipfile
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Annotated, Any, TypeVar

from pydantic import Field, StrictBool, TypeAdapter, ValidationError

from clipgraft.errors import CheckpointError, ClipgraftError, DataError
from clipgraft.readers import placeholder, reading, reason

Rank = Annotated[int, Field(strict=True, ge=1, lt=2**31)]
Whole = Annotated[int, Field(strict=True, ge=0, lt=2**63)]
Finite = Annotated[float, Field(strict=True, allow_inf_nan=False)]
Flag = StrictBool

T = TypeVar("T")
_ADAPTERS: dict[Any, TypeAdapter[Any]] = {}
_DEEPEST = 64  # levels of nesting; ours have seven
_LARGEST = 2**64  # of a whole number: seeds have 64 bits
# Of one file: a `.pt` file may name one list a thousand times over, and so on inside.
_MOST_VALUES = 5_000_000
_MOST_BYTES = 512 << 20
_BELONGS = {
    **dict.fromkeys(("tuple", "list"), "a list"),
    **dict.fromkeys(("dict", "dataclass", "mapping"), "an object"),
    **dict.fromkeys(("int", "int_from_float"), "a whole number"),
    **{"float": "a number", "bool": "true or false", "string": "text"},
}


def read_json(
    path: Path, kind: type[T], error: type[ClipgraftError] = DataError, advice: str = "write it again"
) -> T:
    """The record in a JSON file, as a dataclass or any type that pydantic knows.

    Raises:
        error: there is no such file, it cannot be read, or a value in it is not what `kind` says; with
            `advice`, which says what to do now.
    """
    with reading(path, error, advice):
        if path.exists() and not path.is_file():
            raise error(f"{path}: is no file; {advice}")
        if (size := path.stat().st_size) > _MOST_BYTES:
            raise error(f"{path}: has {size:,} bytes, more than a record can have; {advice}")
        content = path.read_bytes()
    return parse_json(content, kind, str(path), error, advice)


def parse_json(
    content: bytes | str,
    kind: type[T],
    where: str,
    error: type[ClipgraftError] = DataError,
    advice: str = "write it again",
) -> T:
    """`read_json` of JSON that has been read; `where` names the file, and the line in it."""
    try:
        value = json.loads(content)
    except RecursionError as cause:
        raise error(f"{where}: is nested more than {_DEEPEST} levels deep; {advice}") from cause
    except ValueError as cause:
        raise error(f"{where}: is not JSON ({reason(cause)}); {advice}") from cause
    return checked(value, kind, where, error, advice)


def read_pt(
    path: Path,
    kind: type[T],
    error: type[ClipgraftError] = CheckpointError,
    advice: str = "save it again",
    *,
    verify: bool = False,
) -> T:
    """The record in a `torch.save` file; none of its code is run, tensors are on the CPU.

    With `verify` the checksum of every part is compared, which torch itself does not, and tensors are in
    memory; without, they stay on disk where the format allows it.

    Raises:
        error: as `read_json`.
    """
    try:
        if not path.is_file():
            raise error(f"{path}: {'is no file' if path.exists() else 'there is no such file'}; {advice}")
        if problem := placeholder(path):
            raise error(f"{path}: cannot be read: {problem}")
        value = load_pt(path, verify)
    except ClipgraftError:
        raise
    except Exception as cause:  # the unpickler raises whatever the bytes make it raise
        raise error(f"{path}: cannot be read: {_why(cause)}; {advice}") from cause
    return checked(value, kind, str(path), error, advice, finite=False)


def load_pt(path: Path, verify: bool = False) -> Any:
    """Load what `torch.save` wrote of tensors and plain values; raises anything on damaged bytes.

    With `verify` the checksum of every part is compared, and tensors are in memory; otherwise they are mapped
    from disk where the format allows it.
    """
    import torch

    archive = zipfile.is_zipfile(path)
    if archive:
        _check_archive(path, verify)
    return torch.load(path, map_location="cpu", weights_only=True, mmap=(archive and not verify) or None)


def checked(
    value: Any,
    kind: type[T],
    where: str,
    error: type[ClipgraftError] = DataError,
    advice: str = "write it again",
    *,
    finite: bool = True,
) -> T:
    """A plain value as a dataclass, or as any type that pydantic knows; raises `error` naming the field.

    With `finite` no number in it may be infinite, NaN or of more than 64 bits, in fields of type Any too.
    """
    for fault in _faults(value, finite):
        raise error(f"{where}: {fault}; {advice}")
    try:
        record: T = _adapter(kind).validate_python(value)
        return record
    except ValidationError as wrong:
        faults = wrong.errors(include_url=False, include_context=False)
    more = f" (and {len(faults) - 1} more)" if len(faults) > 1 else ""
    raise error(f"{where}: {_told(faults[0])}{more}; {advice}")


def _adapter(kind: Any) -> TypeAdapter[Any]:
    if kind not in _ADAPTERS:  # building one takes as long as reading a thousand records
        _ADAPTERS[kind] = TypeAdapter(kind)
    return _ADAPTERS[kind]


def _told(fault: Mapping[str, Any]) -> str:
    """One fault that pydantic found: the field, what is there, and what belongs there."""
    field = _named(fault["loc"])
    if fault["type"] == "missing":
        return f"{field} is missing"
    told = str(fault["msg"]).removeprefix("Value error, ").removeprefix("Input should be ")
    kind = fault["type"].removesuffix("_parsing").removesuffix("_type")
    belongs = _BELONGS.get(kind, told.partition(", unable")[0])
    return f"{field} is {shown(fault['input'])}, and should be {belongs}"


def shown(value: object) -> str:
    """A value of a stranger's file in a few printable words."""
    if isinstance(value, int) and not isinstance(value, bool) and abs(value) >= _LARGEST:
        return "a number without end"
    if value is None or isinstance(value, str | int | float | bool):
        return repr(value[:60] if isinstance(value, str) else value)
    return {"dict": "an object", "list": "a list"}.get(type(value).__name__, f"a {type(value).__name__}")


def _named(place: Sequence[object]) -> str:
    """The name of a field by the keys that lead to it: `shards[0].files['a b']`."""
    parts = [f".{key}" if isinstance(key, str) and key.isidentifier() else f"[{shown(key)}]" for key in place]
    return "".join(parts).removeprefix(".") or "the whole"


def _faults(value: Any, finite: bool) -> Iterator[str]:
    """What no record may have, wherever it is, the first of it first."""
    waiting: list[tuple[tuple[object, ...], Any]] = [((), value)]
    count = 0
    while waiting:
        place, part = waiting.pop()
        count += 1
        if len(place) > _DEEPEST:
            yield f"is nested more than {_DEEPEST} levels deep"
            return
        if count > _MOST_VALUES:
            yield f"has more than {_MOST_VALUES:,} values"
            return
        if isinstance(part, dict):
            waiting += [((*place, key), inner) for key, inner in reversed(part.items())]
        elif isinstance(part, list | tuple):
            waiting += [((*place, number), part[number]) for number in reversed(range(len(part)))]
        elif finite and isinstance(part, float) and not math.isfinite(part):
            yield f"{_named(place)} is {part}, which no record holds"
        elif finite and isinstance(part, int) and abs(part) >= _LARGEST:
            yield f"{_named(place)} is a whole number of more than 64 bits"


def _check_archive(path: Path, verify: bool) -> None:
    """Refuse archives that unpack to more than they hold; torch compresses none."""
    with zipfile.ZipFile(path) as archive:
        if sum(entry.file_size for entry in archive.infolist()) > path.stat().st_size:
            raise ValueError("it is a compressed archive, which torch does not write")
        if verify and (part := archive.testzip()) is not None:
            raise zipfile.BadZipFile(f"wrong checksum of {part}")


def _why(cause: Exception) -> str:
    text = " ".join(str(cause).split())
    if isinstance(cause, OSError) and cause.strerror:
        return f"{cause.strerror}, check its permissions and disk"
    if "compressed archive" in text:
        return text
    if "TorchScript" in text:
        return "it is a TorchScript archive, which holds code"
    if "weights_only" in text or "Weights only" in text or "Unsupported global" in text:
        return "it holds pickled code or objects, which are never loaded"
    return "it is truncated, damaged or no torch checkpoint"
