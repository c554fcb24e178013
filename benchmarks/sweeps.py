"""`python -m benchmarks.sweeps FOLDER`: the tables of ranks and of target sets, on generated data.

Runs `clipgraft sweep` twice; what is finished in FOLDER is not run again. An hour of one quiet core.
"""

from __future__ import annotations

import os
import sys
from collections.abc import Sequence
from pathlib import Path

import yaml

from clipgraft.cli import main as clipgraft
from clipgraft.emoji.classes import emoji_prompts, write_classes
from clipgraft.emoji.scenes import write_scenes

_PROMPTS_A_CLASS = 4
_COMMON = ("--model", "emoji", "--seeds", "3", "--wd", "0.1", "--logs", "logs")
_RANKS = (
    *("--train-data", "scenes/train.vi.csv", "--val-data", "scenes/test.vi.csv"),
    *("--test-data", "scenes/test.en.csv"),
    *("--targets", "text-attention;linear-text,text.token_embedding,text.proj"),
    *("--lora-r", "4,16,32,64", "--lr", "4e-3", "--full-lr", "1e-3", "--epochs", "3", "--batch-size", "128"),
    *("--warmup", "40", "--lora-dropout", "0", "--name", "ranks"),
)
_SETS = (
    *("--task", "classification", "--train-data", "classes/train", "--val-data", "classes/val"),
    *("--test-data", "classes/test", "--prompts", "prompts.yaml", "--lora-r", "16", "--targets"),
    "linear;linear-text;linear-vision;linear+embedding;linear+embedding-text;linear+embedding-vision",
    *("--lr", "2e-3", "--full-lr", "3e-4", "--epochs", "6", "--batch-size", "64", "--warmup", "9"),
    *("--name", "sets"),
)


def main(argv: Sequence[str]) -> int:
    """Make the data, run both sweeps, and write one page of both."""
    folder = Path(argv[0] if argv else "sweeps")
    folder.mkdir(parents=True, exist_ok=True)
    os.chdir(folder)
    write_scenes(Path("scenes"), "train", 4000, ["vi"])
    write_scenes(Path("scenes"), "test", 1000, ["vi", "en"])
    for split, per_class in (("train", 40), ("val", 20), ("test", 20)):
        write_classes(Path("classes"), split, per_class)
    prompts = {name: list(texts[:_PROMPTS_A_CLASS]) for name, texts in emoji_prompts().items()}
    Path("prompts.yaml").write_text(yaml.safe_dump(prompts, allow_unicode=True), encoding="utf-8")
    for words in (_RANKS, _SETS):
        if code := clipgraft(["sweep", *_COMMON, *words]):
            return code
    return clipgraft(["report", "logs/ranks", "logs/sets", "--out", "report.html"])


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
