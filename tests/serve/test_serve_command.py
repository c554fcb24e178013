"""`clipgraft serve` as it is typed: real processes, real HTTP, the embedded base with adapters."""

from __future__ import annotations

import contextlib
import json
import os
import re
import shlex
import signal
import socket
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import httpx
import numpy as np
import pytest
import torch
import torch.nn.functional as F
from torch import nn

import clipgraft as cg
from clipgraft.cli import main
from clipgraft.cli.flags.serve import SERVE
from clipgraft.cli.parser import parse
from clipgraft.models.clip import Clip


@pytest.mark.parametrize(
    "words",
    [
        ["--adapters", "vi=a", "fr=b", "--port", "1"],
        ["--adapters", "vi=a", "--port", "1", "--adapters", "fr=b"],
        ["--adapters=vi=a,fr=b", "--port=1"],
        ["--port", "1", "--adapters", "vi=a,", "fr=b"],
    ],
)
def test_lists_may_be_written_in_any_way(words: list[str], tmp_path: Path) -> None:
    """The second adapter would be a stray word, or silently take the first one's place."""
    _, service, web = parse("serve", "", SERVE, words)
    assert (service.adapters, web.port) == (("vi=a", "fr=b"), 1)
    config = tmp_path / "serve.yaml"
    config.write_text("adapters: [vi=a, fr=b]\nport: 1\n")
    assert parse("serve", "", SERVE, ["--config", str(config)])[1:] == [service, web]


@pytest.fixture
def taken() -> Iterator[int]:
    """A port that somebody listens on."""
    with socket.socket() as listening:
        listening.bind(("127.0.0.1", 0))
        listening.listen()
        yield int(listening.getsockname()[1])


