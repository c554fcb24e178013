"""Many adapters in one batch, by clipgraft and by PEFT in turns, and the memory that adapters take."""

from __future__ import annotations

import tempfile
import time
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

import clipgraft as cg
from benchmarks.child import reset_peak
from benchmarks.contestants.ours import load
from benchmarks.prepare import HF_BASE, LORA, adapter_folder

_TOKENS, _SIDE, _VOCABULARY, _START, _END = 16, 224, 49406, 49406, 49407
Run = Callable[[], Tensor]


def side_by_side(
    tower: str, adapters: Sequence[int], rows: int, times: int, use_dora: bool = False, peer: bool = True
) -> dict[str, Any]:
    """Time the base alone and batches of 1, 2, … adapters, in turns A B C A B C in one process.

    `from_one_by_one`, `from_peer` and `from_base` are the largest differences of our features from those of
    each adapter alone, of PEFT, and of the base, as shares of the largest feature.

    Args:
        tower: `text` or `vision`.
        adapters: numbers of adapters in a batch.
        rows: of every batch.
        times: rounds after one that warms up.
        use_dora: of all adapters.
        peer: let PEFT run beside us.
    """
    inputs = made_up_inputs(tower, rows)
    clip = load()
    add_adapters(clip, tower, max(adapters), use_dora)
    ours = our_runs(clip, tower, inputs, adapters)
    theirs = peft_runs(clip, tower, inputs, adapters) if peer else {}
    with torch.inference_mode():
        found = {name: run().clone() for name, run in {**ours, **theirs}.items()}
        seconds = in_turns({**ours, **theirs}, times)
        alone = {count: one_by_one(clip, tower, inputs, count) for count in adapters}
    return {
        "seconds": seconds,
        "from_one_by_one": max(difference(found[f"clipgraft {n}"], alone[n]) for n in adapters),
        "from_peer": max(
            (difference(found[f"clipgraft {name.split()[1]}"], found[name]) for name in theirs), default=None
        ),
        "from_base": difference(found[f"clipgraft {max(adapters)}"], found["clipgraft 0"]),
    }


def made_up_inputs(tower: str, rows: int) -> Tensor:
    """Make captions that share only their first and last token, or pixels."""
    generator = torch.Generator().manual_seed(0)
    if tower == "vision":
        return torch.randn(rows, 3, _SIDE, _SIDE, generator=generator)
    ids = torch.randint(1, _VOCABULARY, (rows, _TOKENS), generator=generator)
    ids[:, 0], ids[:, -1] = _START, _END
    return ids


def add_adapters(clip: cg.Clip, tower: str, count: int, use_dora: bool = False) -> None:
    """Add adapters `a0`, `a1`, … that have an effect."""
    torch.manual_seed(0)
    for number in range(count):
        cg.apply_lora(clip, **LORA, targets=f"{tower}-attention", use_dora=use_dora, name=f"a{number}")
        with torch.no_grad():
            for name, weight in clip.model.named_parameters():
                if weight.requires_grad and name.endswith("lora_B"):
                    weight.normal_(std=0.02)


def names_of(rows: int, count: int) -> list[str | None]:
    """Name the adapter of each row, adapter after adapter; None for the base."""
    return [f"a{row % count}" if count else None for row in range(rows)]


def our_runs(clip: cg.Clip, tower: str, inputs: Tensor, adapters: Sequence[int]) -> dict[str, Run]:
    """Make runs `clipgraft N` with N adapters; 0 is the base alone."""
    encode = clip.encode_text if tower == "text" else clip.encode_image

    def mixed(count: int) -> Run:
        names = names_of(len(inputs), count)
        return lambda: encode(inputs, adapters=names)

    return {f"clipgraft {count}": mixed(count) for count in (0, *adapters)}


