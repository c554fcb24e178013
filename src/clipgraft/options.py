"""The base of every option group: a frozen value, checked when it is made, with all faults told at once.

An option group is a class derived from `Options`, with an annotated field for each option. It stands in the
folder that uses it, in `args.py` (`train/args.py`: `TrainArgs`, `RunArgs`) or, for LoRA, in
`lora/config.py`, and is the only declaration of its options:

    class TrainArgs(Options):
        epochs: Count = Field(32, ge=1, description="passes over the captions")

Python calls `TrainArgs(epochs=3)`. `clipgraft.cli.flags` makes `--epochs` of the same field, with its
description as the help. A YAML file has the key `epochs`, and a run records `train.model_dump()`.
Options that only the command line has are groups in `clipgraft.cli.flags`.

A message of the library names an option as it is written in Python, in backticks: `` `epochs` ``,
`` `epochs=3` ``, `` `save_lora_only=False` ``. The command line rewrites them as `--epochs`,
`--epochs 3` and `--no-save-lora-only` (`clipgraft.cli.terminal`).
"""

from __future__ import annotations

import difflib
import json
import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any, Literal, TypeVar, get_args

from pydantic import AfterValidator, BaseModel, BeforeValidator, ConfigDict, Field, ValidationError

from clipgraft.errors import together

if TYPE_CHECKING:
    from typing_extensions import Self

_PLAIN = {
    "int_parsing": "a whole number",
    "int_type": "a whole number",
    "int_from_float": "a whole number",
    "int_parsing_size": "a whole number",
    "float_parsing": "a number",
    "float_type": "a number",
    "finite_number": "a finite number",
    "bool_parsing": "true or false",
    "bool_type": "true or false",
    "string_type": "text",
}
_LONGEST = 100  # characters of a value in a message
_LONG_NUMBER = 10**100


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


def shares(value: Any) -> Any:
    """`80/10/10` -> ("80", "10", "10"); anything but text passes."""
    return tuple(value.split("/")) if isinstance(value, str) else value


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


def _auto_or_count(value: Any) -> Any:
    if value == "auto":
        return value
    if isinstance(value, bool) or not str(value).removeprefix("-").isdecimal():
        raise ValueError("a whole number, or auto")
    number = int(str(value)[:_LONGEST])
    if number < 1:
        raise ValueError("greater than or equal to 1")
    _check_range(number, 1, 10**9, "with more, the run would not end")
    return number


def _auto_or_rate(value: Any) -> Any:
    if value == "auto":
        return value
    try:
        rate = float(value)
    except (TypeError, ValueError, OverflowError):
        raise ValueError("a number above 0, or auto") from None
    if not math.isfinite(rate):
        raise ValueError("a finite number")
    if rate <= 0:
        raise ValueError("greater than 0")
    _check_range(rate, *_PEAK_RATES)
    return rate


_PEAK_RATES = (1e-37, 1e38, "less is 0 in fp32, and more is infinite")


def _auto_or_weight(value: Any) -> Any:
    if value == "auto":
        return value
    try:
        weight = float(value)
    except (TypeError, ValueError, OverflowError):
        raise ValueError("a number above 0, or auto") from None
    if math.isnan(weight) or weight <= 0:
        raise ValueError("a number above 0, or auto")
    _check_range(weight, 0, _MOST_WEIGHT, "with more, the loss leaves the range of fp32")
    return weight


_MOST_WEIGHT = 1e6


def _check_range(value: float, least: float, most: float, why: str) -> None:
    if not least <= value <= most:
        raise ValueError(f"a number from {least:g} to {most:g}: {why}")


@dataclass(frozen=True)
class Within:
    """A check of bounds beyond which a number is certainly a slip of the keyboard.

    Attributes:
        least: the smallest number that passes.
        most: the largest one.
        why: what would come of others.
    """

    least: float
    most: float
    why: str

    def __call__(self, value: float | None) -> float | None:
        if value is not None:
            _check_range(value, self.least, self.most, self.why)
        return value


def within(least: float, most: float, why: str) -> AfterValidator:
    """Bounds beyond which a number is certainly a slip of the keyboard, with what would come of it."""
    return AfterValidator(Within(least, most, why))


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
PeakRate = Annotated[float, within(*_PEAK_RATES)]
AutoCount = Annotated[int | Literal["auto"], BeforeValidator(_auto_or_count)]
AutoRate = Annotated[float | Literal["auto"], BeforeValidator(_auto_or_rate)]
Beta = Annotated[float, within(0, 0.999999, "with more, no run is long enough for the average")]
Power = Annotated[float, within(1e-3, 1e3, "beyond that, the cooldown is a single step")]
ClipNorm = Annotated[float, within(1e-12, 1e12, "less stops all learning, and more clips nothing")]
Dropout = Annotated[float, within(0, 0.99, "with more, next to nothing of the adapter's path is left")]
Gigabytes = Annotated[float, within(1e-6, 1e6, "with less, nothing fits in; with more, no disk holds it")]
AutoWeight = Annotated[float | Literal["auto"], BeforeValidator(_auto_or_weight)]
LossWeight = Annotated[float, within(0, _MOST_WEIGHT, "with more, the loss leaves the range of fp32")]
CacheWeight = Annotated[float, within(0, 1e4, "with more, class texts have no say")]
CacheSharpness = Annotated[float, within(1e-3, 1e4, "beyond that, cached images count all alike or none")]
AdapterWeight = Annotated[float, within(-1e6, 1e6, "beyond that, weights leave the range of fp32")]
Points = Annotated[float, within(0, 100, "there are no more to lose")]
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
    """Marks a field that the command line takes by its place instead of by a flag.

    Attributes:
        many: it takes all words from its place on; the last of a group alone may.
    """

    many: bool = False


