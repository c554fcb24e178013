"""`docs/serve.md`: its clients get answers, and its commands are ones that clipgraft takes."""

from __future__ import annotations

import os
import re
import shlex
import shutil
import subprocess
import sys
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

import httpx
import pytest
from PIL import Image
from playwright.sync_api import sync_playwright

import clipgraft as cg
from clipgraft.cli.flags.serve import SERVE
from clipgraft.cli.parser import parse
from clipgraft.serve.api import create_app
from clipgraft.serve.args import ServiceArgs, WebArgs
from clipgraft.serve.service import Service
from page_visits import chromium, write_adapter
from served_app import running

ROOT = Path(__file__).parents[2]
PAGE = (ROOT / "docs" / "serve.md").read_text(encoding="utf-8")
BLOCKS = re.findall(r"^```(\w+)\n(.+?)^```", PAGE, re.M | re.S)
ADDRESS = "http://127.0.0.1:8000"
CURLS = [body for kind, body in BLOCKS if kind == "bash" and "curl " in body]
PROGRAMS = [body for kind, body in BLOCKS if kind == "python"]
(SCRIPT,) = [body for kind, body in BLOCKS if kind == "javascript"]
(SETTINGS,) = [body for kind, body in BLOCKS if kind == "yaml"]
QUICK_START = BLOCKS[0][1]


@dataclass(frozen=True)
class Served:
    """The folder of somebody who read the page, and the server that they started."""

    folder: Path
    url: str


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """What the page's commands name: logs/vi, logs/fr, adapters/shoes, encoded/, cat.jpg."""
    root = tmp_path_factory.mktemp("serving")
    for seed, place in enumerate(("logs/vi", "logs/fr", "adapters/shoes")):
        (root / place).parent.mkdir(exist_ok=True)
        write_adapter(root / place, "text-attention", seed)
    cg.emoji.write_scenes(root / "scenes", "val", 6, ["en"])
    (root / "scenes" / "images").rename(root / "photos")
    cg.search.encode_folder(cg.load("emoji"), root / "photos", root / "encoded", workers=0, progress=False)
    with Image.open(root / "photos" / "val_00000.png") as picture:
        picture.convert("RGB").save(root / "cat.jpg")
    return root


@pytest.fixture(scope="module")
def served(folder: Path) -> Iterator[Served]:
    """The server of the page's examples, in this process."""
    words = tuple(f"{name}={folder / 'logs' / name}" for name in ("vi", "fr"))
    service = ServiceArgs(adapters=words, folders=(f"photos={folder / 'encoded'}",))
    web = WebArgs(allow_adapter_loading=True, adapter_root=folder / "adapters")
    with running(create_app(lambda: Service(cg.load("emoji"), service), web)) as url:
        yield Served(folder, url)


