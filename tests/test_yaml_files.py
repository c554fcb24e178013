"""YAML that was written to do harm, or by mistake."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import pytest

from clipgraft.cli.flags.groups import read_yaml
from clipgraft.data.prompts import read_prompts
from clipgraft.errors import ClipgraftError, ConfigError

LAUGHS = "a: &a [x,x,x,x,x,x,x,x,x]\n" + "".join(
    f"{name}: &{name} [{','.join(['*' + before] * 9)}]\n"
    for before, name in zip("abcdefg", "bcdefgh", strict=True)
)
BAD = {
    "date": "name: 2024-13-45\n",
    "number": "lr: !!int foo\n",
    "truth": "lr: !!bool foo\n",
    "time": "lr: !!timestamp x\n",
    "fraction": "lr: !!float x\n",
    "digits": f"lr: {'9' * 5000}\n",
    "deep": f"lr: {'[' * 3000}{']' * 3000}\n",
    "laughs": LAUGHS,
    "itself": "lr: &a [*a]\n",
    "code": "lr: !!python/object/apply:os.system [true]\n",
    "undefined": "lr: *x\n",
    "bytes": "\x00",
    "key": "? [1, 2]\n: 3\n",
    "twice": "lr: 1\nlr: 2\n--lr: 3\n",
}


def outcome(read: Callable[[Path], object], path: Path) -> str | None:
    """What reading a file complains of, if it does."""
    try:
        read(path)
    except ClipgraftError as error:
        return str(error)
    return None


@pytest.mark.parametrize("text", BAD.values(), ids=BAD)
@pytest.mark.parametrize("read", [read_yaml, read_prompts])
def test_bad_yaml_is_one_short_line(read: Callable[[Path], object], text: str, tmp_path: Path) -> None:
    """A few lines of YAML can stand for gigabytes, or raise what no caller catches."""
    path = tmp_path / "x.yaml"
    path.write_text(text, encoding="utf-8")
    told = outcome(read, path)
    assert told is None or (str(path) in told and "\n" not in told and len(told) < 500 + len(str(path)))
    assert told is not None or read is read_prompts  # prompts are text: what is no date may be a sentence


def test_laughs_are_called_aliases(tmp_path: Path) -> None:
    """Whoever used anchors in good faith must learn what to do."""
    (tmp_path / "x.yaml").write_text(LAUGHS, encoding="utf-8")
    with pytest.raises(ConfigError, match=r"aliases \(\*name\) counted; write it out in plain lines"):
        read_yaml(tmp_path / "x.yaml")


def test_a_few_aliases_work(tmp_path: Path) -> None:
    """Anchors are ordinary YAML."""
    (tmp_path / "x.yaml").write_text("lr: &rate 1e-4\nfull-lr: *rate\n", encoding="utf-8")
    assert read_yaml(tmp_path / "x.yaml") == {"lr": "1e-4", "full_lr": "1e-4"}
