"""HEIC photos, as phones take them, by the real pillow-heif."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

import pytest

import clipgraft as cg

# A process of its own: pillow-heif teaches Pillow for good, and other tests are of Pillow without it.
WRITE = """
import sys
import numpy as np
import pillow_heif
from PIL import Image

pillow_heif.register_heif_opener()
pixels = np.zeros((40, 60, 3), np.uint8)
pixels[:20, :30] = (255, 0, 0)
picture = Image.fromarray(pixels)
exif = picture.getexif()
exif[274] = 6  # a phone that was held upright: a quarter turn to the right
picture.save(sys.argv[1] + "/IMG_1.HEIC", quality=95, exif=exif.tobytes())
"""
READ = """
import sys
from pathlib import Path
import numpy as np
import clipgraft as cg
from clipgraft.pictures import open_image
from clipgraft.report.page import Thumbnails
from tar_shards import write_tar

folder = Path(sys.argv[1])
assert Thumbnails().get(str(folder / "IMG_1.HEIC")) is not None
(folder / "IMG_1.txt").write_text("a red corner")
content = (folder / "IMG_1.HEIC").read_bytes()
(folder / "tars").mkdir()
write_tar(folder / "tars" / "x.tar", [("a.heic", content), ("a.txt", "a red corner")])
for source in (folder / "tars", folder):
    (image, captions), = cg.read_pairs(source)
    assert captions == ("a red corner",)
    seen = np.asarray(open_image(image)).astype(int)
    assert seen.shape == (60, 40, 3), seen.shape
    assert seen[5, -5, 0] > 200 and seen[5, 5].max() < 60, (seen[5, -5], seen[5, 5])
"""


def test_a_photo_of_a_phone(tmp_path: Path) -> None:
    """HEIC photos would be refused, lie on their side, or have no thumbnail, with pillow-heif installed."""
    pytest.importorskip("pillow_heif", reason="needs pillow-heif")
    helpers = Path(__file__).parents[1] / "helpers"
    path = os.pathsep.join(
        [str(Path(cg.__file__).parents[1]), str(helpers), os.environ.get("PYTHONPATH", "")]
    )
    env = {**os.environ, "PYTHONPATH": path}
    for script in (WRITE, READ):
        command = [sys.executable, "-c", script, str(tmp_path)]
        done = subprocess.run(command, env=env, capture_output=True, text=True, check=False)
        assert done.returncode == 0, done.stderr
