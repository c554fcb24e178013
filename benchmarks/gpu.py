"""`python -m benchmarks.gpu`: clipgraft and its peers on one CUDA GPU, with ViT-B-32 at full size.

Each chapter has a process of its own. Training and encoding are timed with reading and decoding the JPEGs,
as users meet them; a training step also on batches that lie in GPU memory already, where the model
alone counts.
"""

from __future__ import annotations

import argparse
import gc
import itertools
import json
import logging
import os
import statistics
import subprocess
import sys
import tempfile
import time
import traceback
from collections.abc import Callable, Iterable, Iterator
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from benchmarks.contestants.loop import adamw
from benchmarks.data import make_data, read_table
from benchmarks.environment import describe, usable_cores
from benchmarks.prepare import HF_BASE, LORA, OPENCLIP_BASE, adapter_folder, prepare
from benchmarks.settings import RESULTS, ROOT, WORK

IMAGES, BATCH, EPOCHS = 4096, 256, 6
WARMUP, STEPS = 4, 12
MIXED_ROWS, MIXED_TOKENS, ROUNDS = 256, 16, 20
PHOTOS = WORK / f"photos-{IMAGES}-0"
TABLE = PHOTOS / "natural.csv"
REFERENCE = WORK / "gpu-reference.pt"
Values = dict[str, Any]
_QUIET = {"HF_HUB_OFFLINE": "1", "TOKENIZERS_PARALLELISM": "false", "TRANSFORMERS_VERBOSITY": "error"}


def synchronised() -> float:
    """Return the time when the GPU has finished all work."""
    torch.cuda.synchronize()
    return time.perf_counter()


def our_clip() -> Any:
    import clipgraft as cg

    return cg.load("ViT-B-32", pretrained=OPENCLIP_BASE, device="cuda")


def our_pairs() -> Any:
    import clipgraft as cg

    return cg.read_pairs(TABLE, verify="header")


# Training from files


def train_ours(targets: str, autocast: bool) -> Values:
    """Time every epoch of `fit`, the first with nothing cached."""
    import clipgraft as cg

    clip, pairs, ends = our_clip(), our_pairs(), []

    class Clock(logging.Handler):
        def emit(self, record: logging.LogRecord) -> None:
            if "mean loss" in record.getMessage():
                ends.append(synchronised())

    logging.getLogger("clipgraft").addHandler(Clock())
    torch.manual_seed(0)
    cg.apply_lora(clip, **LORA, dropout=0.1, targets=targets)
    torch.cuda.reset_peak_memory_stats()
    started = synchronised()
    with tempfile.TemporaryDirectory() as folder:
        out = Path(folder) / "run"
        cg.fit(
            clip,
            pairs,
            train=cg.TrainArgs(
                batch_size=BATCH, epochs=EPOCHS, negatives="batch", lr_scheduler="const", warmup=0
            ),
            run=cg.RunArgs(out=out, progress=False, save_frequency=0),
            features=cg.FeatureArgs(autocast=autocast, workers=usable_cores()),
        )
        events = [json.loads(line) for line in (out / "events.jsonl").read_text().splitlines()]
    marks = [started, *ends]
    epochs = [end - start for start, end in zip(marks, ends, strict=False)]
    losses = [event["loss"] for event in events if event["kind"] == "train"]
    return {"epochs": epochs, "losses": losses[:STEPS], **peak()}


def train_peft(targets: str, autocast: bool, bf16: bool = False) -> Values:
    """Time every epoch of transformers + PEFT; its loader continues from one epoch to the next."""
    from benchmarks.contestants.hf_peft import batches

    model = peft_model(targets, bf16)
    data = batches(
        HF_BASE,
        read_table(TABLE),
        batch_size=BATCH,
        workers=usable_cores(),
        longest=True,
        bf16=bf16,
    )
    torch.manual_seed(0)
    moved = ({name: t.cuda(non_blocking=True) for name, t in batch.items()} for batch in data)
    steps = IMAGES // BATCH
    started = synchronised()
    found = timed_steps(
        moved,
        lambda b: model(**b, return_loss=True).loss,
        adamw(model, fused=True),
        autocast,
        0,
        EPOCHS * steps,
    )
    # Workers make batches ahead: an epoch's own seconds say little, those of all later ones together do.
    whole, later = synchronised() - started, sum(found.pop("step_seconds")[steps:]) / (EPOCHS - 1)
    return {"epochs": [whole - later * (EPOCHS - 1), *[later] * (EPOCHS - 1)], **found}


