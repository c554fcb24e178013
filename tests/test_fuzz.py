"""`make fuzz` in small: every reader over some files that were broken on purpose."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[1]
INPUTS = 80
FAMILIES = {
    "tables": [
        "tables.csv",
        "tables.tsv",
        "tables.jsonl",
        "tables.parquet",
        "tables.labelled",
        "tables.folder",
    ],
    "others": ["tables.folder", "texts", "prompts", "settings.yaml", "archives.tar"],
    "encoded": ["encoded.manifest", "encoded.rerun", "encoded.npy", "encoded.parquet", "encoded.index"],
    "adapters": ["weights.latest", "weights.guide", "weights.clip-lora", "weights.adapter", "weights.head"],
    "weights": ["weights.checkpoint", "weights.diffusion", "weights.hf-folder", "weights.torchscript"],
    "runs": ["runs.report", "runs.resume", "runs.sweep", "runs.cache", "runs.kept"],
}


@pytest.mark.parametrize("family", FAMILIES)
def test_broken_files_are_one_line_each(family: str) -> None:
    """A file that was cut short, or comes from elsewhere, ends in a traceback, a crash or a lost file."""
    command = [sys.executable, "-m", "fuzz", "--together", "--inputs", str(INPUTS), *FAMILIES[family]]
    where = {**os.environ, "FUZZ_SECONDS": "60", "PYTHONPATH": os.pathsep.join(sys.path)}
    done = subprocess.run(command, cwd=ROOT, env=where, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stdout + done.stderr
    assert f"{INPUTS * len(FAMILIES[family]):,} inputs, 0 faults" in done.stdout


def test_every_reader_is_in_a_family() -> None:
    """A reader that is added to the harness alone would not be tried by `make test`."""
    command = [sys.executable, "-c", "from fuzz.readers import READERS; print(*READERS)"]
    where = {**os.environ, "PYTHONPATH": os.pathsep.join(sys.path)}
    done = subprocess.run(command, cwd=ROOT, env=where, capture_output=True, text=True, check=True)
    tried = {reader for readers in FAMILIES.values() for reader in readers}
    assert set(done.stdout.split()) == tried | {"weights.config"}  # builds models: too slow here
