"""Wheel and sdist, as they are built for others, installed where there is nothing of the repository."""

from __future__ import annotations

import hashlib
import os
import subprocess
import sys
import tarfile
import zipfile
from dataclasses import dataclass
from email.message import Message
from email.parser import Parser
from pathlib import Path

import pytest

import clipgraft as cg

ROOT = Path(__file__).parents[2]
MOST_BYTES = 30_000_000
LICENSES = (
    "LICENSE",
    "src/clipgraft/assets/emoji/art/LICENSES.md",
    "src/clipgraft/assets/fonts/LICENSE-DejaVu.txt",
)


@dataclass(frozen=True)
class Built:
    """What was built: the wheel of this folder, the sdist, and the wheel of the sdist."""

    wheel: Path
    sdist: Path
    again: Path


def build(*words: object) -> None:
    command = [sys.executable, "-m", "build", "--no-isolation", *map(str, words)]
    done = subprocess.run(command, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stdout + done.stderr


@pytest.fixture(scope="module")
def built(tmp_path_factory: pytest.TempPathFactory) -> Built:
    """Built as `make dist` does, and once more from the folder itself."""
    both, alone = tmp_path_factory.mktemp("both"), tmp_path_factory.mktemp("alone")
    build("--outdir", both, ROOT)
    build("--wheel", "--outdir", alone, ROOT)
    ((again,), (sdist,), (wheel,)) = both.glob("*.whl"), both.glob("*.tar.gz"), alone.glob("*.whl")
    return Built(wheel, sdist, again)


def contents(wheel: Path) -> dict[str, str]:
    """The digests of the files of a wheel."""
    with zipfile.ZipFile(wheel) as archive:
        return {name: hashlib.sha256(archive.read(name)).hexdigest() for name in archive.namelist()}


def about(wheel: Path) -> Message:
    with zipfile.ZipFile(wheel) as archive:
        (name,) = [name for name in archive.namelist() if name.endswith(".dist-info/METADATA")]
        return Parser().parsestr(archive.read(name).decode())


def test_the_wheel_is_whole(built: Built) -> None:
    """The embedded base, a page's script or a licence is left out of what people install."""
    packed = contents(built.wheel)
    source = ROOT / "src"
    wanted = {
        path.relative_to(source).as_posix(): hashlib.sha256(path.read_bytes()).hexdigest()
        for path in (source / "clipgraft").rglob("*")
        if path.is_file() and "__pycache__" not in path.parts and path.suffix != ".pyc"
    }
    assert {name: digest for name, digest in packed.items() if ".dist-info/" not in name} == wanted
    assert "clipgraft/assets/emoji/base/model.safetensors" in wanted
    info = f"clipgraft-{cg.__version__}.dist-info/licenses"
    assert {name for name in packed if "/licenses/" in name} == {f"{info}/{name}" for name in LICENSES}
    assert built.wheel.stat().st_size < MOST_BYTES
    told = about(built.wheel)
    assert (told["Version"], told["License-Expression"]) == (cg.__version__, "Apache-2.0")
    assert built.wheel.name == f"clipgraft-{cg.__version__}-py3-none-any.whl"


def test_the_sdist_builds_the_same_wheel(built: Built) -> None:
    """Distributions that build from source ship something else than PyPI does."""
    assert contents(built.again) == contents(built.wheel)
    assert built.sdist.stat().st_size < MOST_BYTES
    with tarfile.open(built.sdist) as archive:
        names = {name.partition("/")[2] for name in archive.getnames()}
    for name in ("tests/conftest.py", "docs/search.md", "CHANGELOG.md", "CITATION.cff", "recipe/recipe.yaml"):
        assert name in names
    assert not [name for name in names if name.startswith((".", "build/", "logs/")) and name != ".gitignore"]


@pytest.mark.slow
def test_the_installed_wheel_works_far_from_the_repository(built: Built, tmp_path: Path) -> None:
    """Who installs the wheel can neither ask for help nor load the model that comes with it."""
    place = tmp_path / "site"
    pip = [sys.executable, "-m", "pip", "install", "-q", "--no-deps", "--no-index", "--no-compile"]
    subprocess.run([*pip, "--disable-pip-version-check", "--target", place, built.wheel], check=True)
    env = {name: value for name, value in os.environ.items() if not name.startswith("COVERAGE")}
    env |= {"PYTHONPATH": str(place), "HF_HUB_OFFLINE": "1", "CLIPGRAFT_CACHE": str(tmp_path / "cache")}

    def run(*words: str) -> str:
        done = subprocess.run(
            [sys.executable, *words], cwd=tmp_path, env=env, capture_output=True, text=True, check=False
        )
        assert done.returncode == 0, done.stderr
        return done.stdout

    assert "usage: clipgraft demo [--flags]" in run("-m", "clipgraft", "demo", "--help")
    assert (place / "bin" / "clipgraft").is_file()
    told = run(
        "-c",
        "import clipgraft as cg\nclip = cg.load('emoji', device='cpu')\n"
        "print(cg.__file__, clip.encode_text(clip.tokenize(['a cat'])).shape, sep='\\n')",
    )
    where, shape = told.splitlines()
    assert Path(where).parent == place / "clipgraft"
    assert shape == "torch.Size([1, 192])"
