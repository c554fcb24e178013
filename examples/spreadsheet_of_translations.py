"""From a spreadsheet of translations to a search in that language, without a single captioned picture.

    python examples/spreadsheet_of_translations.py --out translated     # writes a spreadsheet first
    python examples/spreadsheet_of_translations.py --table words.csv --source English --target Tiếng
    python examples/spreadsheet_of_translations.py --out greek --language el

The base learns to give for a translation what it gives for the English text. Pictures come in only at the
end, to be searched. A `.xlsx` is read as well (`pip install 'clipgraft[excel]'`); the search needs
`pip install 'clipgraft[search]'`.
"""

from __future__ import annotations

import argparse
import csv
import time
from collections.abc import Sequence
from pathlib import Path

import torch

import clipgraft as cg

SAID = {"vi": "Vietnamese", "tr": "Turkish", "el": "Greek"}


def write_spreadsheet(path: Path, size: int, language: str) -> None:
    """Write English captions of scenes that the base has not seen, with a translation; one has none."""
    scenes = cg.emoji.EmojiScenes("train", size, seed=7)
    rows = []
    for i in range(size):
        which = (0, 1, 2, 4)[i % 4]  # those captions of a scene that say the same in all languages
        rows.append((scenes.captions(i, "en")[which], scenes.captions(i, language)[which]))
    path.parent.mkdir(parents=True, exist_ok=True)
    with path.open("w", encoding="utf-8-sig", newline="") as file:
        csv.writer(file).writerows([("English", SAID[language]), *rows, ("not translated yet", "")])


def main(argv: Sequence[str] | None = None) -> None:
    parser = argparse.ArgumentParser(description="From a spreadsheet of translations to a search.")
    parser.add_argument("--out", type=Path, default=Path("translated"), help="output folder")
    parser.add_argument("--table", type=Path, help="your spreadsheet; by default one is generated")
    parser.add_argument("--source", help="column of texts in the language of the base")
    parser.add_argument("--target", help="column of their translations")
    parser.add_argument("--language", choices=SAID, default="vi", help="of the generated spreadsheet")
    parser.add_argument("--sentences", type=int, default=2000, help="to generate if no table is given")
    parser.add_argument("--scenes", type=int, default=300, help="pictures to search")
    parser.add_argument("--epochs", type=int, default=6)
    flags = parser.parse_args(argv)

    table = flags.table or flags.out / "translations.csv"
    if flags.table is None:
        write_spreadsheet(table, flags.sentences, flags.language)
    texts = cg.data.read_translations(table, csv_source_key=flags.source, csv_target_key=flags.target)
    if texts.report is not None:
        print(texts.report.summary())
    train, val = cg.data.split_translations(texts)

    clip = cg.load("emoji")
    print(train.count_tokens(clip.count_tokens, clip.context_length))
    torch.manual_seed(0)
    cg.apply_lora(clip, r=16, targets="text-matrices")
    run = flags.out / time.strftime("run-%Y%m%d-%H%M%S")
    done = cg.fit_translations(
        clip,
        train,
        val,
        train=cg.TrainArgs(epochs=flags.epochs, batch_size=64, lr=2e-3),
        run=cg.RunArgs(out=run, progress=False, strength="none"),
    )
    print(done.verdict)

    photos = flags.out / "photos"
    tables = cg.emoji.write_scenes(photos, "test", flags.scenes, [flags.language])
    pictures = cg.read_pairs(tables[flags.language])
    with cg.lora_disabled(clip):
        base = cg.evaluate_retrieval(clip, pictures)
    adapted = cg.evaluate_retrieval(clip, pictures)
    for name in ("image_to_text_R@1", "text_to_image_R@1", "text_to_image_R@5"):
        print(f"{name:<20}{base[name]:>8.1%} -> {adapted[name]:.1%}")

    cg.search.encode_folder(clip, photos / "images", flags.out / "encoded")
    asked = cg.emoji.EmojiScenes("test", flags.scenes).captions(0, flags.language)[0]
    print(f"asked for: {asked}")
    for hit in cg.search.query(flags.out / "encoded", asked, k=5, model=clip):
        print(f"{hit.rank}  {hit.score:.3f}  {hit.metadata['path']}")


if __name__ == "__main__":
    main()
