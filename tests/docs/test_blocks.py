"""Every block of code in the documentation is run by a test, or stands here with the reason why it is not.

`RUN_ELSEWHERE` names the tests of pages that have their own. This file runs the blocks of all other pages, in
the order of the page, on small data and the embedded base; `NOT_RUN` says what is left out. Commands of all
pages are read by clipgraft's own parser, whether they run or not.
"""

from __future__ import annotations

import importlib.util
import os
import re
import shlex
import shutil
import subprocess
import sys
import textwrap
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest
import torch
import yaml
from PIL import Image
from transformers import BertConfig, BertModel, ByT5Tokenizer

import clipgraft as cg
from clipgraft.cli.declared import declared
from clipgraft.cli.main import VERBS, main
from clipgraft.cli.parser import parse
from doc_pages import PAGES, ROOT

FENCE = re.compile(
    r"^(?:<!-- not run: (?P<why>.+?) -->\n)?(?P<indent> *)```(?P<kind>\w*)\n(?P<body>.*?)^ *```$", re.M | re.S
)
RUN_ELSEWHERE = {
    "README.md": "tests/test_readme.py",
    "docs/your-own-data.md": "tests/test_your_own_data.py",
    "docs/serve.md": "tests/docs/test_serving.py",
}
# Pages whose blocks this file runs.
RUN_HERE = (
    *("docs/classification.md", "docs/compact.md", "docs/distributed.md", "docs/forgetting.md"),
    *(
        "docs/profile.md",
        "docs/notebooks.md",
        "docs/report.md",
        "docs/search.md",
        "docs/shell.md",
        "docs/towers.md",
    ),
)
# How blocks or commands begin that do not run, by page, and why.
NOT_RUN = {
    ("CONTRIBUTING.md", "git clone"): "sets up an environment and runs the whole suite",
    ("CONTRIBUTING.md", "OMP_NUM_THREADS=1 pytest"): "runs tests and the fuzzer, which CI does",
    ("CONTRIBUTING.md", '(("caption^=dog"'): "is a line of the reader's own change",
    ("changelog.d/README.md", "towncrier build"): "tests/release/test_release_files.py builds a changelog",
    ("docs/benchmarks.md", "python -m"): "takes minutes to hours; tests/benchmarks has their parts",
    ("examples/README.md", "pip install"): "each program has a test in tests/examples",
    ("docs/profile.md", "clipgraft inspect hf:openai"): "needs the hub",
    ("docs/search.md", "clipgraft encode photos/ encoded/ --engine ray --ray"): "needs a cluster",
    ("docs/search.md", "clipgraft encode s3://"): "needs a cluster and a bucket",
    ("docs/shell.md", "mkdir -p"): "tests/cli/test_completion_command.py loads the scripts in their shells",
    ("docs/shell.md", "# dropout"): "tests/cli/test_config_command.py reads all that is printed",
}
# Bases that no test can fetch, and numbers that would take long.
INSTEAD = (
    (r"(?<!inspect )(?<!profile )ViT-B-32(?=.* --pretrained|\", pretrained)", "emoji"),
    (r" --pretrained laion2b_s34b_b79k", ""),
    (r", pretrained=\"laion2b_s34b_b79k\"|, \"laion5b_s13b_b90k\"", ""),
    (r"hf:openai/clip-vit-large-patch14-336|xlm-roberta-base-ViT-B-32", "emoji"),
    (r"--epochs \d+", "--epochs 1"),
    (r"epochs=\d+", "epochs=1"),
    (r"--batch-size (32|128)", "--batch-size 8"),
    (r"batch_size=128", "batch_size=8"),
    (r"--seeds 3", "--seeds 1"),
    (r"write_compact\(small, \"small\"\)", 'write_compact(small, "small2")'),  # the command made `small`
    (r"--lora-r 4,16,64", "--lora-r 4"),
    (r"device=f\"cuda:\{world.local_rank\}\"", 'device="cpu"'),
)


@dataclass(frozen=True)
class Block:
    """A block of code of a page."""

    page: str
    kind: str
    body: str
    why_not: str | None

    @property
    def lines(self) -> list[str]:
        """The commands of a block for a shell: continued lines joined, without comments."""
        joined = re.sub(r"\\\n *", "", self.body)
        return [
            line.removeprefix("$ ")
            for line in joined.splitlines()
            if line.strip() and not line.startswith("#")
        ]


