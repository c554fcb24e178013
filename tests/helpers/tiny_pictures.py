"""Write twelve small noise images with captions, for tests that train."""

from __future__ import annotations

import csv
from pathlib import Path

import numpy as np
from PIL import Image

IMAGES = 12


def write_pictures(folder: Path) -> Path:
    """Write 12 noise images with two captions each; some captions repeat. Returns the CSV's path."""
    folder.mkdir(parents=True, exist_ok=True)
    noise = np.random.default_rng(0)
    table = folder / "pairs.csv"
    with table.open("w", newline="", encoding="utf-8") as file:
        writer = csv.writer(file)
        writer.writerow(("image", "caption"))
        for index in range(IMAGES):
            name = f"{index}.png"
            Image.fromarray(noise.integers(0, 255, (36, 40, 3), dtype=np.uint8)).save(folder / name)
            writer.writerow((name, f"a picture of thing number {index}"))
            writer.writerow(
                (name, "the same words" if index < 3 else f"thing {'very ' * (index % 4)}{index}")
            )
    return table
