"""`python -m benchmarks.gpu`: clipgraft and its peers on one CUDA GPU, with ViT-B-32 at full size.

Each chapter has a process of its own. Training and encoding are timed with reading and decoding the JPEGs,
as users meet them; a training step and encoding also on batches that lie in GPU memory already, where the
model alone counts.
"""

from __future__ import annotations

import argparse
import gc
import json
import os
import subprocess
import sys
import tempfile
import time
import traceback
from collections.abc import Callable
from functools import partial
from pathlib import Path

import torch

from benchmarks.data import make_data
from benchmarks.environment import describe, usable_cores
from benchmarks.gpu import encoding, steps, training
from benchmarks.gpu.bench import BOTH, SMOKE, TEXT, Bench, Values
from benchmarks.gpu.mixed import mixed
from benchmarks.gpu.page import page
from benchmarks.prepare import prepare
from benchmarks.settings import RESULTS, ROOT

Contestants = dict[str, Callable[[], Values]]
_QUIET = {"HF_HUB_OFFLINE": "1", "TOKENIZERS_PARALLELISM": "false", "TRANSFORMERS_VERBOSITY": "error"}


def chapters(bench: Bench) -> dict[str, Contestants]:
    """Name the chapters, each with its contestants; most telling first."""
    found: dict[str, Contestants] = {
        "LoRA on the text tower, from JPEGs": {
            "clipgraft, bf16": partial(training.ours, bench, TEXT, True),
            "clipgraft, fp32": partial(training.ours, bench, TEXT, False),
            "PEFT, bf16 autocast": partial(training.peft, bench, TEXT, True),
            "PEFT, bf16 weights": partial(training.peft, bench, TEXT, False, bf16=True),
        },
        "LoRA in both towers, from JPEGs": {
            "clipgraft, bf16": partial(training.ours, bench, BOTH, True),
            "PEFT, bf16 autocast": partial(training.peft, bench, BOTH, True),
            "PEFT, bf16 weights": partial(training.peft, bench, BOTH, False, bf16=True),
        },
        "encoding JPEGs": {
            "open_clip, fp32": partial(encoding.openclip, bench, False, reference=True),
            "open_clip, bf16 autocast": partial(encoding.openclip, bench, True),
            "clipgraft, bf16": partial(encoding.ours, bench, True),
            "clipgraft, fp32": partial(encoding.ours, bench, False),
        },
        "encoding images in GPU memory": {
            "open_clip, fp32": partial(encoding.openclip_resident, bench, False, reference=True),
            "open_clip, bf16 autocast": partial(encoding.openclip_resident, bench, True),
            "open_clip, bf16 autocast, compiled": partial(
                encoding.openclip_resident, bench, True, compile_it=True
            ),
            "clipgraft, bf16": partial(encoding.ours_resident, bench, True),
            "clipgraft, bf16, compiled": partial(encoding.ours_resident, bench, True, compile_it=True),
            "clipgraft, fp32": partial(encoding.ours_resident, bench, False),
        },
        "several adapters in one batch": {"both in turns": partial(mixed, bench)},
    }
    for batch in bench.batches:
        found[f"a step on the text tower, {batch:,} pairs in GPU memory"] = _steps(bench, TEXT, batch)
        found[f"a step in both towers, {batch:,} pairs in GPU memory"] = _steps(bench, BOTH, batch)
    return found


def _steps(bench: Bench, targets: str, batch: int) -> Contestants:
    ours, peft, openclip = (
        partial(run, bench, targets, batch) for run in (steps.ours, steps.peft, steps.openclip)
    )
    found: Contestants = {
        "clipgraft, bf16": partial(ours, True),
        "clipgraft, bf16, compiled": partial(ours, True, compile_it=True),
        "PEFT, bf16 autocast": partial(peft, True),
        "PEFT, bf16 weights": partial(peft, False, bf16=True),
        "PEFT, bf16 weights, compiled": partial(peft, False, bf16=True, compile_it=True),
        "open_clip, bf16 autocast, all weights": openclip,
        "open_clip, bf16 autocast, all weights, compiled": partial(openclip, compile_it=True),
    }
    if targets == TEXT:
        found["PEFT, bf16 weights, image features given to it"] = partial(peft, False, bf16=True, known=True)
    return found


def main() -> int:
    """Run every contestant, print the page and write it; returns 1 if one failed."""
    parser = argparse.ArgumentParser(prog="python -m benchmarks.gpu", description=__doc__)
    parser.add_argument("--only", nargs="+", metavar="WORD", help="chapters with one of these words")
    parser.add_argument("--out", type=Path, default=RESULTS, help="folder of gpu.md and gpu.json")
    parser.add_argument("--smoke", action="store_true", help="tiny, on the CPU: see that everything runs")
    parser.add_argument("--minutes", type=float, default=9, help="no chapter begins after this long (9)")
    parser.add_argument("--chapter", help=argparse.SUPPRESS)
    arguments = parser.parse_args()
    bench = SMOKE if arguments.smoke else Bench()
    if arguments.chapter:
        print(json.dumps({name: _one(run) for name, run in chapters(bench)[arguments.chapter].items()}))
        return 0
    started = time.perf_counter()
    make_data(bench.photos, bench.images, 0, processes=usable_cores())
    prepare(str(bench.photos), bench.images, 0)
    about = {**describe(), "gpu": "no GPU" if arguments.smoke else torch.cuda.get_device_name()}
    found: dict[str, dict[str, Values]] = {}
    left_out = []
    for chapter in chapters(bench):
        if arguments.only and not any(word in chapter for word in arguments.only):
            continue
        if time.perf_counter() - started > 60 * arguments.minutes:
            left_out.append(chapter)
            continue
        found[chapter] = _child(chapter, arguments.smoke)
        arguments.out.mkdir(parents=True, exist_ok=True)
        (arguments.out / "gpu.json").write_text(json.dumps({"about": about, "found": found}, indent=1) + "\n")
        text = page(bench, found, about)
        (arguments.out / "gpu.md").write_text(text, encoding="utf-8")
    if left_out:
        text += f"\nLeft out, as {arguments.minutes:g} minutes were over: {'; '.join(left_out)}.\n"
        (arguments.out / "gpu.md").write_text(text, encoding="utf-8")
    print(text)
    return int(any("error" in values for runs in found.values() for values in runs.values()))


def _one(run: Callable[[], Values]) -> Values:
    """Run one contestant; returns what it measured, or why it could not."""
    gc.collect()
    torch.cuda.empty_cache()
    torch.compiler.reset()
    try:
        return run()
    except Exception as error:
        traceback.print_exc()
        return {"error": f"{type(error).__name__}: {(str(error).splitlines() or [''])[0][:100]}"}


def _child(chapter: str, smoke: bool) -> dict[str, Values]:
    """Run all contestants of a chapter, in a process with an empty cache."""
    started = time.perf_counter()
    with tempfile.TemporaryDirectory() as cache:
        done = subprocess.run(
            [sys.executable, "-m", "benchmarks.gpu", "--chapter", chapter, *["--smoke"][: int(smoke)]],
            cwd=ROOT.parent,
            env={**os.environ, **_QUIET, "CLIPGRAFT_CACHE": cache},
            stdout=subprocess.PIPE,
            text=True,
            check=False,
        )
    print(f"{chapter}: {time.perf_counter() - started:.0f} s", file=sys.stderr, flush=True)
    if done.returncode:
        return {"all": {"error": f"the process ended with exit code {done.returncode}"}}
    found: dict[str, Values] = json.loads(done.stdout.splitlines()[-1])
    return found


if __name__ == "__main__":
    sys.exit(main())