@pytest.mark.parametrize(
    ("words", "says"),
    [
        ("--adapters vi={}/none", "--adapters vi={}/none: there is no adapter, run, or folder of them"),
        ("--folders {}/none", "--folders {}/none: there is no folder that `clipgraft encode` wrote"),
        ("--folders photos={}", "--folders photos={}: is no folder that `clipgraft encode` wrote"),
        ("--api-keys {}/keys", "--api-keys {}/keys: there is no such file or folder"),
        ("--uds {}/a --port 1", "--uds and --host or --port both say where to listen"),
        ("--uds {}/file", "--uds {}/file: there is something else"),
        ("--port {port}", "--port {port} of 127.0.0.1 is in use"),
        ("--ray-address auto", "--ray-address: goes with --engine ray"),
        ("--engine ray --port 0", "--port 0: Ray Serve wants to be told a port"),
        ("--engine ray --uds {}/a", "--uds: Ray Serve listens on a port"),
        ("--allow-adapter-loading", "--adapter-root"),
        ("--precision amp_bf16", "give bf16 or fp32"),
        ("--adapter vi=a", "--adapter: there is no such flag (did you mean --adapters"),
        ("--timeout 0", "--timeout: got '0', allowed is a number from 0.001"),
    ],
)
def test_what_is_wrong_is_told_before_anything_is_loaded(
    words: str, says: str, taken: int, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """A minute of loading would go by before a mistyped path is told, or a page of a library's errors."""
    (tmp_path / "file").write_text("")
    place = {"port": taken}
    typed = words.replace("{}", str(tmp_path)).format(**place)
    assert main(["serve", "--model", "no such model", *shlex.split(typed)]) == 2
    told = capsys.readouterr().err.strip()
    assert says.replace("{}", str(tmp_path)).format(**place) in told
    assert "\n" not in told


def test_without_the_packages(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
    """Somebody who installed clipgraft alone would get a traceback."""
    monkeypatch.setattr(
        "clipgraft.cli.serve.importlib.util.find_spec", lambda name: None if name == "uvicorn" else name
    )
    assert main(["serve", "--model", "no such model"]) == 2
    assert "this needs uvicorn: pip install 'clipgraft[serve]'" in capsys.readouterr().err


@pytest.fixture(scope="module")
def adapters(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder of two adapters of the emoji base, whose updates matter."""
    folder = tmp_path_factory.mktemp("adapters")
    for seed, (name, targets) in enumerate({"vi": "text-attention", "both": "attention"}.items()):
        clip = cg.load("emoji")
        torch.manual_seed(seed)
        cg.apply_lora(clip, r=4, targets=targets)
        for parameter_name, parameter in clip.model.named_parameters():
            if "lora_B" in parameter_name:
                nn.init.normal_(parameter, std=0.5)
        cg.save_adapter(clip, folder / name)
    return folder


@contextlib.contextmanager
def command(*words: str, log: Path) -> Iterator[tuple[subprocess.Popen[str], list[str]]]:
    """Run `clipgraft serve`; gives what it printed until it was ready, or ended."""
    with log.open("w") as errors:
        process = subprocess.Popen(
            [sys.executable, "-m", "clipgraft", "serve", *words],
            stdout=subprocess.PIPE,
            stderr=errors,
            text=True,
            env={**os.environ, "OMP_NUM_THREADS": "1", "PYTHONUNBUFFERED": "1"},
            start_new_session=True,
        )
    assert process.stdout is not None
    lines = []
    try:
        for line in process.stdout:
            lines.append(line.rstrip())
            if line.startswith("  try "):
                break
        yield process, lines
    finally:
        with contextlib.suppress(ProcessLookupError):
            os.killpg(process.pid, signal.SIGKILL)
        process.wait()
        process.stdout.close()


def offline(clip: Clip, text: str) -> np.ndarray:
    row: np.ndarray = F.normalize(clip.encode_text([text]).float(), dim=-1)[0].detach().numpy()
    return row


def test_a_server_answers_as_the_model_does(adapters: Path, tmp_path: Path) -> None:
    """The first thing that somebody types would fail, take long, or give other vectors than the library."""
    with command("--port", "0", "--adapters", str(adapters), log=tmp_path / "log") as (process, lines):
        told = "\n".join(lines)
        found = re.search(r"^ready in ([\d.]+) s: (http://127.0.0.1:\d+)$", told, re.M)
        assert found is not None, told + (tmp_path / "log").read_text()
        assert "  adapters  both, vi" in lines
        curl = shlex.split(lines[-1].removeprefix("  try "))
        body = json.loads(curl[curl.index("-d") + 1])
        assert curl[:2] == ["curl", f"{found[2]}/v1/embeddings"]
        assert body["model"] == "both"
        with httpx.Client(base_url=found[2], timeout=60) as client:
            assert client.get("/ready").json() == {"state": "ready"}
            for name in ("emoji", "vi", "both"):
                answer = client.post("/v1/embeddings", json={**body, "model": name})
                clip = cg.load("emoji" if name == "emoji" else str(adapters / name))
                row = answer.json()["data"][0]["embedding"]
                np.testing.assert_allclose(row, offline(clip, body["input"]), atol=1e-5)
            assert client.post("/v1/embeddings", json={**body, "model": "vl"}).status_code == 404
        process.send_signal(signal.SIGTERM)
        assert process.wait(30) == 0
        assert (tmp_path / "log").read_text() == ""


@pytest.mark.slow
def test_a_model_that_cannot_be_loaded(tmp_path: Path) -> None:
    """A mistyped model would be tried again and again, or told as a traceback of another process."""
    with command("--port", "0", "--model", str(tmp_path / "none"), log=tmp_path / "log") as (process, _):
        assert process.wait(30) == 2
    told = (tmp_path / "log").read_text().strip().splitlines()
    assert told[-1].startswith("clipgraft: ")
    assert not any(line.startswith(("Traceback", "  File")) for line in told)


def test_the_base_is_that_of_the_adapters(
    adapters: Path, tiny_config: Path, tmp_path: Path, capfd: pytest.CaptureFixture[str]
) -> None:
    """An adapter of a tiny base would be refused by the embedded one, as nobody had named its own."""
    from clipgraft.cli.flags.shared import ModelFlags
    from clipgraft.cli.serve import _base_of

    clip = cg.load(str(tiny_config), pretrained="none")
    cg.apply_lora(clip, r=2, targets="text-attention")
    made = str(cg.save_adapter(clip, tmp_path / "tiny"))
    assert _base_of(ModelFlags(), {"tiny": made}).model == str(tiny_config)
    assert _base_of(ModelFlags(model="emoji"), {"tiny": made}).model == "emoji"
    with pytest.raises(cg.errors.ConfigError, match="is an adapter: give its base"):
        _base_of(ModelFlags(model=made), {})


def test_each_process_has_its_gpu(monkeypatch: pytest.MonkeyPatch) -> None:
    """Four processes on a machine with four GPUs would all crowd on the first."""
    from clipgraft.cli.flags.shared import ModelFlags
    from clipgraft.cli.serve import ServiceRecipe, _own_device
    from clipgraft.serve.args import ServiceArgs, WebArgs
    from clipgraft.serve.web_process import Launch

    launch = Launch(ServiceRecipe(ModelFlags(), ServiceArgs(), 3), WebArgs())
    made = launch.numbered(2).make_service
    assert isinstance(made, ServiceRecipe)
    assert (made.process, launch.numbered(2).process) == (2, 2)
    monkeypatch.setattr("torch.cuda.device_count", lambda: 2)
    assert [_own_device("auto", number) for number in range(3)] == ["cuda:0", "cuda:1", "cuda:0"]
    assert _own_device("cpu", 1) == "cpu"
    assert _own_device("cuda:1", 0) == "cuda:1"
    monkeypatch.setattr("torch.cuda.device_count", lambda: 0)
    assert _own_device("auto", 1) == "auto"