def blocks_of(page: Path) -> list[Block]:
    name = page.relative_to(ROOT).as_posix()
    return [
        Block(name, found["kind"], textwrap.dedent(found["body"]), found["why"])
        for found in FENCE.finditer(page.read_text(encoding="utf-8"))
    ]


BLOCKS = [block for page in PAGES for block in blocks_of(page)]
COMMANDS = [(block, line) for block in BLOCKS if block.kind == "bash" for line in block.lines]


def reason(page: str, text: str) -> tuple[str, str] | None:
    """The entry of `NOT_RUN` for a block or a command."""
    return next((key for key in NOT_RUN if key[0] == page and text.startswith(key[1])), None)


def test_every_block_runs_or_says_why_not() -> None:
    """A page shows a command that nobody has ever tried."""
    unknown = []
    for block in BLOCKS:
        if block.kind in ("text", "mermaid", "") or block.why_not or block.page in RUN_ELSEWHERE:
            continue
        runs = block.page in RUN_HERE and block.kind in ("bash", "python")
        if not runs and reason(block.page, block.body) is None:
            unknown.append(f"{block.page}: {block.body.splitlines()[0]}")
    assert unknown == []
    for page, test in RUN_ELSEWHERE.items():
        assert Path(page).name in (ROOT / test).read_text(encoding="utf-8")


def test_what_does_not_run_is_still_there() -> None:
    """A reason outlives its block, and hides the next one that begins alike."""
    texts = [(block.page, block.body) for block in BLOCKS] + [(block.page, line) for block, line in COMMANDS]
    used = {reason(page, text) for page, text in texts}
    assert set(NOT_RUN) - used == set()


def words_of(line: str) -> list[str]:
    """The words of a command, up to what a shell does with its output."""
    words = shlex.split(line, comments=True)
    ends = [at for at, word in enumerate(words) if word in (">", "|", "&", "&&")]
    return words[: min(ends, default=len(words))]


@pytest.mark.parametrize("page", sorted({block.page for block, _ in COMMANDS}))
def test_clipgraft_takes_every_command(page: str) -> None:
    """A page shows a flag that was renamed, or a value that is refused."""
    for block, line in COMMANDS:
        words = words_of(line)
        if block.page == page and words and words[0] in ("clipgraft", "torchrun"):
            verb, *rest = words[words.index("clipgraft") + 1 :]
            assert verb in VERBS, line
            parse(verb, "", declared(verb), rest)


def module(words: list[str]) -> bool:
    """`python -m NAME --flags`: there is such a module, and it reads these flags."""
    if words[1:3] == ["-m", "venv"]:
        return True
    if words[1] != "-m":
        name, source = words[1], ROOT / words[1]
        if not (ROOT / "tests" / "examples" / f"test_{source.name}").is_file():
            return False
    else:
        name = words[2]
        found = importlib.util.find_spec(name)
        assert found is not None
        assert found.origin is not None
        source = Path(found.origin)
        if source.name == "__init__.py":
            source = source.with_name("__main__.py")
    text = source.read_text(encoding="utf-8")
    flags = [word for word in words if word.startswith("--")]
    return all(flag in text or f'"{flag[2:].replace("-", "_")}"' in text for flag in flags)


def extras(words: list[str]) -> bool:
    """`pip install 'clipgraft[a,b]'`: there are such extras."""
    text = (ROOT / "pyproject.toml").read_text(encoding="utf-8")
    named = [name for word in words for name in re.findall(r"\[(.+)\]", word)]
    return all(f"\n{name} = [" in text for names in named for name in names.split(","))


def targets(words: list[str]) -> bool:
    text = (ROOT / "Makefile").read_text(encoding="utf-8")
    return all(re.search(rf"^{word}:", text, re.M) for word in words[1:] if "=" not in word)


def paths(words: list[str]) -> bool:
    return all((ROOT / word).exists() for word in words if word.startswith("tests/"))


# What commands that are not clipgraft's own are held against.
OTHERS: dict[str, Callable[[list[str]], bool]] = {
    "python": module,
    "python3": module,
    "pip": extras,
    "make": targets,
    "pytest": paths,
    "towncrier": lambda words: words[1] in ("build", "create"),
    "torchrun": lambda words: "clipgraft" in words,
    **dict.fromkeys((".", "git", "mkdir"), lambda words: True),
    # tests/docs/test_serving.py runs them, or compares them with the files they are for.
    **dict.fromkeys(("curl", "printf", "sudo", "docker", "xdg-open"), lambda words: True),
}


