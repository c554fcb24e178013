"""Write the prompts of classes, which a text encoder turns into a classifier."""

from __future__ import annotations

import logging
from collections import Counter
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, overload

from clipgraft.data.datasets import near_misses
from clipgraft.errors import ConfigError, DataError
from clipgraft.files import write_text
from clipgraft.readers import load_yaml
from clipgraft.records import shown

log = logging.getLogger("clipgraft")

_MOST_WEIGHT = 1e6
DEFAULT_TEMPLATES = ("a photo of a {}.",)
TEMPLATE_SETS: dict[str, tuple[str, ...]] = {
    "photo": DEFAULT_TEMPLATES,
    # The seven of OpenAI's "Prompt Engineering for ImageNet" notebook that did as well as all eighty.
    "ensemble": (
        "itap of a {}.",
        "a bad photo of the {}.",
        "a origami {}.",
        "a photo of the large {}.",
        "a {} in a video game.",
        "art of the {}.",
        "a photo of the small {}.",
    ),
}


@dataclass(frozen=True)
class WeightedPrompts(Sequence[str]):
    """Prompts of a class whose features are averaged with weights.

    Attributes:
        texts: the prompts.
        weights: one each, 0 or more and not all 0; only their proportions count.

    Raises:
        DataError: weights that are not that.
    """

    texts: tuple[str, ...]
    weights: tuple[float, ...]

    def __post_init__(self) -> None:
        bounded = all(0 <= weight <= _MOST_WEIGHT for weight in self.weights)
        if len(self.weights) != len(self.texts) or not bounded or not any(self.weights):
            raise DataError(
                f"must have prompts with a weight each, from 0 to {_MOST_WEIGHT:g}, not all of them 0"
            )

    def __len__(self) -> int:
        return len(self.texts)

    @overload
    def __getitem__(self, place: int) -> str: ...
    @overload
    def __getitem__(self, place: slice) -> Sequence[str]: ...
    def __getitem__(self, place: int | slice) -> str | Sequence[str]:
        return self.texts[place]

    def __iter__(self) -> Iterator[str]:
        return iter(self.texts)


def class_words(name: str) -> str:
    """Turn a class name into words: `fire_engine` reads "fire engine"."""
    return " ".join(name.replace("_", " ").split())


def find_templates(chosen: str | Sequence[str]) -> tuple[str, ...]:
    """Return the templates of a named set ("photo", "ensemble"), or those given: one, or several.

    Raises:
        ConfigError: a template has no `{}` for the class name, and is not the name of a set.
    """
    if isinstance(chosen, str):
        return TEMPLATE_SETS.get(chosen) or _checked([chosen])
    return _checked(chosen)


def read_prompts(path: Path) -> dict[str, Sequence[str]]:
    """Read prompts from a YAML file: for each class a prompt, a list of them, or prompts with weights.

    Everything is read as text: a class may be called `no`, `1` or `null` without quotes.

    Raises:
        DataError: the file is missing, is no such YAML, names a class twice, or leaves one without a prompt.
    """
    loaded = _read_yaml(path)
    if not isinstance(loaded, dict) or not loaded:
        raise DataError(f"{path}: must map each class to its prompts, like `cat: a photo of a cat`")
    return {name: _texts(path, name, value) for name, value in loaded.items()}


def write_prompts(prompts: Mapping[str, Sequence[str]], path: Path) -> None:
    """Write prompts as a YAML file that `read_prompts` reads, with the weights of those that have some."""
    import yaml

    values = {
        name: _added_up(group) if isinstance(group, WeightedPrompts) else list(group)
        for name, group in prompts.items()
    }
    write_text(path, yaml.safe_dump(values, allow_unicode=True, sort_keys=False, width=1000))


def class_prompts(
    classes: Sequence[str],
    prompts: Mapping[str, Sequence[str]] | None,
    templates: Sequence[str] = DEFAULT_TEMPLATES,
) -> tuple[Sequence[str], ...]:
    """Return the prompts of each class, in the order of `classes`.

    A class takes its own `prompts`, found by its name, or by its words in any case: `Fire engine` is
    `fire_engine`. A class without any takes `templates`, with its words for `{}`, which is also filled in
    prompts; one log line counts those.

    Raises:
        ConfigError: a template has no `{}`.
        DataError: prompts that name no class, or name one twice; a class with an empty list.
    """
    templates = _checked(templates)
    own = _by_class(classes, prompts or {})
    without = [name for name in classes if name not in own]
    if prompts and without:
        shown = ", ".join(without[:10]) + (", ..." if len(without) > 10 else "")
        log.info(
            "%d of %d classes have no prompt and take the templates: %s", len(without), len(classes), shown
        )
    return tuple(_filled(own.get(name, templates), name) for name in classes)


