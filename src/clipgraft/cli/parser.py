"""Parse a command's arguments: the command line, the YAML file and Python share one declaration and check."""

from __future__ import annotations

import argparse
import re
import types
from collections.abc import Sequence
from pathlib import Path
from typing import Annotated, Any, Literal, NoReturn, Union, get_args, get_origin

from pydantic.fields import FieldInfo

from clipgraft.cli.declared import Declared, asked
from clipgraft.cli.flags.groups import (
    AnyGroup,
    Group,
    build_options,
    flag,
    grouped,
    positional_fields,
    read_yaml,
)
from clipgraft.cli.terminal import wording
from clipgraft.errors import ConfigError
from clipgraft.options import Options, Repeated, Several, expressions, words

EXAMPLES = {
    "data": "clipgraft data photos.csv --model emoji --split 80/10/10 --out parts",
    "train": "clipgraft train --model ViT-B-32 --pretrained laion2b_s34b_b79k --train-data photos.csv "
    "--val-data val.csv --use-lora --lora-r 16 --epochs 10",
    "eval": "clipgraft eval --model logs/NAME --val-data test.csv",
    "sweep": 'clipgraft sweep --train-data photos.csv --val-data val.csv --targets "text-attention;linear" '
    "--lora-r 4,16",
    "fewshot": "clipgraft fewshot --train-data train --test-data test --shots 1,4,16 --out fewshot",
    "report": "clipgraft report logs/NAME logs/OTHER --out report.html",
    "encode": "clipgraft encode photos encoded --adapter logs/NAME",
    "index": "clipgraft index encoded --factory IVF256,Flat",
    "search": 'clipgraft search encoded "a red shoe" --k 5',
    "merge": "clipgraft merge logs/NAME merged --to transformers",
    "push": "clipgraft push logs/NAME me/clip-shoes --license apache-2.0",
    "convert": "clipgraft convert adapter.pt adapter --to peft",
    "inspect": "clipgraft inspect ViT-B-32",
    "profile": "clipgraft profile ViT-B-32 --batch-size 8",
    "compact": "clipgraft compact emoji small --text-layers 2 --vision-layers 2",
    "serve": "clipgraft serve --model emoji --adapters vi=logs/vi fr=logs/fr --folders photos=encoded",
    "demo": "clipgraft demo --out demo",
    "config": "clipgraft config train",
    "completion": "clipgraft completion bash",
    "doctor": "clipgraft doctor",
}

HEADINGS = {
    "ModelFlags": "model",
    "DeviceFlags": "machine",
    "ColumnArgs": "data",
    "TableArgs": "data",
    "TableFlags": "data",
    "DataFlags": "data",
    "CacheArgs": "machine",
    "PromptFlags": "classes",
    "ClassFlags": "classes",
    "ClassTrainFlags": "classes",
    "LoraFlags": "adapter",
    "SweepFlags": "grid and adapters",
    "FewShotFlags": "data",
    "FewShotArgs": "modes and shots",
    "TrainArgs": "training",
    "RetainFlags": "training",
    "TranslateFlags": "translations",
    "TranslateArgs": "translations",
    "RunFlags": "output",
    "RunArgs": "output",
    "EvalFlags": "evaluation",
    "EncodeFlags": "encoding",
    "EncodeArgs": "encoding",
    "DistillFlags": "distillation",
    "ServiceArgs": "serving",
    "WebArgs": "server",
}
ORDER = (
    "model",
    "data",
    "adapter",
    "modes and shots",
    "grid and adapters",
    "training",
    "translations",
    "distillation",
    "evaluation",
    "encoding",
    "serving",
    "server",
    "classes",
    "output",
    "machine",
    "rarely needed",
)
_OUTPUT = ("logs", "name", "html", "format", "overwrite")
_MACHINE = ("device", "precision", "workers", "feature_cache", "cache_gb")
_FIRST = ("recipe", "use_lora", "lora_r", "lora_targets", "train_data", "val_data", "test_data")
_RARE = frozenset(
    (
        "beta1",
        "beta2",
        "cache_gb",
        "cache_views",
        "checkpoint_steps",
        "class_weights",
        "csv_separator",
        "dataset_type",
        "epoch_parts",
        "epochs_cooldown",
        "eps",
        "exact_preprocess",
        "force",
        "lock_image_unlocked_groups",
        "lock_text_unlocked_layers",
        "lora_alpha_pattern",
        "lora_bias",
        "lora_init",
        "lora_plus_ratio",
        "lora_rank_pattern",
        "lora_rslora",
        "lora_target_modules",
        "lora_train_logit_scale",
        "lora_variant_options",
        "loss",
        "lr_cooldown_end",
        "lr_cooldown_power",
        "lr_end",
        "max_bad_rows",
        "negatives",
        "norms_only",
        "peft_out_proj",
        "ray_address",
        "ray_gpus_per_worker",
        "ray_workers",
        "retry_errors",
        "save_lora_only",
        "shard_rows",
        "steps",
        "strict",
    )
)