def peft_model(targets: str, bf16: bool) -> Any:
    from benchmarks.contestants.hf_peft import load_model

    return load_model(HF_BASE, adapter_folder(targets, 0.1), bf16=bf16, attention="sdpa").cuda()


def peak() -> Values:
    return {"peak_bytes": torch.cuda.max_memory_allocated()}


def timed_steps(
    batches: Iterable[Any],
    loss_of: Callable[[Any], Tensor],
    optimizer: torch.optim.Optimizer,
    autocast: bool,
    warmup: int,
    steps: int,
) -> Values:
    """Time each step after a warm-up, waiting for data included."""
    losses, marks = [], []
    waiting = iter(batches)
    torch.cuda.reset_peak_memory_stats()
    for step in range(warmup + steps):
        if step >= warmup:
            marks.append(synchronised())
        batch = next(waiting)
        with torch.autocast("cuda", torch.bfloat16, enabled=autocast):
            loss = loss_of(batch)
        optimizer.zero_grad()
        loss.backward()  # type: ignore[no-untyped-call]
        optimizer.step()
        losses.append(loss.detach())
    marks.append(synchronised())
    seconds = [end - start for start, end in itertools.pairwise(marks)]
    return {"step_seconds": seconds, "losses": [float(loss) for loss in losses[:STEPS]], **peak()}


# Training steps on batches in GPU memory


def tokens_and_pixels() -> tuple[Tensor, Tensor]:
    """Make (BATCH, 77) ids of the table's first captions, zero after the end, and noise as pixels."""
    import open_clip

    captions = [caption for _, caption in read_table(TABLE)[:BATCH]]
    torch.manual_seed(0)
    return open_clip.get_tokenizer("ViT-B-32")(captions), torch.randn(BATCH, 3, 224, 224)


def steps_ours(targets: str, autocast: bool) -> Values:
    """Run the engine's own step, with packing of the captions; a frozen image tower is cached."""
    import clipgraft as cg
    from clipgraft.engine.encoder import Encoder

    clip = our_clip()
    torch.manual_seed(0)
    cg.apply_lora(clip, **LORA, dropout=0.1, targets=targets)
    clip.train()
    encoder = Encoder(clip, autocast=autocast)
    ids, pixels = tokens_and_pixels()
    pixels = pixels.cuda()
    with torch.no_grad():
        known = encoder.encode_image(pixels) if targets.startswith("text") else None

    def loss_of(batch: tuple[Tensor, Tensor]) -> Tensor:
        images = encoder.encode_image(batch[1]) if known is None else known
        return contrast(images, encoder.encode_text(batch[0]), clip.logit_scale)

    # The engine chooses its types by itself; torch's autocast is for models that do not.
    return timed_steps(
        repeated((ids, pixels)), loss_of, adamw(clip.model, fused=True), False, WARMUP, 4 * STEPS
    )


def steps_peft(targets: str, autocast: bool, bf16: bool = False, known: bool = False) -> Values:
    """Run the same with PEFT, padded to the longest; `known` gives it cached image features."""
    model = peft_model(targets, bf16)
    ids, pixels = tokens_and_pixels()
    longest = int((ids != 0).sum(1).max())
    ids, mask = ids[:, :longest].cuda(), (ids[:, :longest] != 0).long().cuda()
    pixels = pixels.cuda().to(torch.bfloat16 if bf16 else torch.float32)
    clip = model.base_model.model
    frozen = None
    if known:
        with torch.no_grad():
            frozen = clip.get_image_features(pixel_values=pixels).pooler_output.float()

    def loss_of(batch: tuple[Tensor, Tensor]) -> Tensor:
        if frozen is None:
            out = model(input_ids=batch[0], attention_mask=mask, pixel_values=batch[1], return_loss=True)
            loss: Tensor = out.loss
            return loss
        texts = clip.get_text_features(input_ids=batch[0], attention_mask=mask).pooler_output
        return contrast(frozen, texts.float(), clip.logit_scale)

    return timed_steps(
        repeated((ids, pixels)), loss_of, adamw(model, fused=True), autocast, WARMUP, 4 * STEPS
    )


