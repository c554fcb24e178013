"""Several adapters in one batch of captions, beside the base alone."""

from __future__ import annotations

import statistics
from collections.abc import Callable

import torch
from torch import Tensor

from benchmarks.contestants.mixed import add_adapters, difference, names_of, peft_tower, stock_tower
from benchmarks.gpu.bench import Bench, Values, our_clip

_TOKENS = 16


def mixed(bench: Bench) -> Values:
    """Time a batch in the text tower: base alone, and from one to all adapters mixed.

    PEFT takes its turns in between. Ours and PEFT's compute in fp32, as both do by default.
    """
    generator = torch.Generator().manual_seed(0)
    ids = torch.randint(1, 49406, (bench.mixed_rows, _TOKENS), generator=generator)
    ids[:, 0], ids[:, -1] = 49406, 49407
    clip = our_clip(bench)
    clip.to("cpu")
    add_adapters(clip, "text", max(bench.adapters))
    theirs = peft_tower(clip, "text", bench.peft_adapters).to(bench.device)
    alone = stock_tower("text").to(bench.device)
    clip.to(bench.device)
    ids = ids.to(bench.device)
    runs: dict[str, Callable[[], Tensor]] = {"PEFT 0": lambda: alone(input_ids=ids).text_embeds}
    for count in (0, *bench.adapters):
        names = names_of(bench.mixed_rows, count)
        runs[f"clipgraft {count}"] = lambda names=names: clip.encode_text(ids, adapters=names)  # type: ignore[misc]
        if 0 < count <= bench.peft_adapters:
            runs[f"PEFT {count}"] = lambda names=names: theirs(input_ids=ids, adapter_names=names).text_embeds  # type: ignore[misc]
    seconds: dict[str, list[float]] = {name: [] for name in runs}
    bench.reset_peak()
    with torch.inference_mode():
        found = {name: run() for name, run in runs.items()}
        for _ in range(bench.rounds):
            for name, run in runs.items():
                started = bench.now()
                run()
                seconds[name].append(bench.now() - started)
    shared = [count for count in bench.adapters if count <= bench.peft_adapters]
    differs = max(difference(found[f"clipgraft {n}"], found[f"PEFT {n}"]) for n in shared)
    medians = {name: statistics.median(own) for name, own in seconds.items()}
    return {"seconds": medians, "from_peft": differs, **bench.peak()}