def heading(spec: str, field: str, otherwise: str) -> str:
    """Choose the heading of a flag in a command's help."""
    if field in _RARE:
        return "rarely needed"
    if field in _MACHINE:
        return "machine"
    return "output" if field in _OUTPUT else HEADINGS.get(spec, otherwise)


def in_order(headings: list[str]) -> list[str]:
    """Sort the headings of a command: its own first, then the shared ones in the order of need."""
    return sorted(headings, key=lambda name: ORDER.index(name) if name in ORDER else -1)


def first(field: str) -> int:
    """Sort key of the flags of a heading: those that nearly every command line has come first."""
    return _FIRST.index(field) if field in _FIRST else len(_FIRST)


_TRUTHS = ("true", "false", "yes", "no", "on", "off", "1", "0")
_NO_VALUE = "{flag} is a switch and takes no value: write {flag} alone, or {off}"


class _Parser(argparse.ArgumentParser):
    """argparse with errors raised instead of printed with a page of usage."""

    color = False  # Python 3.14 writes escape sequences into help, which standard output does not let pass

    def error(self, message: str) -> NoReturn:
        found = re.fullmatch(r"argument (--[a-z0-9-]+)\S*(?:, \S+)*: ignored explicit argument .*", message)
        if found is not None:
            message = _NO_VALUE.format(flag=found[1], off=f"--no-{found[1][2:]}")
        raise ConfigError(f"{message}; `{self.prog} --help` lists the flags")


def parse(verb: str, summary: str, kinds: Sequence[AnyGroup], argv: Sequence[str]) -> list[Any]:
    """Parse the options of a command; flags win over values of `--config`.

    Raises:
        ConfigError: every unknown flag and unusable value, one line each.
    """
    if asked():
        raise Declared(summary, grouped(kinds))
    prog = f"clipgraft {verb}"
    wording.learn(kinds)
    groups_of = grouped(kinds)
    by_place = positional_fields(kinds)
    places, many = list(by_place), [name for name, takes_many in by_place.items() if takes_many]
    shown = [f"{name.upper()}…" if name in many else name.upper() for name in places]
    usage = " ".join([f"{prog} [--flags]", *shown])
    parser = _Parser(
        prog,
        usage=usage,
        description=summary + (f"\n\nexample:\n  {EXAMPLES[verb]}" if verb in EXAMPLES else ""),
        formatter_class=argparse.RawDescriptionHelpFormatter,
        allow_abbrev=False,
    )
    fields = in_help(groups_of)
    groups = {title: parser.add_argument_group(title) for title in dict.fromkeys(t for t, _, _ in fields)}
    for title, name, info in fields:
        if name in places:
            _show(groups[title], name, info)
        else:
            _add(groups[title], name, info)
    parser.add_argument("--config", type=Path, metavar="YAML", help="read flags from a file; flags given win")
    known, unknown = parser.parse_known_args(list(argv))
    placed: list[Any] = [argument for argument in unknown if not _looks_like_a_flag(argument)]
    if many and len(placed) >= len(places):
        placed[len(places) - 1 :] = [placed[len(places) - 1 :]]
    values = {**dict(zip(places, placed, strict=False)), **vars(known)}
    for name in [name for _, name, info in fields if name in values and is_marked(info, Several)]:
        values[name] = [word for given in values[name] for word in words(given)]
    config = values.pop("config")
    merged: dict[str, Any] = {} if config is None else read_yaml(config)
    merged.update(values)
    flags = [argument.partition("=")[0] for argument in unknown if _looks_like_a_flag(argument)]
    if len(placed) > len(places) and not flags:
        extra = placed[len(places)]
        if (switch := _switch_before(extra, argv, groups_of)) is not None:
            raise ConfigError(_NO_VALUE.format(flag=flag(switch), off=flag(f"no_{switch}")))
        raise ConfigError(f"'{extra}' belongs to no flag; `clipgraft {verb} --help` lists the flags")
    return build_options(kinds, merged, unknown_flags=flags)


