"""Make the files that tests/before reads: `python tests/before/make.py FOLDER`.

What stands in this folder was made by the version of 2026-11-27, before the house was rebuilt (5b05f2c~1), on
the embedded base of 2026-11-28. It is not made again when a format changes: that is what it is for.
"""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path
from typing import Any

from PIL import Image

COLOURS = ("red", "green", "blue", "black", "white", "orange", "purple", "brown")


def main(folder: Path) -> None:
    """Eight pictures, a run over them, its adapter in another form, and the pictures encoded."""
    (folder / "pictures").mkdir(parents=True)
    lines = ["filepath\ttitle"]
    for number, colour in enumerate(COLOURS):
        name = f"pictures/{number}.png"
        Image.new("RGB", (48, 32 + number), colour).save(folder / name)
        lines.append(f"{name}\ta {colour} card")
    (folder / "pairs.tsv").write_text("\n".join(lines) + "\n", encoding="utf-8")
    data = ["--train-data", "pairs.tsv", "--val-data", "pairs.tsv"]
    settings = ["--use-lora", "--lora-r", "2", "--lora-targets", "text.*.q,v", "--batch-size", "4"]
    settings += ["--epochs", "1", "--lr", "1e-3", "--workers", "0", "--feature-cache", "none"]
    place = ["--precision", "fp32", "--device", "cpu"]
    clipgraft(folder, "train", *data, *settings, *place, "--logs", ".", "--name", "run")
    clipgraft(folder, "convert", "run/adapter", "guide.pt", "--to", "guide")
    clipgraft(folder, "encode", "pictures", "encoded", "--model", "run/adapter", *place)
    expected = {"features": features(folder), "flags": flags()}
    (folder / "expected.json").write_text(json.dumps(expected, indent=1) + "\n", encoding="utf-8")


def clipgraft(folder: Path, *words: str) -> str:
    """Run a command in the folder."""
    command = [sys.executable, "-m", "clipgraft", *words]
    done = subprocess.run(command, cwd=folder, capture_output=True, text=True)
    if done.returncode:
        raise SystemExit(f"{' '.join(words)}\n{done.stdout}{done.stderr}")
    return done.stdout


def features(folder: Path) -> list[list[float]]:
    """What the adapter gives for two captions, its first eight numbers."""
    import clipgraft as cg

    clip = cg.load(folder / "run" / "adapter")
    return clip.encode_text(["a red card", "a blue card"])[:, :8].tolist()


def flags() -> dict[str, Any]:
    """The flags of every verb, as `--help` lists them."""
    import re

    verbs = ("train", "eval", "sweep", "report", "encode", "index", "search", "merge", "convert", "inspect")
    verbs += ("profile", "compact", "demo")
    found = {}
    for verb in verbs:
        done = clipgraft(Path(), verb, "--help")
        found[verb] = sorted(set(re.findall(r"^  (--[a-z0-9][a-z0-9-]*)", done, re.MULTILINE)))
    return found


if __name__ == "__main__":
    main(Path(sys.argv[1]))
