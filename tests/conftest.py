"""Tiny models of both families, shared by all tests. No weights are downloaded."""

from __future__ import annotations

import copy
import itertools
import json
import platform
import re
import signal
import string
import sys
from collections.abc import Callable, Iterator
from importlib import metadata
from pathlib import Path

import pytest
import torch
from hypothesis import settings
from torch import nn

from standin_device import register
from tiny_models import BOS_ID, EOS_ID, TINY_OPENCLIP, build_hf, randomise

# Machines that run tests are busy: no example fails for having been slow.
settings.register_profile("clipgraft", deadline=None)
settings.load_profile("clipgraft")

# The packages whose versions decide most.
_PACKAGES = (
    *("torch", "torchvision", "transformers", "open_clip_torch", "peft", "numpy", "pydantic", "pillow"),
    *("pyarrow", "faiss-cpu", "onnx", "onnxruntime", "ray"),
)
_ALLOWED_SKIPS = Path(__file__).parent / "allowed_skips.txt"


def pytest_addoption(parser: pytest.Parser) -> None:
    parser.addoption(
        "--strict-skips",
        action="store_true",
        help=f"a skip fails the run unless {_ALLOWED_SKIPS.name} has it",
    )


def pytest_configure() -> None:
    """Let Ctrl-C reach the tests and their processes: a shell starts background jobs with SIGINT ignored."""
    if signal.getsignal(signal.SIGINT) == signal.SIG_IGN:
        signal.signal(signal.SIGINT, signal.default_int_handler)
    register()  # the first backward pass of a process fixes which devices autograd knows


@pytest.hookimpl(trylast=True)
def pytest_sessionstart(session: pytest.Session) -> None:
    """Print the versions that the tests run on, once, also under `-q` and with several processes."""
    terminal = session.config.pluginmanager.get_plugin("terminalreporter")
    if terminal is not None and not hasattr(session.config, "workerinput"):
        versions = ", ".join(f"{name} {_version(name)}" for name in _PACKAGES)
        terminal.write_line(f"Python {platform.python_version()} on {platform.platform()}: {versions}")


def _version(name: str) -> str:
    try:
        return metadata.version(name)
    except metadata.PackageNotFoundError:
        return "-"


@pytest.hookimpl(trylast=True)
def pytest_sessionfinish(session: pytest.Session) -> None:
    if _unwelcome(session.config) and session.exitstatus == pytest.ExitCode.OK:
        session.exitstatus = pytest.ExitCode.TESTS_FAILED


def pytest_terminal_summary(terminalreporter: pytest.TerminalReporter, config: pytest.Config) -> None:
    for line in _unwelcome(config):
        terminalreporter.write_line(f"SKIPPED, and not in {_ALLOWED_SKIPS.name}: {line}", red=True)


def _unwelcome(config: pytest.Config) -> list[str]:
    """List skips whose reason is not allowed; none unless `--strict-skips` is given."""
    terminal = config.pluginmanager.get_plugin("terminalreporter")
    if terminal is None or not config.getoption("strict_skips"):
        return []
    lines = _ALLOWED_SKIPS.read_text(encoding="utf-8").splitlines()
    allowed = [line for line in lines if line.strip() and not line.startswith("#")]
    found = []
    for report in terminal.stats.get("skipped", ()):
        where, line, reason = report.longrepr
        reason = reason.removeprefix("Skipped: ")
        if not any(re.fullmatch(pattern, reason) for pattern in allowed):
            found.append(f"{where}:{line}: {reason}")
    return found


@pytest.fixture(scope="session")
def _caches(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Path]:
    """Name folders for caches, none of which is there; `mktemp` would list all earlier ones each time."""
    parent = tmp_path_factory.mktemp("caches")
    return (parent / str(number) for number in itertools.count())


@pytest.fixture(autouse=True)
def _own_cache(_caches: Iterator[Path], monkeypatch: pytest.MonkeyPatch) -> None:
    """Give each test a feature cache of its own."""
    monkeypatch.setenv("CLIPGRAFT_CACHE", str(next(_caches)))