def in_help(groups: Sequence[Group]) -> list[tuple[str, str, FieldInfo]]:
    """List heading, name in field spelling and declaration of a command's options, as its help has them."""
    places = positional_fields(groups)
    fields = [
        (heading(group.kind.__name__, name, _title(group.kind)), name, info)
        for group in groups
        for name, info in group.fields.items()
    ]
    titles = in_order(list(dict.fromkeys(title for title, _, _ in fields)))
    return sorted(fields, key=lambda field: (titles.index(field[0]), field[1] not in places, first(field[1])))


def _title(kind: type[Options]) -> str:
    return (kind.__doc__ or "").split(";")[0].rstrip(".\n").lower()


def _switch_before(word: Any, argv: Sequence[str], groups: Sequence[Group]) -> str | None:
    """Find the switch that a word like `true` was written after."""
    at = list(argv).index(word) if word in argv else 0
    if not at or str(word).lower() not in _TRUTHS:
        return None
    name = argv[at - 1].removeprefix("--").replace("-", "_")
    infos = [group.fields[name] for group in groups if name in group.fields]
    return name if infos and infos[0].annotation is bool else None


def _show(group: argparse._ArgumentGroup, name: str, info: FieldInfo) -> None:
    """Show a positional only in the help: argparse would look for it before the first flag only."""
    action = group.add_argument(name, nargs="?", metavar=name.upper(), help=info.description)
    action.nargs = action.default = argparse.SUPPRESS


def _looks_like_a_flag(argument: str) -> bool:
    return argument.startswith("-") and argument != "-" and not argument[1:2].isdigit()


def _add(group: argparse._ArgumentGroup, name: str, info: FieldInfo) -> None:
    plain = info.is_required() or info.default is None or info.default is False or info.default == {}
    default = "" if plain else f" (default: {_written(info)})"
    text = wording(f"{info.description or ''}{default}").replace("%", "%%")
    if info.annotation is bool:
        group.add_argument(
            flag(name), dest=name, action=argparse.BooleanOptionalAction, default=argparse.SUPPRESS, help=text
        )
    elif is_marked(info, Repeated):
        group.add_argument(
            flag(name), dest=name, action="append", default=argparse.SUPPRESS, metavar="KEY=VALUE", help=text
        )
    elif is_marked(info, Several):
        group.add_argument(
            flag(name),
            dest=name,
            action="extend",
            nargs="+",
            default=argparse.SUPPRESS,
            metavar="A",
            help=text,
        )
    else:
        group.add_argument(flag(name), dest=name, default=argparse.SUPPRESS, metavar=metavar(info), help=text)


def is_marked(info: FieldInfo, mark: type) -> bool:
    """Whether a field bears one of the marks of `clipgraft.options`."""
    return any(isinstance(found, mark) for found in info.metadata)


def _written(info: FieldInfo) -> str:
    """The default as it is typed on a command line."""
    default = info.default
    if isinstance(default, tuple):
        return (";" if _has_semicolons(info) else ",").join(map(str, default))
    return "on" if default is True else str(default)


def _has_semicolons(info: FieldInfo) -> bool:
    return any(getattr(mark, "func", None) is expressions for mark in info.metadata)


def metavar(info: FieldInfo) -> str:
    """What stands for the value of a flag in the help."""
    if _has_semicolons(info):
        return "A;B"
    kinds = flatten(info.annotation)
    choices = choices_of(info)
    number = "N" if int in kinds else "X" if float in kinds else ""
    if choices and number:
        return f"{number}|{'|'.join(choices)}"
    if choices:
        return "{" + ",".join(choices) + "}"
    if tuple[int, int] in kinds:
        return "N|HxW"
    for kind, label in ((int, "N"), (float, "X"), (Path, "PATH"), (tuple, "A,B"), (dict, "SITES=N,…")):
        if any(found is kind or get_origin(found) is kind for found in kinds):
            return label
    return "TEXT"


def choices_of(info: FieldInfo) -> list[str]:
    """Return the words that a field allows; empty where there is no list of them."""
    kinds = flatten(info.annotation)
    return [str(choice) for kind in kinds if get_origin(kind) is Literal for choice in get_args(kind)]


def flatten(annotation: Any) -> list[Any]:
    """Split a union into its types, without their validators."""
    if get_origin(annotation) in (Union, types.UnionType):
        return [kind for part in get_args(annotation) for kind in flatten(part)]
    return flatten(get_args(annotation)[0]) if get_origin(annotation) is Annotated else [annotation]