def test_other_commands_are_ones_that_exist() -> None:
    """A page names a program, an extra or a target of make that is gone."""
    wrong = []
    for block, line in COMMANDS:
        words = [word for word in words_of(line) if not re.match(r"[A-Z_]+=", word)]
        if not words or words[0] in ("clipgraft", "-d") or line.startswith(" "):
            continue
        if words[0] not in OTHERS or not OTHERS[words[0]](words):
            wrong.append(f"{block.page}: {line}")
    assert wrong == []


@pytest.fixture(scope="module")
def prepared(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """What the pages' commands name: tables, pictures, a run, a folder of classes."""
    root = tmp_path_factory.mktemp("pages")
    for split in ("train", "val", "test"):
        tables = cg.emoji.write_scenes(root / "scenes", split, 20, ["vi", "en"])
    for name, split in {"train": "train", "pairs": "train", "captions": "train", "val": "val"}.items():
        text = (root / "scenes" / f"{split}.vi.csv").read_text(encoding="utf-8")
        (root / f"{name}.csv").write_text(text.replace("images/", "scenes/images/"), encoding="utf-8")
    assert tables["en"].is_file()
    shutil.copytree(root / "scenes" / "images", root / "photos")
    with Image.open(root / "photos" / "val_00000.png") as picture:
        picture.convert("RGB").save(root / "dog.jpg")
    source = cg.emoji.write_classes(root / "classes", "train", 5)
    for name in ("actions", "test"):
        shutil.copytree(source, root / name)
    prompts = {path.name: f"a picture of {path.name}" for path in sorted(source.iterdir()) if path.is_dir()}
    (root / "prompts.yaml").write_text(yaml.safe_dump(prompts), encoding="utf-8")
    return root


def run_bash(block: Block) -> None:
    for line in block.lines:
        if reason(block.page, line) or not re.match(r"clipgraft |torchrun ", line):
            continue
        line = instead(line)
        if line.startswith("torchrun "):
            command = [sys.executable, "-m", "torch.distributed.run", *words_of(line)[1:]]
            done = subprocess.run(command, capture_output=True, text=True, check=False, env=with_source())
            assert done.returncode == 0, done.stderr[-3000:]
        else:
            assert main(words_of(line)[1:]) == 0, line


def with_source() -> dict[str, str]:
    """The environment of a process that imports clipgraft from where this one does."""
    return {**os.environ, "PYTHONPATH": str(Path(cg.__file__).parents[1]), "OMP_NUM_THREADS": "1"}


def instead(text: str) -> str:
    for pattern, other in INSTEAD:
        text = re.sub(pattern, other, text)
    return text


def names(page: str) -> dict[str, Any]:
    """What a program of a page has from before."""
    found: dict[str, Any] = {"cg": cg, "pairs": cg.read_pairs("pairs.csv")}
    if page == "docs/towers.md":
        tower = {"hidden_size": 32, "intermediate_size": 48, "num_hidden_layers": 2, "num_attention_heads": 2}
        images = found["pairs"].images
        found |= {"text_model": BertModel(BertConfig(**tower, vocab_size=384)), "tokenizer": ByT5Tokenizer()}
        found |= {"image_features": torch.nn.functional.normalize(torch.randn(len(images), 32), dim=-1)}
    return found


@pytest.mark.slow
@pytest.mark.parametrize("page", RUN_HERE)
def test_a_page_runs_from_top_to_bottom(
    page: str, prepared: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Somebody types what the page shows, and it fails."""
    work = tmp_path / "work"
    shutil.copytree(prepared, work)
    monkeypatch.chdir(work)
    (work / "examples").symlink_to(ROOT / "examples")
    if page in ("docs/report.md", "docs/search.md"):
        training = "train --train-data train.csv --val-data val.csv --use-lora --lr 1e-3 --name vi"
        assert main([*training.split(), "--epochs", "1", "--batch-size", "8"]) == 0
        for other in ("logs/ranks", "runs/vi"):
            shutil.copytree("logs/vi", other)
    space = names(page)
    ran = 0
    for block in blocks_of(ROOT / page):
        if block.why_not or reason(page, block.body):
            continue
        if block.kind == "bash":
            run_bash(block)
            ran += 1
        elif block.kind == "python":
            exec(compile(instead(block.body), page, "exec"), space)
            ran += 1
    assert ran
