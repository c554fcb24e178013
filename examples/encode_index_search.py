"""Encode images once, index them, and search by text, by image and by both, with and without an adapter.

    python examples/encode_index_search.py --out found

An adapter on the text tower does not change image vectors, so base and adapter share one index.
Nothing is downloaded: a small adapter for Vietnamese is trained first, in about a minute. Needs
`pip install 'clipgraft[search]'`.
"""

from __future__ import annotations

import argparse
from collections.abc import Sequence
from pathlib import Path

import torch

import clipgraft as cg


def train_adapter(out: Path, scenes: int) -> Path:
    """Train an adapter for Vietnamese captions, unless an earlier call has done so."""
    adapter = out / "adapter"
    if not adapter.exists():
        pairs = cg.read_pairs(cg.emoji.write_scenes(out / "data", "train", scenes, ["vi"])["vi"])
        clip = cg.load("emoji")
        torch.manual_seed(0)
        cg.apply_lora(clip, r=16, alpha=32, targets="linear-text,text.token_embedding,text.proj")
        run = cg.fit(
            clip,
            pairs,
            train=cg.TrainArgs(batch_size=128, lr=3e-3, wd=0.1, warmup=20, epochs=1),
            run=cg.RunArgs(out=out / "run", resume=True, progress=False),
            features=cg.FeatureArgs(autocast=None),
        )
        print(f"trained on {len(pairs):,} images in {run.seconds:.0f} s")
        cg.save_adapter(clip, adapter)
    return adapter


def found_in_five(clip: cg.Clip, encoded: Path, pairs: cg.Pairs) -> float:
    """Share of images that are among the top five for their first caption."""
    hits = [
        image.name
        in {Path(hit.path or "").name for hit in cg.search.query(encoded, captions[0], k=5, model=clip)}
        for image, captions in zip(pairs.images, pairs.captions, strict=True)
    ]
    return sum(hits) / len(hits)


def show(title: str, hits: Sequence[cg.search.Hit]) -> None:
    print(title)
    for hit in hits:
        print(f"  {hit.rank}  {hit.score:.3f}  {hit.metadata['path']}  {str(hit.caption).splitlines()[0]}")


def main(argv: Sequence[str] | None = None) -> None:
    parser = argparse.ArgumentParser(description="Encode, index, search.")
    parser.add_argument("--out", type=Path, default=Path("found"), help="output folder")
    parser.add_argument("--train-scenes", type=int, default=1500)
    parser.add_argument("--pictures", type=int, default=300, help="images to search")
    flags = parser.parse_args(argv)
    adapter = train_adapter(flags.out, flags.train_scenes)

    table = cg.emoji.write_scenes(flags.out / "data", "test", flags.pictures, ["vi"])["vi"]
    pairs = cg.read_pairs(table)
    clip, encoded = cg.load("emoji"), flags.out / "encoded"
    done = cg.search.encode_folder(clip, table, encoded)  # a second call encodes only changes
    print(f"{done.encoded:,} images encoded, {done.kept:,} known, {done.rows:,} vectors")
    for place, index in cg.search.build_index(encoded):
        print(f"{place}: {index.factory}, {index.rows:,} vectors")

    before = found_in_five(clip, encoded, pairs)
    cg.load_adapter(clip, adapter, name="vi")  # the same vectors, the same index
    print(f"found in the top five: base {before:.1%}, adapter {found_in_five(clip, encoded, pairs):.1%}")
    query = pairs.captions[0][0]
    show(f"text: {query}", cg.search.query(encoded, query, k=3, model=clip))
    show("the same, if it says 'hai'", cg.search.query(encoded, query, k=3, where="caption~hai", model=clip))
    show(f"image: {pairs.images[1].name}", cg.search.query(encoded, image=pairs.images[1], k=3, model=clip))
    both = cg.search.query(encoded, "nền màu trắng", image=pairs.images[1], image_weight=0.6, k=3, model=clip)
    show("the same, and text: nền màu trắng", both)


if __name__ == "__main__":
    main()
