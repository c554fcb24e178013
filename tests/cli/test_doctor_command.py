"""`clipgraft doctor`: what a report of a fault says of the machine, and what it must not say."""

from __future__ import annotations

import http.server
import json
import os
import subprocess
import sys
import tempfile
import threading
from collections.abc import Iterator
from importlib import metadata
from pathlib import Path
from typing import Any

import pytest
import torch

from clipgraft.cli import diagnosis, product_speed
from clipgraft.cli.doctor import private
from clipgraft.cli.main import main


class Answer(http.server.BaseHTTPRequestHandler):
    """A hub that answers."""

    def do_HEAD(self) -> None:
        self.send_response(200)
        self.end_headers()

    def log_message(self, *_: Any) -> None:
        """Nothing on standard error."""


@pytest.fixture
def hub() -> Iterator[int]:
    """The port of a hub on this machine."""
    with http.server.ThreadingHTTPServer(("127.0.0.1", 0), Answer) as server:
        thread = threading.Thread(target=server.serve_forever)
        thread.start()
        yield server.server_address[1]
        server.shutdown()
        thread.join()


def test_the_whole_report(hub: int, tmp_path: Path) -> None:
    """A report of a fault has wrong versions or no speeds, or shows a token, a password or a name."""
    cache = tmp_path / "home" / "kept"
    cache.mkdir(parents=True)
    (cache / "features").write_bytes(bytes(3_000_000))
    env = {
        **os.environ,
        "HOME": str(tmp_path / "home"),
        "CLIPGRAFT_CACHE": str(cache),
        "OMP_NUM_THREADS": "1",
    }
    env |= {"HF_TOKEN": "hf_secret", "HF_ENDPOINT": f"http://me:password@127.0.0.1:{hub}"}
    env |= {"CLIPGRAFT_API_KEYS": "key_secret"}
    for name in ("HF_HUB_OFFLINE", "TRANSFORMERS_OFFLINE", "HF_HUB_CACHE", "HF_HOME"):
        env.pop(name, None)
    done = subprocess.run(
        [sys.executable, "-m", "clipgraft", "doctor", "--json"],
        env=env,
        capture_output=True,
        text=True,
        check=False,
    )
    assert (done.returncode, done.stderr) == (0, "")
    for secret in ("hf_secret", "key_secret", "password", str(tmp_path / "home")):
        assert secret not in done.stdout
    found = json.loads(done.stdout)
    assert list(found) == list(diagnosis.SECTIONS)
    for package in ("torch", "pillow", "transformers"):
        assert found["versions"][package]["version"] == metadata.version(package)
    assert found["devices"]["torch"]["threads"] == 1
    for kind in product_speed.KINDS:
        assert found["matrix products"][f"{kind} on cpu"]["giga_per_second"] > 0
    assert found["folders"]["cache"]["bytes"] == 3_000_000
    assert found["folders"]["cache"]["text"].startswith("~/kept: 3.0 MB, ")
    assert found["hub and environment"]["hub"]["reachable"] is True
    assert found["hub and environment"]["HF_TOKEN"]["text"] == "set (its value is not shown)"


@pytest.fixture
def quick(monkeypatch: pytest.MonkeyPatch) -> None:
    """Without products of matrices, and with a hub that refuses at once."""
    monkeypatch.setattr(product_speed, "gigaflops", lambda kind, device: 1.0)
    monkeypatch.setattr("huggingface_hub.constants.ENDPOINT", "http://127.0.0.1:9")
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_OFFLINE", False)


@pytest.mark.usefixtures("quick")
def test_what_is_missing_is_named_with_what_installs_it(cli: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    """A user learns of a missing extra from a failed command only; or a hub that is away ends the report."""
    real = metadata.version

    def version(name: str) -> str:
        if name == "faiss-cpu":
            raise metadata.PackageNotFoundError(name)
        return "0.1" if name == "onnx" else real(name)

    monkeypatch.setattr(metadata, "version", version)
    outcome = cli("doctor")
    lines = {line.split()[0]: line.strip() for line in outcome.out.splitlines() if line.startswith("  ")}
    assert (outcome.code, outcome.err) == (0, "")
    assert "faiss-cpu missing: pip install 'clipgraft[search]'" in lines["search"]
    assert "onnx 0.1, but >=1.18 is needed: pip install 'clipgraft[onnx]'" in lines["onnx"]
    assert "http://127.0.0.1:9 does not answer: " in lines["hub"]


@pytest.mark.usefixtures("quick")
def test_what_is_broken_is_the_exit_code(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    """A script goes on though nothing can work; or the first broken part hides all the others."""

    def full(*_: Any, **__: Any) -> None:
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(tempfile, "NamedTemporaryFile", full)
    monkeypatch.setattr(torch.backends.cpu, "get_cpu_capability", full)
    monkeypatch.setitem(sys.modules, "re2", None)
    with pytest.raises(SystemExit) as stop:
        main(["doctor"])
    printed = capsys.readouterr()
    assert stop.value.code == 1
    assert [line.partition(": ")[2].partition(":")[0] for line in printed.err.splitlines()] == [
        "import re2",
        "torch",
        "temporary files",
    ]
    assert "cannot be told: [Errno 28] No space left on device" in printed.out
    assert "Pillow" in printed.out


@pytest.mark.usefixtures("quick")
def test_offline_is_said_and_nothing_is_asked(cli: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    """Somebody who set it years ago waits for models that never come."""
    monkeypatch.setenv("HF_HUB_OFFLINE", "1")
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_OFFLINE", True)
    monkeypatch.setattr("huggingface_hub.utils.get_session", lambda: pytest.fail("the hub was asked"))
    assert "not asked: HF_HUB_OFFLINE is set" in cli("doctor").out


def test_it_starts_without_what_it_would_find_broken() -> None:
    """The command that tells which package is broken needs that package itself."""
    code = (
        "import sys\nsys.modules['pydantic'] = None\n"
        "from clipgraft.cli import diagnosis\n"
        "for name in list(diagnosis.SECTIONS)[1:]: del diagnosis.SECTIONS[name]\n"
        "from clipgraft.cli.main import main\nmain(['doctor', '--json'])\n"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=False)
    assert done.returncode == 1
    assert json.loads(done.stdout)["versions"]["import pydantic"]["state"] == "broken"
    assert done.stderr.startswith("broken: import pydantic: ")


def test_speeds_count_two_operations_for_a_multiply_add(monkeypatch: pytest.MonkeyPatch) -> None:
    """Speeds of two reports cannot be compared with each other or with a data sheet."""
    monkeypatch.setattr(product_speed, "_ROUNDS", 0)
    monkeypatch.setattr(product_speed, "_seconds", lambda multiply, device: multiply().shape[0] / 2560)
    for kind in product_speed.KINDS:
        assert product_speed.gigaflops(kind, "cpu") == pytest.approx(2 * 256**3 / 0.1 / 1e9)


def test_names_stay_private(monkeypatch: pytest.MonkeyPatch) -> None:
    """A report in public has the name of its writer, or a proxy's password."""
    monkeypatch.setenv("HOME", "/srv/people/ann")
    monkeypatch.setenv("LOGNAME", "ann")
    given = "/srv/people/ann/x, /srv/people/anna/x, /tmp/ann/y https://ann:pw@proxy:3128/ banner"
    assert private(given) == "~/x, /srv/people/anna/x, /tmp/USER/y https://***@proxy:3128/ banner"
