"""From a folder of images and a spreadsheet of captions to an adapter, its gain, and a search.

    python examples/your_own_csv.py --out mine          # generates images and a spreadsheet first
    python examples/your_own_csv.py --out mine --table photos/list.csv --image-key File --caption-key Text

The generated spreadsheet has the usual faults: semicolons, unusual column names, an extra column, a missing
image, a damaged one, an empty caption. The search needs `pip install 'clipgraft[search]'`.
"""

from __future__ import annotations

import argparse
import csv
import random
import time
from collections.abc import Sequence
from pathlib import Path

import torch

import clipgraft as cg


def write_spreadsheet(folder: Path, size: int) -> Path:
    """Write images, and `list.csv` with Vietnamese captions and some usual faults; returns the table."""
    scenes = cg.emoji.EmojiScenes("test", size)  # the base was not trained on any of them
    cg.emoji.write_scenes(folder, "test", size, [])
    files = [f"images/test_{i:05d}.png" for i in range(size)]
    rows = [(file, "shelf 3; A", text) for i, file in enumerate(files) for text in scenes.captions(i, "vi")]
    (folder / "images" / "damaged.png").write_bytes((folder / files[0]).read_bytes()[:300])
    rows += [("images/lost.png", "", "một con mèo"), ("images/damaged.png", "", "hai con chó")]
    rows += [(files[0], "", " "), rows[0]]  # an empty caption, and a duplicate row
    with (folder / "list.csv").open("w", encoding="utf-8-sig", newline="") as file:  # as Excel saves it
        csv.writer(file, delimiter=";").writerows([("Tệp ảnh", "Nơi cất", "Mô tả"), *rows])
    return folder / "list.csv"


def some(pairs: cg.Pairs, places: Sequence[int]) -> cg.Pairs:
    return cg.Pairs(tuple(pairs.images[i] for i in places), tuple(pairs.captions[i] for i in places))


def main(argv: Sequence[str] | None = None) -> None:
    parser = argparse.ArgumentParser(description="From images and a spreadsheet to a search.")
    parser.add_argument("--out", type=Path, default=Path("mine"), help="output folder")
    parser.add_argument("--table", type=Path, help="your spreadsheet as CSV; by default one is generated")
    parser.add_argument("--image-key", default="Tệp ảnh", help="column of image paths, relative to the table")
    parser.add_argument("--caption-key", default="Mô tả", help="column of captions")
    parser.add_argument("--scenes", type=int, default=1500, help="images to generate if no table is given")
    parser.add_argument("--epochs", type=int, default=2)
    flags = parser.parse_args(argv)

    table = flags.table or write_spreadsheet(flags.out / "photos", flags.scenes)
    columns = cg.data.TableArgs(csv_img_key=flags.image_key, csv_caption_key=flags.caption_key)
    pairs = cg.read_pairs(table, columns)
    if pairs.report is not None:
        print(pairs.report.summary())
    order = random.Random(0).sample(range(len(pairs)), len(pairs))
    fifth = len(pairs) // 5  # split by image: no caption of a test image is in the training data
    train, test = some(pairs, order[fifth:]), some(pairs, order[:fifth])

    clip = cg.load("emoji")
    torch.manual_seed(0)
    cg.apply_lora(clip, r=16, alpha=32, targets="linear-text,text.token_embedding,text.proj")
    run = flags.out / time.strftime("run-%Y%m%d-%H%M%S")
    cg.fit(
        clip,
        train,
        train=cg.TrainArgs(epochs=flags.epochs, batch_size=64, lr=2e-3),
        run=cg.RunArgs(out=run, progress=False),
        features=cg.FeatureArgs(autocast=None),
    )

    with cg.lora_disabled(clip):
        base = cg.evaluate_retrieval(clip, test)
    adapted = cg.evaluate_retrieval(clip, test)
    for name in ("image_to_text_R@1", "text_to_image_R@1", "text_to_image_R@5"):
        print(f"{name:<20}{base[name]:>8.1%} -> {adapted[name]:.1%}")

    done = cg.search.encode_folder(clip, table, flags.out / "encoded", data=columns)
    print(f"{done.rows:,} images encoded, {done.errors:,} could not be used; adapter {run / 'adapter'}")
    for hit in cg.search.query(flags.out / "encoded", "hai con chó", k=5, model=clip):
        print(f"{hit.rank}  {hit.score:.3f}  {hit.metadata['path']}  {str(hit.caption).splitlines()[0]}")


if __name__ == "__main__":
    main()