@dataclass(frozen=True)
class Repeated:
    """Marks a field whose flag may be given several times; it receives the list."""


@dataclass(frozen=True)
class Several:
    """Marks a field of words whose flag takes all that follow it up to the next flag.

    The flag may be given several times, and commas separate words too; the field receives all of them. For
    commands that take nothing by its place, which would be swallowed.
    """


@dataclass(frozen=True)
class PythonOnly:
    """Marks a field that the command line does not offer, because it decides the value in another way."""


@dataclass(frozen=True)
class Fault:
    """What is wrong with one option.

    Attributes:
        field: its name; empty where several do not go together.
        text: what was given and what is allowed, to be written after the name.
    """

    field: str
    text: str


class Options(BaseModel):
    """Base of every option group: frozen, checked, and without unknown fields.

    Raises:
        ConfigError: every fault, one line each: the field, what was given, what is allowed.
    """

    # YAML reads `name: 2024` as a number; NaN and infinity pass every other check.
    model_config = ConfigDict(
        frozen=True, extra="forbid", protected_namespaces=(), coerce_numbers_to_str=True, allow_inf_nan=False
    )

    def __init__(self, **values: Any) -> None:
        try:
            super().__init__(**values)
        except ValidationError as error:
            found = [_fault(type(self), item) for item in error.errors()]
        else:
            return
        name = type(self).__name__
        raise together(f"{name}: {fault.field}{_joint(fault.text)}{fault.text}" for fault in found)

    @classmethod
    def check(cls, values: Mapping[str, Any]) -> Self | list[Fault]:
        """The options with these values, or what is wrong with them."""
        try:
            made = cls.__new__(cls)
            cls.__pydantic_validator__.validate_python(dict(values), self_instance=made)
        except ValidationError as error:
            found = error.errors()
            # A list that is left empty because its values were wrong is no fault of its own.
            inner = {item["loc"][:1] for item in found if len(item["loc"]) > 1}
            return [_fault(cls, item) for item in found if item["loc"] not in inner]
        return made

    def replace(self, **changes: Any) -> Self:
        """The same options with other values for some; `model_fields_set` tells both apart from defaults.

        Raises:
            ConfigError: a value that is not allowed.
        """
        return type(self)(**{name: getattr(self, name) for name in self.model_fields_set} | changes)


_Kind = TypeVar("_Kind", bound=Options)


def part(options: Options, kind: type[_Kind], **changes: Any) -> _Kind:
    """The options of a group among those of a larger one that derives from it."""
    named = [name for name in kind.model_fields if name in options.model_fields_set]
    return kind(**{name: getattr(options, name) for name in named} | changes)


def given(*groups: Options) -> dict[str, Any]:
    """All options of some groups as one mapping, as a run records them."""
    return {name: value for group in groups for name, value in group.model_dump().items()}


def nearest(name: str, known: Sequence[str]) -> list[str]:
    """The known names that somebody may have meant, at most two."""
    return [name] if name in known else difflib.get_close_matches(name, known, n=2)


def _joint(text: str) -> str:
    return " " if text.startswith("is missing") else ": "


def _fault(kind: type[Options], item: Any) -> Fault:
    where, message = item["loc"], item["msg"].removeprefix("Value error, ").removeprefix("Input should be ")
    if not where:
        return Fault("", message)
    name = str(where[0])
    if item["type"] == "missing":
        info = kind.model_fields[name]
        choices = [repr(c) for c in get_args(info.annotation) if isinstance(c, str)]
        allowed = f"one of {', '.join(choices)}" if choices else info.description
        return Fault(name, f"is missing: {allowed}")
    if item["type"] == "extra_forbidden":
        close = " or ".join(nearest(name, list(kind.model_fields)))
        return Fault(name, f"there is no such option{f' (did you mean {close}?)' if close else ''}")
    message = _PLAIN.get(item["type"], message.replace("String should have", "text with"))
    if item["type"] == "literal_error":
        message = f"one of {item['ctx']['expected']}"
    key = f" at '{where[1]}'" if len(where) > 1 and isinstance(where[1], str) else ""
    return Fault(name, f"got {_short(item['input'])}{key}, allowed is {message}")


def _short(value: Any) -> str:
    """A value as Python writes it, cut to what fits into a line."""
    if isinstance(value, int) and abs(value) >= _LONG_NUMBER:
        return "a number of more than 100 digits"
    told = repr(value)
    return told if len(told) <= _LONGEST else f"{told[: _LONGEST - 1]}…"