@pytest.fixture(scope="session", autouse=True)
def _pieces_once() -> Iterator[None]:
    """Read CLIP's word pieces once: they are most of the time that loading a tiny model takes."""
    if "open_clip" not in sys.modules:  # no collected test needs it
        yield
        return
    from open_clip.tokenizer import SimpleTokenizer

    made: dict[str, dict[str, object]] = {}
    read = SimpleTokenizer.__init__

    def init(self: object, *arguments: object, **options: object) -> None:
        key = repr((arguments, sorted(options.items())))
        if key not in made:
            read(self, *arguments, **options)
            made[key] = dict(vars(self))
        vars(self).update(made[key])

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(SimpleTokenizer, "__init__", init)
        yield


@pytest.fixture(autouse=True)
def _one_kernel(monkeypatch: pytest.MonkeyPatch) -> None:
    """Let all attention kernels tie for speed, so that no test depends on the load of the machine."""
    monkeypatch.setattr("clipgraft.engine.attention.best_seconds", lambda run: (run(), 1.0)[1])


@pytest.fixture(scope="session")
def tiny_config(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Write an open_clip JSON model config with `tiny_openclip`'s shape. Read only."""
    path = tmp_path_factory.mktemp("config") / "tiny-clip.json"
    path.write_text(json.dumps(TINY_OPENCLIP), encoding="utf-8")
    return path


@pytest.fixture(scope="session")
def _openclip_master() -> nn.Module:
    import open_clip

    torch.manual_seed(0)
    return randomise(open_clip.CLIP(**copy.deepcopy(TINY_OPENCLIP))).eval()


@pytest.fixture(scope="session")
def _hf_master() -> nn.Module:
    return build_hf()


@pytest.fixture
def tiny_openclip(_openclip_master: nn.Module) -> nn.Module:
    """Build an open_clip CLIP for each test: 2 blocks a tower, width 32, 77 tokens, 32×32 pixels."""
    return copy.deepcopy(_openclip_master)


@pytest.fixture
def tiny_openclip_4x(tiny_openclip: nn.Module) -> nn.Module:
    """Convert `tiny_openclip` to the layout of open_clip 4.x."""
    from open_clip_4 import to_4x

    return to_4x(copy.deepcopy(tiny_openclip))


@pytest.fixture
def tiny_hf(_hf_master: nn.Module) -> nn.Module:
    """Build a transformers CLIPModel for each test: 2 layers a tower, width 32, 16 tokens, eos id 99."""
    return copy.deepcopy(_hf_master)


@pytest.fixture
def make_hf() -> Callable[..., nn.Module]:
    """Return `build_hf`, which builds a CLIPModel with a text configuration of the test's choice."""
    return build_hf


@pytest.fixture(scope="session")
def hf_folder(tmp_path_factory: pytest.TempPathFactory, _hf_master: nn.Module) -> Path:
    """Save a transformers folder: the weights of `tiny_hf`, a letter tokenizer, a processor. Read only."""
    from transformers import CLIPImageProcessor, CLIPTokenizer

    folder = tmp_path_factory.mktemp("hub") / "tiny-hf"
    _hf_master.save_pretrained(folder)
    letters = [*string.ascii_lowercase, *string.digits]
    pieces = [*letters, *(f"{letter}</w>" for letter in letters), "th", "the</w>"]
    vocabulary = {piece: index for index, piece in enumerate(pieces)}
    vocabulary |= {f"<unused{index}>": index for index in range(len(vocabulary), BOS_ID)}
    vocabulary |= {"<|startoftext|>": BOS_ID, "<|endoftext|>": EOS_ID}
    CLIPTokenizer(vocab=vocabulary, merges=[("t", "h"), ("th", "e</w>")]).save_pretrained(folder)
    sizes = {"size": {"shortest_edge": 32}, "crop_size": {"height": 32, "width": 32}}
    CLIPImageProcessor(**sizes).save_pretrained(folder)
    return folder