def peft_runs(clip: cg.Clip, tower: str, inputs: Tensor, adapters: Sequence[int]) -> dict[str, Run]:
    """Make runs `PEFT N` with the same adapters as `adapter_names`; 0 is the stock tower without PEFT."""
    stock = stock_tower(tower)
    model = peft_tower(clip, tower, max(adapters))
    argument, output = ("input_ids", "text_embeds") if tower == "text" else ("pixel_values", "image_embeds")

    def mixed(count: int) -> Run:
        names = names_of(len(inputs), count)
        return lambda: getattr(model(**{argument: inputs}, adapter_names=names), output)

    alone: Run = lambda: getattr(stock(**{argument: inputs}), output)  # noqa: E731
    return {"PEFT 0": alone, **{f"PEFT {count}": mixed(count) for count in adapters}}


def stock_tower(tower: str) -> Any:
    """Build a tower with its projection with transformers."""
    import transformers

    kind = f"CLIP{tower.capitalize()}ModelWithProjection"
    return getattr(transformers, kind).from_pretrained(HF_BASE).eval()


def peft_tower(clip: cg.Clip, tower: str, count: int) -> Any:
    """Build the same tower with the first adapters of `clip` with PEFT."""
    from peft import PeftModel

    with tempfile.TemporaryDirectory() as folder:
        saved = [cg.save_adapter(clip, Path(folder) / f"a{n}", name=f"a{n}") for n in range(count)]
        model = PeftModel.from_pretrained(stock_tower(tower), saved[0], adapter_name="a0")
        for number, path in enumerate(saved[1:], start=1):
            model.load_adapter(path, adapter_name=f"a{number}")
    return model.eval()


def in_turns(runs: Mapping[str, Run], times: int) -> dict[str, list[float]]:
    """Time every run round by round, so that a slow moment of the machine affects all."""
    seconds: dict[str, list[float]] = {name: [] for name in runs}
    for _ in range(times):
        for name, run in runs.items():
            started = time.perf_counter()
            run()
            seconds[name].append(time.perf_counter() - started)
    return seconds


def one_by_one(clip: cg.Clip, tower: str, inputs: Tensor, count: int) -> Tensor:
    """Encode the rows of each adapter with that adapter alone, by the model's own forward."""
    encode = clip.encode_text if tower == "text" else clip.encode_image
    features = torch.empty(0)
    for number in range(count):
        cg.set_adapter(clip, f"a{number}")
        own = encode(inputs[number::count])
        if number == 0:
            features = own.new_empty(len(inputs), own.shape[1])
        features[number::count] = own
    return features


def difference(one: Tensor, other: Tensor) -> float:
    """Return the largest difference as a share of the largest feature."""
    return float((one - other).abs().max() / other.abs().max())


def memory(library: str, adapters: int, rows: int) -> dict[str, Any]:
    """Measure the peak of mixed batches on the text tower, in a process with one library's model only."""
    inputs, names = made_up_inputs("text", rows), names_of(rows, adapters)
    if library == "PEFT":
        model = fresh_peft_tower(adapters)
        parameters = dict(model.named_parameters())
        run: Run = lambda: model(input_ids=inputs, adapter_names=names)  # noqa: E731
    else:
        clip = load()
        add_adapters(clip, "text", adapters)
        parameters = dict(clip.model.named_parameters())
        run = lambda: clip.encode_text(inputs, adapters=names)  # noqa: E731
    weights = sum(p.numel() * p.element_size() for name, p in parameters.items() if "lora_" in name)
    reset_peak()
    with torch.inference_mode():
        in_turns({library: run}, times=3)
    return {"weights_an_adapter": weights / adapters}


def fresh_peft_tower(count: int) -> Any:
    """Build the text tower with new adapters with PEFT alone."""
    from peft import PeftConfig, get_peft_model

    config = PeftConfig.from_pretrained(str(adapter_folder("text-attention", 0.0)))
    model = get_peft_model(stock_tower("text"), config, adapter_name="a0")
    for number in range(1, count):
        model.add_adapter(f"a{number}", config)
    return model.eval()