@pytest.mark.parametrize("body", CURLS)
def test_curl(served: Served, body: str) -> None:
    """A line that is copied from the page is refused by the server that the page starts."""
    if shutil.which("curl") is None:
        pytest.skip("no curl to run the lines of docs/serve.md with")
    lines = f'curl() {{ command curl -sS --fail-with-body "$@"; }}\n{body.replace(ADDRESS, served.url)}'
    command = ["bash", "-euo", "pipefail", "-c", lines]
    done = subprocess.run(command, cwd=served.folder, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stdout + done.stderr
    assert '"error"' not in done.stdout


@pytest.mark.parametrize("body", PROGRAMS)
def test_python(
    served: Served, body: str, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    """A program that is copied from the page fails, or gets other vectors than the page says."""
    monkeypatch.chdir(served.folder)
    exec(compile(body.replace(ADDRESS, served.url), "docs/serve.md", "exec"), {})
    printed = capsys.readouterr().out.splitlines()
    assert printed[0].startswith("2 192 " if "OpenAI" in body else "(1, 192)")


def test_javascript(served: Served) -> None:
    """The script of the page gets no results in a browser."""
    path = chromium()
    with sync_playwright() as playwright:
        browser = playwright.chromium.launch(executable_path=path, args=["--no-sandbox"])
        page = browser.new_page()
        told: list[str] = []
        page.on("console", lambda message: told.append(message.text))
        page.goto(served.url)
        page.evaluate(f"(async () => {{ {SCRIPT.replace(ADDRESS, served.url)} }})()")
        browser.close()
    assert [line.split()[0] for line in told] == ["1", "2", "3"]
    assert all("/thumbnails/photos/" in line for line in told)


def lines_of(body: str) -> list[list[str]]:
    """The clipgraft commands of a block, as words."""
    return [
        shlex.split(line, comments=True)[1:] for line in body.splitlines() if line.startswith("clipgraft ")
    ]


def test_commands_and_settings_are_known(tmp_path: Path) -> None:
    """The page names a flag that clipgraft does not have."""
    commands = [words for kind, body in BLOCKS if kind == "bash" for words in lines_of(body)]
    serving = [words[1:] for words in commands if words[0] == "serve"]
    assert len(serving) == 2
    (tmp_path / "serve.yaml").write_text(SETTINGS, encoding="utf-8")
    flags = set(re.findall(r"`(--[\w-]+)[ `]", PAGE))
    taken = {*re.findall(r"--[\w-]+", help_of_serve()), "--config"}
    assert flags - taken == set()
    for words in (*serving, ["--config", str(tmp_path / "serve.yaml")]):
        _, service, _ = parse("serve", "", SERVE, words)
        assert service.folders


def test_the_unit_and_the_container_as_their_files_say() -> None:
    """The page and the file that it tells to install want different commands."""
    unit = (ROOT / "deploy" / "clipgraft.service").read_text(encoding="utf-8")
    image = (ROOT / "Dockerfile").read_text(encoding="utf-8")
    lines = [line for kind, body in BLOCKS if kind == "bash" for line in body.splitlines()]
    installing = [line for line in lines if line.startswith("sudo ")]
    building = [line.partition("  #")[0].rstrip() for line in lines if line.startswith("docker build ")]
    assert len(installing) == 4
    assert len(building) == 2
    assert [line for line in installing if f"#   {line}\n" not in unit] == []
    assert [line for line in building if f"#   {line} " not in image] == []
    (running,) = [line for line in lines if line.startswith("docker run ")]
    _, service, _ = parse("serve", "", SERVE, shlex.split(running.split(" clipgraft ")[1]))
    assert service.folders == ("photos=encoded",)


def help_of_serve() -> str:
    command = [sys.executable, "-m", "clipgraft", "serve", "--help"]
    return subprocess.run(command, capture_output=True, text=True, check=True).stdout


@pytest.mark.slow
def test_the_five_commands_end_at_a_page(folder: Path, tmp_path: Path) -> None:
    """The first thing that a newcomer copies does not lead to a page with their pictures."""
    shutil.copytree(folder / "photos", tmp_path / "photos")
    lines = QUICK_START.replace("--model ViT-B-32 --pretrained laion2b_s34b_b79k", "--model emoji")
    assert len(lines.splitlines()) == 5
    encode, serve = ([sys.executable, "-m", "clipgraft", *words] for words in lines_of(lines))
    env = {**os.environ, "OMP_NUM_THREADS": "1"}
    subprocess.run(encode, cwd=tmp_path, env=env, check=True, capture_output=True)
    with subprocess.Popen(
        [*serve, "--port", "0"],
        cwd=tmp_path,
        env=env,
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
    ) as process:
        try:
            look_at_the_page(process)
        finally:
            process.terminate()
        assert process.wait(60) == 0


def look_at_the_page(process: subprocess.Popen[str]) -> None:
    """Wait for a server, open its page, and search as that does."""
    assert process.stdout is not None
    printed = iter(process.stdout.readline, "")
    ready = next((line for line in printed if line.strip().startswith("ready in ")), None)
    assert ready is not None, "the server ended before it was ready"
    url = ready.split()[-1]
    assert "<title>clipgraft" in httpx.get(url).text
    hits = httpx.post(f"{url}/search", json={"text": "a cat"}, timeout=60).json()["hits"]
    assert len(hits) == 6
    picture = httpx.get(url + hits[0]["thumbnail"], timeout=60)
    assert picture.headers["Content-Type"] == "image/jpeg"