def contrast(images: Tensor, texts: Tensor, logit_scale: Tensor) -> Tensor:
    logits = logit_scale.exp() * F.normalize(images, dim=-1) @ F.normalize(texts, dim=-1).T
    labels = torch.arange(len(logits), device=logits.device)
    return (F.cross_entropy(logits, labels) + F.cross_entropy(logits.T, labels)) / 2


def repeated(batch: Any) -> Iterator[Any]:
    while True:
        yield batch


# Encoding


def encode_ours(autocast: bool) -> Values:
    from clipgraft.data.features import encode_images

    clip = our_clip()
    return timed_encoding(
        lambda paths: encode_images(
            clip, paths, autocast=autocast, batch_size=BATCH, workers=usable_cores()
        ).cpu()
    )


def encode_openclip(autocast: bool, reference: bool = False) -> Values:
    """Encode as open_clip's documentation shows, with a loader that decodes in every core."""
    import open_clip

    from benchmarks.contestants.batches import Photos

    model, _, preprocess = open_clip.create_model_and_transforms("ViT-B-32", pretrained=str(OPENCLIP_BASE))
    model.cuda().eval()

    def run(paths: list[Path]) -> Tensor:
        loader = torch.utils.data.DataLoader(
            Photos([(path, "") for path in paths], preprocess),
            batch_size=BATCH,
            num_workers=usable_cores(),
            pin_memory=True,
        )
        features = []
        with torch.inference_mode(), torch.autocast("cuda", torch.bfloat16, enabled=autocast):
            for pixels, _ in loader:
                features.append(
                    F.normalize(model.encode_image(pixels.cuda(non_blocking=True)).float(), dim=-1)
                )
        return torch.cat(features).cpu()

    return timed_encoding(run, reference)


def timed_encoding(run: Callable[[list[Path]], Tensor], reference: bool = False) -> Values:
    paths = [path for path, _ in read_table(TABLE)]
    run(paths[:BATCH])
    torch.cuda.reset_peak_memory_stats()
    started = synchronised()
    features = run(paths)
    seconds = synchronised() - started
    if reference:
        torch.save(features, REFERENCE)
    expected = torch.load(REFERENCE, weights_only=True)
    cosine = F.cosine_similarity(features.float(), expected, dim=-1).min().item()
    return {"images_per_second": len(paths) / seconds, "cosine": cosine, **peak()}


# Several adapters in one batch


def mixed() -> Values:
    """Time a batch of 256 captions in the text tower: base alone, and 1 … 32 adapters mixed.

    PEFT takes its turns in between. Ours and PEFT's compute in fp32, as both do by default.
    """
    from benchmarks.contestants.mixed import add_adapters, difference, names_of, peft_tower, stock_tower

    generator = torch.Generator().manual_seed(0)
    ids = torch.randint(1, 49406, (MIXED_ROWS, MIXED_TOKENS), generator=generator)
    ids[:, 0], ids[:, -1] = 49406, 49407
    clip = our_clip()
    clip.to("cpu")
    add_adapters(clip, "text", 32)
    theirs, alone = peft_tower(clip, "text", 32).cuda(), stock_tower("text").cuda()
    clip.to("cuda")
    ids = ids.cuda()
    runs: dict[str, Callable[[], Tensor]] = {"PEFT 0": lambda: alone(input_ids=ids).text_embeds}
    for count in (0, 1, 2, 8, 32):
        names = names_of(MIXED_ROWS, count)
        runs[f"clipgraft {count}"] = lambda names=names: clip.encode_text(ids, adapters=names)  # type: ignore[misc]
        if count:
            runs[f"PEFT {count}"] = lambda names=names: theirs(input_ids=ids, adapter_names=names).text_embeds  # type: ignore[misc]
    seconds: dict[str, list[float]] = {name: [] for name in runs}
    with torch.inference_mode():
        found = {name: run() for name, run in runs.items()}
        for _ in range(ROUNDS):
            for name, run in runs.items():
                started = synchronised()
                run()
                seconds[name].append(synchronised() - started)
    differs = max(difference(found[f"clipgraft {n}"], found[f"PEFT {n}"]) for n in (1, 2, 8, 32))
    return {"seconds": {name: statistics.median(own) for name, own in seconds.items()}, "from_peft": differs}


