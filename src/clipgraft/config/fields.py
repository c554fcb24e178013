"""What flags are made of: the base of every spec, and types that read what a shell passes."""

from __future__ import annotations

import json
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated, Any, Literal

from pydantic import AfterValidator, BaseModel, BeforeValidator, ConfigDict, Field


def _pairs(value: Any) -> Any:
    """`text.0.*=4,vision.*=8` -> {"text.0.*": "4", "vision.*": "8"}; mappings pass."""
    if not isinstance(value, str):
        return value
    items = [item.split("=") for item in value.split(",") if item.strip()]
    if any(len(item) != 2 for item in items):
        raise ValueError("write SITES=NUMBER pairs, e.g. text.0.*=4,text.11.*=32")
    return {key.strip(): number.strip() for key, number in items}


def separator(value: Any) -> Any:
    """A shell passes backslash-t as two characters."""
    return "\t" if value in ("\\t", "tab") else value


def words(value: Any) -> Any:
    """`a,b` -> ("a", "b"); anything but text passes."""
    if not isinstance(value, str):
        return value
    return tuple(word.strip() for word in value.split(",") if word.strip())


def expressions(value: Any) -> Any:
    """`text.*.q,v;linear` -> ("text.*.q,v", "linear"): commas join the terms of one expression."""
    if not isinstance(value, str):
        return value
    return tuple(part.strip() for part in value.split(";") if part.strip())


def _settings(value: Any) -> Any:
    """["a.b=3", "c=x"] -> {"a.b": 3, "c": "x"}, values as in JSON where they are; mappings pass."""
    if isinstance(value, dict):
        return value
    items = [str(item).partition("=") for item in ([value] if isinstance(value, str) else value)]
    if any(not key.strip() or not equals for key, equals, _ in items):
        raise ValueError("KEY=VALUE, e.g. text_config.num_hidden_layers=3")
    return {key.strip(): _json(text.strip()) for key, _, text in items}


def _json(text: str) -> Any:
    try:
        return json.loads(text)
    except ValueError:
        return text


def _precision(value: Any) -> Any:
    """open_clip's other names; its `amp` is float16 on GPUs, of which bf16 is the sturdier relative."""
    return "amp_bf16" if value in ("amp", "amp_bfloat16") else value


def _rank(value: Any) -> Any:
    if value == "auto" or (str(value).isdecimal() and int(value) >= 1):
        return value
    raise ValueError("a whole number from 1 up, or auto")


def within(least: float, most: float, why: str) -> AfterValidator:
    """Bounds beyond which a number is certainly a slip of the keyboard, with what would come of it."""

    def check(value: float | None) -> float | None:
        if value is not None and not least <= value <= most:
            raise ValueError(f"a number from {least:g} to {most:g}: {why}")
        return value

    return AfterValidator(check)


_LONGEST_SIDE = 65_535


