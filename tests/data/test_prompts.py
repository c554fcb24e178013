"""Prompts of classes: what is read, what is filled in, and what is refused."""

from __future__ import annotations

import logging
from pathlib import Path

import pytest

from clipgraft.data.prompts import (
    TEMPLATE_SETS,
    WeightedPrompts,
    class_prompts,
    find_templates,
    read_prompts,
    write_prompts,
)
from clipgraft.errors import ConfigError, DataError
from clipgraft.evaluate.classification import prompt_weights


def written(folder: Path, text: str) -> Path:
    path = folder / "prompts.yaml"
    path.write_text(text, encoding="utf-8")
    return path


def test_one_prompt_or_several(tmp_path: Path) -> None:
    """A prompt file of either kind would be refused, or read letter by letter."""
    path = written(tmp_path, "cat: a photo of a cat\nchó:\n  - ảnh một con chó\n  - con chó\n")
    assert read_prompts(path) == {"cat": ("a photo of a cat",), "chó": ("ảnh một con chó", "con chó")}


def test_names_that_yaml_takes_for_values(tmp_path: Path) -> None:
    """Classes called no, on, 1 or 1e3 would turn into False, True and numbers."""
    path = written(tmp_path, "no: x\non: x\n1: x\n1e3: x\n2024-01-01: x\nnull: x\n")
    assert list(read_prompts(path)) == ["no", "on", "1", "1e3", "2024-01-01", "null"]


@pytest.mark.parametrize(
    ("text", "expected"),
    [
        ("", "must map each class"),
        ("- cat\n- dog\n", "must map each class"),
        ("cat:\n", "class 'cat' must have a prompt"),
        ("cat: []\n", "class 'cat' must have a prompt"),
        ("cat: {a: b}\n", "class 'cat' must have a number for each prompt"),
        ("cat: {a: [1]}\n", "class 'cat' must have a number for each prompt"),
        ("cat: {a: -1, b: 2}\n", "class 'cat' must have prompts with a weight each, from 0"),
        ("cat: {a: nan}\n", "class 'cat' must have prompts with a weight each"),
        ("cat: {a: 0, b: 0}\n", "class 'cat' must have prompts with a weight each"),
        ("cat: {' ': 1}\n", "class 'cat' must have a prompt"),
        ("cat: {}\n", "class 'cat' must have a prompt"),
        ("cat: [[a]]\n", "class 'cat' must have a prompt"),
        ("cat: a\ncat: b\n", "class 'cat' is there twice"),
        ("cat: 'a\n", "is not YAML"),
        ("? [a, b]\n: c\n", "is not YAML"),
    ],
)
def test_faulty_files(tmp_path: Path, text: str, expected: str) -> None:
    """A slip in the file would end in a traceback, or in a class without its prompts."""
    with pytest.raises(DataError) as error:
        read_prompts(written(tmp_path, text))
    assert expected in str(error.value)
    assert "prompts.yaml" in str(error.value)
    assert "\n" not in str(error.value)


def test_weights_are_kept(tmp_path: Path) -> None:
    """Weights that were learnt are lost on the way through a file, or on that to the classes of the data."""
    written_down = {
        "no": WeightedPrompts(("a {}: b", "chó", "a {}: b"), (0.25, 1.5, 0.5)),
        "fire_engine": ("a lorry",),
    }
    write_prompts(written_down, tmp_path / "prompts.yaml")
    found = class_prompts(["fire_engine", "no"], read_prompts(tmp_path / "prompts.yaml"))
    assert found == (("a lorry",), WeightedPrompts(("a no: b", "chó"), (0.75, 1.5)))
    weights = prompt_weights(found)
    assert weights is not None
    assert weights.tolist() == pytest.approx([1, 2 / 3, 4 / 3])
    assert prompt_weights([("a", "b"), ("c",)]) is None


def test_a_missing_file(tmp_path: Path) -> None:
    """A mistyped path would end in a traceback."""
    with pytest.raises(DataError, match="check the path"):
        read_prompts(tmp_path / "nothing.yaml")


def test_tags_run_no_code(tmp_path: Path) -> None:
    """A prompt file from the internet could run a command."""
    path = written(tmp_path, f"cat: !!python/object/apply:pathlib.Path.touch [{tmp_path / 'ran'}]\n")
    assert read_prompts(path) == {"cat": (str(tmp_path / "ran"),)}
    assert not (tmp_path / "ran").exists()


def test_underscores_are_spaces() -> None:
    """The model would read fire_engine, a word it has never seen."""
    assert class_prompts(["fire_engine", "cat"], None) == (
        ("a photo of a fire engine.",),
        ("a photo of a cat.",),
    )


def test_own_prompts_before_templates(caplog: pytest.LogCaptureFixture) -> None:
    """A class would silently be left with the template though the file names it, or the other way round."""
    prompts = {"Fire engine": ["a red lorry", "a {} at work"], "cat": ["a cat"]}
    with caplog.at_level(logging.INFO, logger="clipgraft"):
        got = class_prompts(["cat", "dog", "fire_engine"], prompts, ["one {}", "two {}"])
    assert got == (("a cat",), ("one dog", "two dog"), ("a red lorry", "a fire engine at work"))
    assert caplog.messages == ["1 of 3 classes have no prompt and take the templates: dog"]


def test_an_exact_name_wins() -> None:
    """Classes that differ in case alone could not be given different prompts."""
    got = class_prompts(["Polish", "polish"], {"polish": ["for nails"], "Polish": ["from Poland"]})
    assert got == (("from Poland",), ("for nails",))


def test_unknown_names_are_listed_with_near_misses() -> None:
    """A mistyped class would fall back to the template without a word."""
    with pytest.raises(DataError) as error:
        class_prompts(["cat", "dog"], {"dgo": ["x"], "house": ["y"], "cat": ["z"]})
    assert "2 names are no classes of the data: 'dgo' (did you mean 'dog'?), 'house'" in str(error.value)
    assert "the classes are cat, dog" in str(error.value)
    with pytest.raises(DataError, match="'red_panda' is named twice"):
        class_prompts(["red_panda"], {"red_panda": ["x"], "Red Panda": ["y"]})


@pytest.mark.parametrize("texts", [[], "a cat"])
def test_prompts_must_be_a_list(texts: list[str] | str) -> None:
    """A plain string would become one prompt a letter."""
    with pytest.raises(DataError, match="must have a list"):
        class_prompts(["cat"], {"cat": texts})


def test_templates_without_a_place_for_the_name() -> None:
    """Every class would get the same prompt, and accuracy be chance."""
    for templates in (["a photo"], ["a photo of a {c}."], "a photo"):
        with pytest.raises(ConfigError, match=r"has no \{\} for the class name"):
            class_prompts(["cat"], None, templates)
    with pytest.raises(ConfigError, match="none given"):
        find_templates([])


def test_named_sets() -> None:
    """`ensemble` would not be the seven templates that others report their numbers with."""
    import open_clip

    assert find_templates("ensemble") == tuple(t("{}") for t in open_clip.SIMPLE_IMAGENET_TEMPLATES)
    assert find_templates("photo") == find_templates("a photo of a {}.") == TEMPLATE_SETS["photo"]
    assert find_templates(["x {}", "{} y"]) == ("x {}", "{} y")