TEXT, BOTH = "text-attention", "attention"
CONTESTANTS: dict[str, dict[str, Callable[[], Values]]] = {
    "LoRA on the text tower, from JPEGs": {
        "clipgraft, bf16": lambda: train_ours(TEXT, True),
        "clipgraft, fp32": lambda: train_ours(TEXT, False),
        "PEFT, bf16 autocast": lambda: train_peft(TEXT, True),
        "PEFT, bf16 weights": lambda: train_peft(TEXT, False, bf16=True),
        "PEFT, fp32": lambda: train_peft(TEXT, False),
    },
    "LoRA in both towers, from JPEGs": {
        "clipgraft, bf16": lambda: train_ours(BOTH, True),
        "PEFT, bf16 autocast": lambda: train_peft(BOTH, True),
        "PEFT, bf16 weights": lambda: train_peft(BOTH, False, bf16=True),
    },
    "a step on the text tower, batch in GPU memory": {
        "clipgraft, bf16": lambda: steps_ours(TEXT, True),
        "clipgraft, fp32": lambda: steps_ours(TEXT, False),
        "PEFT, bf16 autocast": lambda: steps_peft(TEXT, True),
        "PEFT, bf16 weights": lambda: steps_peft(TEXT, False, bf16=True),
        "PEFT, bf16 weights, image features given to it": lambda: steps_peft(TEXT, False, True, known=True),
        "PEFT, fp32": lambda: steps_peft(TEXT, False),
    },
    "a step in both towers, batch in GPU memory": {
        "clipgraft, bf16": lambda: steps_ours(BOTH, True),
        "clipgraft, fp32": lambda: steps_ours(BOTH, False),
        "PEFT, bf16 autocast": lambda: steps_peft(BOTH, True),
        "PEFT, bf16 weights": lambda: steps_peft(BOTH, False, bf16=True),
        "PEFT, fp32": lambda: steps_peft(BOTH, False),
    },
    "encoding JPEGs": {
        "open_clip, fp32": lambda: encode_openclip(False, reference=True),
        "open_clip, bf16 autocast": lambda: encode_openclip(True),
        "clipgraft, bf16": lambda: encode_ours(True),
        "clipgraft, fp32": lambda: encode_ours(False),
    },
    "several adapters in one batch": {"both in turns": mixed},
}


def page(found: dict[str, dict[str, Values]], about: Values) -> str:
    """Format the tables in Markdown."""
    lines = [
        "# On a GPU",
        "",
        f"`python -m benchmarks.gpu` on {about['date']}: {about['gpu']}, {about['cores']} cores, torch "
        f"{about['versions']['torch']}, transformers {about['versions']['transformers']}, PEFT "
        f"{about['versions']['peft']}, open_clip {about['versions']['open_clip_torch']}. ViT-B-32, r=16 on "
        f"q, k, v and out, dropout 0.1, batches of {BATCH}, {IMAGES:,} JPEGs of 500x375, captions of a "
        "median 16 tokens, padded by PEFT to the longest of the batch. One run, a process for each chapter.",
    ]
    for chapter, runs in found.items():
        lines += ["", f"## {chapter[0].upper()}{chapter[1:]}", "", *_table(runs)]
    return "\n".join(lines) + "\n"


def _table(runs: dict[str, Values]) -> list[str]:
    if "both in turns" in runs:
        return _mixed_table(runs["both in turns"])
    rows = []
    ours = next(values for name, values in runs.items() if name == "clipgraft, bf16")
    for name, values in runs.items():
        if "error" in values:
            rows.append(f"| {name} | {values['error']} |")
            continue
        row = [name, *_cells(values), f"{speed(values) and speed(ours) / speed(values):.2f}x"]
        rows.append(f"| {' | '.join(row)} | {values['peak_bytes'] / 1e6:,.0f} |")
    heads = {
        "epochs": ["first epoch, s", "a later epoch, s"],
        "images_per_second": ["images/s", "least cosine to fp32"],
        "step_seconds": ["ms a step"],
    }
    head = next(names for key, names in heads.items() if key in ours)
    columns = ["", *head, "ours is", "peak GPU MB"]
    return [f"| {' | '.join(columns)} |", f"|---|{'---:|' * (len(columns) - 1)}", *rows]


