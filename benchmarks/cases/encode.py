"""Encode JPEGs that lie in a folder, in a tar file, or are named in a table."""

from __future__ import annotations

from benchmarks.measure import Contestant, Runs, Values, peak, spread
from benchmarks.report import Bars, Chapter, Goal, Table, at_least, megabytes, short, with_spread
from benchmarks.settings import Settings

OURS, OURS_FP32, OURS_INT8 = "clipgraft, bf16", "clipgraft, fp32", "clipgraft, int8"
TO_DISK = "clipgraft encode, bf16, vectors and metadata on disk"
FROM_FOLDER, FROM_TAR, FROM_PARQUET = (
    f"the same from a {source}" for source in ("folder", "tar file", "Parquet file")
)
GUIDE, GUIDE_BF16 = "guide's loop, default", "guide's loop, bf16 autocast"
SENTENCE, SENTENCE_BF16 = "sentence-transformers, default", "sentence-transformers, bf16, batches of 64"
_COSINE = 0.999
_IN_QUICK = (GUIDE, GUIDE_BF16, OURS, OURS_INT8, TO_DISK, SENTENCE)


def contestants(settings: Settings) -> list[Contestant]:
    """List the contestants; the guide's loop runs first, because its fp32 features are the reference."""
    images = [str(settings.data / "images" / f"{i:05d}.jpg") for i in range(settings.encode_images)]
    options: Values = {"images": images}
    listed: list[tuple[str, str, Values]] = [
        (GUIDE, "guide:encode", {"reference": True}),
        (OURS, "ours:encode", {"autocast": True}),
        (TO_DISK, "ours:encode_to_disk", {"autocast": True}),
        (FROM_FOLDER, "ours:encode_to_disk", {"autocast": True, "source": "folder"}),
        (FROM_TAR, "ours:encode_to_disk", {"autocast": True, "source": "tar"}),
        (FROM_PARQUET, "ours:encode_to_disk", {"autocast": True, "source": "parquet"}),
        (OURS_INT8, "ours:encode", {"int8": True}),
        (OURS_FP32, "ours:encode", {}),
        (SENTENCE, "sentence:encode", {}),
        (SENTENCE_BF16, "sentence:encode", {"bf16": True, "batch_size": 64}),
        (GUIDE_BF16, "guide:encode", {"autocast": True}),
    ]
    return [
        Contestant(name, f"contestants.{function}", {**options, **more})
        for name, function, more in listed
        if name in _IN_QUICK or not settings.quick
    ]


def report(settings: Settings, runs: Runs) -> Chapter:
    spreads = {name: spread([v["images_per_second"] for v in values]) for name, values in runs.items()}
    speed = {name: found.median for name, found in spreads.items()}
    base = speed.get(GUIDE)
    rows = []
    for name, values in runs.items():
        cosine = f"{min(v['cosine'] for v in values):.5f}"
        ratio = f"{short(speed[name] / base)}x" if base else ""
        rows.append((name, with_spread(spreads[name]), ratio, cosine, megabytes(peak(values))))
    columns = ("contestant", "images/s", "of the guide's", "least cosine", "peak MB")
    return Chapter(
        "Encoding a folder of JPEGs",
        f"{settings.encode_images:,} JPEGs of 500x375, from file to unit-norm features. int8 is computed "
        "without the measurement of recall that `clipgraft encode` makes before it. The cosine is the "
        "least of all images with the fp32 features of the guide's loop.",
        (Table(columns, tuple(rows)),),
        goals(runs, speed),
        (Bars("encode.png", "Encoding JPEGs", "images/s", speed),),
    )


def goals(runs: Runs, speed: dict[str, float]) -> tuple[Goal, ...]:
    ours = speed.get(OURS)
    found = [
        at_least(f"encoding: {peer}", wanted, ours / speed[peer] if ours and peer in speed else None)
        for peer, wanted in ((GUIDE, 4.0), (SENTENCE, 1.0), (SENTENCE_BF16, 1.0), (GUIDE_BF16, 1.5))
    ]
    lossy = speed.get(OURS_INT8)
    found += [
        at_least(
            f"encoding in int8: {peer}", wanted, lossy / speed[peer] if lossy and peer in speed else None
        )
        for peer, wanted in ((GUIDE, 6.0), (GUIDE_BF16, 1.5))
    ]
    for name in (OURS, OURS_INT8):
        if name in runs:
            cosine = min(v["cosine"] for v in runs[name])
            what = f"encoding: cosine of {name} to fp32 features"
            found.append(Goal(what, f">= {_COSINE}", f"{cosine:.5f}", cosine >= _COSINE))
    return tuple(found)
