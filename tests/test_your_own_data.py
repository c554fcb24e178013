"""`docs/your-own-data.md`: its commands run as they stand, and it quotes what clipgraft prints."""

from __future__ import annotations

import ast
import re
import shlex
from collections.abc import Callable
from functools import cache
from pathlib import Path

import pytest

from clipgraft.cli import main
from clipgraft.cli.flags.search import SearchFlags
from clipgraft.cli.terminal import Wording
from clipgraft.cli.train import _KINDS
from tiny_pictures import write_pictures

ROOT = Path(__file__).parents[1]
PAGE = (ROOT / "docs" / "your-own-data.md").read_text(encoding="utf-8")
BLOCKS = re.findall(r"^(<!-- not run: .+? -->\n)?```(python|bash|text)\n(.+?)^```", PAGE, re.M | re.S)
TROUBLE = PAGE.split("## When something goes wrong", 1)[1]
QUOTED = [
    quote for row in re.findall(r"^\| (`.+?) \| ", TROUBLE, re.M) for quote in re.findall(r"`([^`]+)`", row)
]
Answer = tuple[int, str]


@cache
def messages() -> tuple[str, ...]:
    """Every string of the library, options as flags, with … for what is put in when it runs."""
    wording, found = Wording(), list[str]()
    wording.learn([*_KINDS, SearchFlags])
    for path in sorted((ROOT / "src" / "clipgraft").rglob("*.py")):
        for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
            if isinstance(node, ast.JoinedStr):
                parts = (part.value if isinstance(part, ast.Constant) else "…" for part in node.values)
                found.append("".join(map(str, parts)))
            elif isinstance(node, ast.Constant) and isinstance(node.value, str):
                found.append(re.sub(r"%[\d.]*[sdfg]", "…", node.value).replace("%%", "%"))
    return tuple(text for message in found for text in (message, wording(message)))


def plain(text: str) -> str:
    """Without the …, so that what stands between them decides."""
    return "".join(text.replace("'…'", "…").split())


@pytest.mark.parametrize("quote", QUOTED)
def test_quoted_messages_are_in_the_source(quote: str) -> None:
    """Who searches the page for the message on their screen finds one that clipgraft no longer prints."""
    wanted = plain(quote).strip("…")
    assert len(wanted) >= 10
    assert any(wanted in plain(message) for message in messages()), quote


def test_there_are_entries_for_every_kind_of_trouble() -> None:
    """The table was lost, or is no longer read by the test above."""
    assert len(QUOTED) > 35
    assert TROUBLE.count("\n### ") >= 7


@pytest.fixture
def clipgraft(
    capsys: pytest.CaptureFixture[str], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> Callable[[str], Answer]:
    """Run a line of the page in an empty folder; gives the exit code and all that it printed."""
    monkeypatch.chdir(tmp_path)

    def run(line: str) -> Answer:
        capsys.readouterr()
        code = main(shlex.split(line)[1:])
        return code, "".join(capsys.readouterr())

    return run


@pytest.mark.parametrize(
    ("line", "quote"),
    [
        ("eval --val-data data/pairs.csv --csv-img-key file", 'no column "…"; it has …'),
        ("eval --val-data data/semicolons.csv --csv-separator ,", "it reads as one column"),
        ("eval --val-data data/latin.csv", "byte 0x… on line … is not valid …"),
        ("eval --val-data data/lost.csv", "none of its … rows can be used (…)"),
        ("eval --val-data data/broken.csv", "the file is cut short (…); copy or download it again"),
        ("eval --val-data data/mixed.csv", "not found in …"),
        ("eval --val-data data/mixed.csv", "put cells that hold … in double quotes"),
        (
            "eval --val-data data/lost.csv --max-bad-rows 1",
            "more than … rows cannot be used (…); correct them",
        ),
        (
            "train --train-data data/pairs.csv",
            "… captions do not fill one batch of --batch-size …",
        ),
        ("train --train-data data/pairs.csv --lora-r 4", "… given without --use-lora: add --use-lora"),
        (
            "train --train-data data/pairs.csv --use-lora --lora-targets tekst",
            "matches no site of this model",
        ),
        (
            "train --train-data data/pairs.csv --lock-image --lock-text",
            "nothing to train: both towers are frozen",
        ),
        (
            "eval --val-data data/pairs.csv --adapter data",
            "no adapter at …: an adapter is a folder with … and … in it",
        ),
        (
            "eval --val-data data/pairs.csv --device cuda:9",
            "--device …: torch sees … here; use --device auto",
        ),
        ("search data cat", "… holds no encoded images or texts"),
    ],
)
def test_quoted_messages_are_printed(
    line: str, quote: str, clipgraft: Callable[[str], Answer], tmp_path: Path, tiny_config: Path
) -> None:
    """The page quotes a message for a mistake at which clipgraft says something else."""
    assert quote in TROUBLE
    spoil(tmp_path / "data")
    base = "" if line.startswith("search") else f" --model {shlex.quote(str(tiny_config))} --pretrained none"
    _, printed = clipgraft(f"clipgraft {line}{base}")
    assert "Traceback" not in printed
    assert re.search(".+?".join(map(re.escape, quote.strip("… ").split("…"))), printed), printed


def spoil(folder: Path) -> None:
    """Pictures and a good table, and one table for each usual fault."""
    write_pictures(folder)
    tables = {
        "semicolons.csv": "image;caption\n0.png;a dog\n",
        "lost.csv": "image,caption\ngone.png,a dog\nlost.png,a cat\n",
        "broken.csv": "image,caption\nbroken.png,a dog\n0.png,a cat\n",
        "mixed.csv": "caption,image\na cat,0.png\na dog,gone.png\na dog, and a cat,1.png\n",
    }
    for name, text in tables.items():
        (folder / name).write_text(text, encoding="utf-8")
    (folder / "latin.csv").write_bytes("image,caption\n0.png,café\n".encode("latin-1"))
    (folder / "broken.png").write_bytes((folder / "0.png").read_bytes()[:1500])


def test_its_commands_run(clipgraft: Callable[[str], Answer]) -> None:
    """Who follows the page step by step is stopped by one of them."""
    ran = []
    for skip, kind, body in BLOCKS:
        if skip or kind == "text":
            continue
        if kind == "python":
            exec(compile(body.replace("size = 1500", "size = 100"), "page", "exec"), {})
            continue
        for line in body.replace("\\\n", " ").splitlines():
            if line.startswith("clipgraft "):
                code, printed = clipgraft(line)
                assert code == 0, f"{line}\n{printed}"
                ran.append((line.split()[1], printed))
    verbs = ["eval", "train", "eval", "report", "encode", "index", "search", "search"]
    assert [verb for verb, _ in ran] == verbs
    for verb, said in {
        "train": "LoRA r=16 on 26 sites (text-matrices)",
        "encode": "1 could not be used: encoded/errors.parquet says why",
        "index": "encoded/index: Flat, 100 vectors of 192, exact",
        "search": "it acts on the text tower alone: the base's image vectors are searched",
    }.items():
        assert all(said in printed for other, printed in ran if other == verb), verb
    assert "line 502: images/lost.png not found in photos" in ran[0][1]