def _cells(values: Values) -> list[str]:
    if "epochs" in values:
        return [f"{values['epochs'][0]:.2f}", f"{statistics.median(values['epochs'][1:]):.2f}"]
    if "images_per_second" in values:
        return [f"{values['images_per_second']:,.0f}", f"{values['cosine']:.5f}"]
    return [f"{1e3 * statistics.median(values['step_seconds']):.1f}"]


def speed(values: Values) -> float:
    """Format a speed, where higher is faster."""
    if "epochs" in values:
        return 1 / statistics.median(values["epochs"][1:])
    if "images_per_second" in values:
        return float(values["images_per_second"])
    return 1 / statistics.median(values["step_seconds"])


def _mixed_table(values: Values) -> list[str]:
    seconds = values["seconds"]
    rows = [
        "| adapters | clipgraft, ms | of its base | PEFT, ms | of its base |",
        "|---:|---:|---:|---:|---:|",
    ]
    for count in (0, 1, 2, 8, 32):
        cells = [str(count or "none")]
        for library in ("clipgraft", "PEFT"):
            own = seconds[f"{library} {count}"]
            cells += [f"{1e3 * own:.2f}", f"{seconds[f'{library} 0'] / own:.2f}"]
        rows.append(f"| {' | '.join(cells)} |")
    return [*rows, "", f"Features differ from PEFT's by at most {values['from_peft']:.1e} of the largest."]


def main() -> int:
    """Run every contestant, print the page and write it; returns 1 if one failed."""
    parser = argparse.ArgumentParser(prog="python -m benchmarks.gpu", description=__doc__)
    parser.add_argument("--only", nargs="+", metavar="WORD", help="chapters with one of these words")
    parser.add_argument("--out", type=Path, default=RESULTS, help="folder of gpu.md and gpu.json")
    parser.add_argument("--chapter", help=argparse.SUPPRESS)
    arguments = parser.parse_args()
    if arguments.chapter:
        print(json.dumps({name: _one(run) for name, run in CONTESTANTS[arguments.chapter].items()}))
        return 0
    make_data(PHOTOS, IMAGES, 0, processes=usable_cores())
    prepare(str(PHOTOS), IMAGES, 0)
    about = {**describe(), "gpu": torch.cuda.get_device_name()}
    found: dict[str, dict[str, Values]] = {}
    for chapter in CONTESTANTS:
        if arguments.only and not any(word in chapter for word in arguments.only):
            continue
        found[chapter] = _child(chapter)
        arguments.out.mkdir(parents=True, exist_ok=True)
        (arguments.out / "gpu.json").write_text(json.dumps({"about": about, "found": found}, indent=1) + "\n")
        (arguments.out / "gpu.md").write_text(page(found, about), encoding="utf-8")
    print((arguments.out / "gpu.md").read_text(encoding="utf-8"))
    return int(any("error" in values for runs in found.values() for values in runs.values()))


def _one(run: Callable[[], Values]) -> Values:
    """Run one contestant; returns what it measured, or why it could not."""
    gc.collect()
    torch.cuda.empty_cache()
    try:
        return run()
    except Exception as error:
        traceback.print_exc()
        return {"error": f"{type(error).__name__}: {str(error).splitlines()[0]}"}


def _child(chapter: str) -> dict[str, Values]:
    """Run all contestants of a chapter, in a process with an empty cache."""
    started = time.perf_counter()
    with tempfile.TemporaryDirectory() as cache:
        done = subprocess.run(
            [sys.executable, "-m", "benchmarks.gpu", "--chapter", chapter],
            cwd=ROOT.parent,
            env={**os.environ, **_QUIET, "CLIPGRAFT_CACHE": cache},
            stdout=subprocess.PIPE,
            text=True,
            check=True,
        )
    print(f"{chapter}: {time.perf_counter() - started:.0f} s", file=sys.stderr, flush=True)
    found: dict[str, Values] = json.loads(done.stdout.splitlines()[-1])
    return found


if __name__ == "__main__":
    sys.exit(main())