def _size(value: Any) -> Any:
    """`480x640` -> (480, 640), height before width; `336` -> (336, 336)."""
    sides = str(value).lower().split("x") if isinstance(value, str | int) else value
    if not all(str(side).strip().isdecimal() and int(side) for side in sides) or not 1 <= len(sides) <= 2:
        raise ValueError("pixels of a side, or HEIGHTxWIDTH")
    if any(len(str(side).strip()) > 5 or int(side) > _LONGEST_SIDE for side in sides):
        raise ValueError(f"sides from 1 to {_LONGEST_SIDE} pixels: no JPEG has more")
    return tuple(int(side) for side in sides) * (2 // len(sides))


def _path(value: Any) -> Any:
    """An unset shell variable gives "", which as a path would mean the current folder."""
    if value == "":
        raise ValueError("a path")
    return Path(value).expanduser() if isinstance(value, str) else value


def _paths(value: Any) -> Any:
    """One path, or several in a list; a name may have commas in it."""
    return (value,) if isinstance(value, str) else value


RankPattern = Annotated[dict[str, Annotated[int, Field(ge=1)]], BeforeValidator(_pairs)]
# A scale of 1e6 multiplies an update of one thousandth to a thousand times the weights it is added to.
_SCALE = within(1e-9, 1e6, "with more, updates leave the range of fp32; with less, they round to nothing")
Alpha = Annotated[float, Field(gt=0), _SCALE]
Decay = Annotated[float, within(0, 1000, "with more, weights change their sign at every step")]
Epsilon = Annotated[float, within(1e-37, 1, "less is 0 in fp32, and more leaves nothing of a step")]
Ratio = Annotated[float, within(1, 1e4, "with more, the first step throws them out of range")]
Count = Annotated[int, within(0, 10**9, "with more, the run would not end")]
_NEVER = "with more, it would never come"
_MEMORY = "with more, memory does not hold them"
Frequency = Annotated[int, within(0, 10**9, _NEVER)]
Batch = Annotated[int, within(1, 10**6, _MEMORY)]
ShardRows = Annotated[int, within(1, 10**8, _MEMORY)]
Views = Annotated[int, within(1, 10**5, "with more, no disk holds their features")]
Results = Annotated[int, within(1, 10**6, "with more, nobody reads them")]
Seeds = Annotated[int, within(1, 1000, "with more, the sweep would not end")]
Scenes = Annotated[int, within(100, 10**6, "with more, drawing them would not end")]
Layers = Annotated[int, within(0, 10_000, "no model has more")]
SumRank = Annotated[int, within(1, 10**6, "no site has more rows")]
Tokens = Annotated[int, within(1, 10**9, "no model reads more")]
Rate = Annotated[float, within(0, 1e38, "with more, it is infinite in fp32")]
PeakRate = Annotated[float, within(1e-37, 1e38, "less is 0 in fp32, and more is infinite")]
Beta = Annotated[float, within(0, 0.999999, "with more, no run is long enough for the average")]
Power = Annotated[float, within(1e-3, 1e3, "beyond that, the cooldown is a single step")]
ClipNorm = Annotated[float, within(1e-12, 1e12, "less stops all learning, and more clips nothing")]
Dropout = Annotated[float, within(0, 0.99, "with more, next to nothing of the adapter's path is left")]
Gigabytes = Annotated[float, within(1e-6, 1e6, "with less, nothing fits in; with more, no disk holds it")]
LossWeight = Annotated[float, within(0, 1e6, "with more, the loss leaves the range of fp32")]
AdapterWeight = Annotated[float, within(-1e6, 1e6, "beyond that, weights leave the range of fp32")]
GpuShare = Annotated[float, within(0, 1024, "no machine has more")]
Workers = Annotated[int, within(0, 1024, "with more, the system has no processes left")]
AlphaPattern = Annotated[dict[str, Alpha], BeforeValidator(_pairs)]
UserPath = Annotated[Path, BeforeValidator(_path)]
Precision = Annotated[Literal["auto", "fp32", "amp_bf16", "bf16"], BeforeValidator(_precision)]
Rank = Annotated[int | Literal["auto"], BeforeValidator(_rank)]
Settings = Annotated[dict[str, Any], BeforeValidator(_settings)]
Size = Annotated[tuple[int, int], BeforeValidator(_size)]
Paths = Annotated[tuple[UserPath, ...], BeforeValidator(_paths)]
Words = Annotated[tuple[str, ...], BeforeValidator(words)]
Blocks = Annotated[tuple[int, ...], BeforeValidator(words)]


@dataclass(frozen=True)
class Positional:
    """Marks a field that is given by its place on the command line instead of by a flag.

    Attributes:
        many: it takes all words from its place on; the last of a spec alone may.
    """

    many: bool = False


@dataclass(frozen=True)
class Repeated:
    """Marks a field whose flag may be given several times; it receives the list."""


class Spec(BaseModel):
    """Base of every spec: frozen, and no unknown fields."""

    # YAML reads `name: 2024` as a number; NaN and infinity pass every other check.
    model_config = ConfigDict(
        frozen=True, extra="forbid", protected_namespaces=(), coerce_numbers_to_str=True, allow_inf_nan=False
    )


class OverwriteSpec(Spec):
    """What may be replaced."""

    overwrite: bool = Field(
        False, description="replace what is there, even if clipgraft did not make it; without it that is left"
    )
