"""`python -m benchmarks.fewshot FOLDER`: the modes of `clipgraft fewshot` on the emoji classes.

The embedded base and the 25 classes of its objects, whose prompts name the objects, since the base has never
read the names of the classes; shots are drawn from 1,200 pictures, 1,500 others in the same styles are tested
on. All classes with 1, 2, 4, 8 and 16 images of each, and base-to-novel with 4; three seeds. CLIP-LoRA's 500
steps a shot are hours: `--shots` and `--seeds` take fewer, and the same folder goes on; `--steps-per-shot` 50
was measured too, each in a folder of its own. Prints both tables.
"""

from __future__ import annotations

import argparse
from collections.abc import Sequence
from pathlib import Path

import torch

import clipgraft as cg
from clipgraft.data.class_splits import ClassSplits
from clipgraft.emoji.classes import emoji_prompts

_TRAIN, _TEST = 48, 60  # pictures of each class


def main(argv: Sequence[str] | None = None) -> None:
    """Run what is not finished, and print the tables."""
    parser = argparse.ArgumentParser(
        prog="python -m benchmarks.fewshot", description=(__doc__ or "").split("\n")[0]
    )
    parser.add_argument("folder", type=Path)
    parser.add_argument("--shots", default="1,2,4,8,16")
    parser.add_argument("--novel-shots", default="4")
    parser.add_argument("--seeds", type=int, default=3)
    parser.add_argument("--steps-per-shot", type=int, help="default: 500 of CLIP-LoRA, 300 of 2SFS")
    args = parser.parse_args(argv)
    torch.set_num_threads(1)
    train, test = (
        cg.data.read_labelled(cg.emoji.write_classes(args.folder / "classes", split, size), progress=False)
        for split, size in (("train", _TRAIN), ("val", _TEST))
    )
    prompts = [emoji_prompts()[name] for name in train.classes]
    data = cg.train.FewShotData(ClassSplits(train, test, train.classes), prompts)
    features = cg.FeatureArgs(feature_cache=args.folder / "features")
    for setting, shots in (("all", args.shots), ("base-to-novel", args.novel_shots)):
        options = cg.train.FewShotArgs(
            setting=setting, shots=shots, seeds=args.seeds, steps_per_shot=args.steps_per_shot
        )
        out = args.folder / f"{setting}-{args.steps_per_shot or 'published'}"
        found = cg.train.compare_few_shot(cg.load("emoji"), data, options, out=out, features=features)
        print(f"\n{found.table().markdown()}", flush=True)


if __name__ == "__main__":
    main()