def _filled(prompts: Sequence[str], name: str) -> Sequence[str]:
    texts = tuple(text.replace("{}", class_words(name)) for text in prompts)
    return WeightedPrompts(texts, prompts.weights) if isinstance(prompts, WeightedPrompts) else texts


def _by_class(classes: Sequence[str], prompts: Mapping[str, Sequence[str]]) -> dict[str, Sequence[str]]:
    exact = set(classes)
    by_words = {class_words(name).casefold(): name for name in reversed(classes)}
    own: dict[str, Sequence[str]] = {}
    unknown = []
    for written, texts in prompts.items():
        name = written if written in exact else by_words.get(class_words(written).casefold())
        if name is None:
            unknown.append(written)
            continue
        if name in own:
            raise DataError(f"prompts: class '{name}' is named twice, once as '{written}'; keep one of them")
        if isinstance(texts, str) or not texts:
            raise DataError(f"prompts: class '{name}' must have a list of one or more prompts")
        own[name] = texts
    if unknown:
        count = f"{len(unknown)} name" + (" is no class" if len(unknown) == 1 else "s are no classes")
        advice = f"the classes are {', '.join(classes[:10])}{', ...' if len(classes) > 10 else ''}"
        raise DataError(f"prompts: {count} of the data: {near_misses(unknown, classes)}; {advice}")
    return own


def _checked(templates: Sequence[str]) -> tuple[str, ...]:
    if isinstance(templates, str):
        templates = (templates,)
    if not templates:
        raise ConfigError('templates: none given; give one or more, such as "a photo of a {}."')
    wrong = [template for template in templates if "{}" not in template]
    if wrong:
        sets = ", ".join(TEMPLATE_SETS)
        raise ConfigError(
            f'template "{wrong[0]}" has no {{}} for the class name; add it, or use a set: {sets}'
        )
    return tuple(templates)


def _texts(path: Path, name: Any, value: Any) -> Sequence[str]:
    if isinstance(value, dict) and isinstance(name, str):
        return _weighted(path, name, value)
    texts = value if isinstance(value, list) else [value]
    if not isinstance(name, str) or not texts or not all(isinstance(t, str) and t.strip() for t in texts):
        wrong = "must have a prompt, a list of prompts, or prompts with weights, and nothing else"
        raise DataError(f"{path}: class {shown(name)} {wrong}")
    return tuple(text.strip() for text in texts)


def _added_up(prompts: WeightedPrompts) -> dict[str, float]:
    """The weight of each prompt; one that is there twice has the sum."""
    found: dict[str, float] = {}
    for text, weight in zip(prompts.texts, prompts.weights, strict=True):
        found[text] = found.get(text, 0.0) + weight
    return found


def _weighted(path: Path, name: str, value: Mapping[Any, Any]) -> WeightedPrompts:
    texts = tuple(_texts(path, name, list(value)))
    try:
        return WeightedPrompts(texts, tuple(float(weight) for weight in value.values()))
    except DataError as error:
        raise DataError(f"{path}: class {shown(name)} {error}") from None
    except (TypeError, ValueError):
        raise DataError(f"{path}: class {shown(name)} must have a number for each prompt") from None


def _read_yaml(path: Path) -> Any:
    import yaml

    class Loader(yaml.BaseLoader):
        """Scalars stay text, and a key given twice is a fault."""

        def construct_mapping(self, node: yaml.MappingNode, deep: bool = False) -> dict[Any, Any]:
            names = [key.value for key, _ in node.value if isinstance(key, yaml.ScalarNode)]
            twice = [name for name, count in Counter(names).items() if count > 1]
            if twice:
                raise DataError(f"{path}: class '{twice[0]}' is there twice; put its prompts into one list")
            return super().construct_mapping(node, deep)

    return load_yaml(path, Loader, DataError, str(path))
