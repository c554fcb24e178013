"""What `clipgraft doctor` looks at: packages, folders, the hub, and by `machine` the rest."""

from __future__ import annotations

import importlib
import os
import platform
import shutil
import sys
import tempfile
import threading
import time
from collections.abc import Callable, Iterator
from importlib import metadata
from pathlib import Path

from clipgraft.cli.findings import Finding, attempt, format_bytes
from clipgraft.cli.machine import decoders, devices, speed

# Extras for those who change clipgraft, or only document it.
_FOR_DEVELOPERS = ("test", "docs", "bench", "release")
_IMPORTED = ("numpy", "pydantic", "yaml", "safetensors", "re2", "tqdm")
_LOOKING = 2.0  # seconds to add up the sizes of a folder
_ANSWER = 3.0  # seconds to wait for the hub
_NAMED = ("OMP_NUM_THREADS", "CUDA_VISIBLE_DEVICES", "CLIPGRAFT_CACHE", "TMPDIR", "HF_HOME", "HF_ENDPOINT")
_SECRET = ("HF_TOKEN", "CLIPGRAFT_API_KEYS")
_OFFLINE = ("HF_HUB_OFFLINE", "TRANSFORMERS_OFFLINE")


def versions() -> list[Finding]:
    """Versions of clipgraft, Python, the system, and of the packages that clipgraft needs."""
    from clipgraft import __version__

    found = [
        Finding("clipgraft", __version__, numbers={"version": __version__}),
        Finding(
            "Python", f"{platform.python_version()} ({platform.python_implementation()}, {sys.executable})"
        ),
        Finding("system", platform.platform()),
    ]
    found += attempt("packages", lambda: [_package(name) for name in _required()[""]])
    return found + [finding for name in _IMPORTED for finding in _importable(name)]


def _importable(name: str) -> list[Finding]:
    """Nothing where a module can be imported; those that take longer are imported by later looks."""
    try:
        importlib.import_module(name)
    except Exception as error:
        reason = " ".join(str(error).split()) or type(error).__name__
        return [Finding(f"import {name}", reason[:200], "broken")]
    return []


def extras() -> list[Finding]:
    """Extras whose packages are missing, with the line that installs them."""
    return attempt("extras", lambda: [_extra(name, needed) for name, needed in _required().items() if name])


def _required() -> dict[str, list[str]]:
    """The requirements by extra, those of clipgraft itself under "", as its installation lists them."""
    from packaging.requirements import Requirement

    lines = [Requirement(line) for line in metadata.requires("clipgraft") or ()]
    names = list(metadata.metadata("clipgraft").get_all("Provides-Extra") or ())
    found: dict[str, list[str]] = {}
    for extra in ["", *(name for name in names if name not in _FOR_DEVELOPERS)]:
        wanted = [line for line in lines if line.marker is None or line.marker.evaluate({"extra": extra})]
        core = [line for line in lines if line.marker is None]
        found[extra] = [
            str(line).partition(";")[0].strip() for line in wanted if not extra or line not in core
        ]
    return found


def _package(requirement: str) -> Finding:
    """A package that clipgraft cannot do without."""
    name, version, fault = _version(requirement)
    return Finding(
        name, f"{version}{fault}".strip(), "broken" if fault else "ok", {"version": version or None}
    )


def _extra(extra: str, needed: list[str]) -> Finding:
    packages = [_version(requirement) for requirement in needed]
    faults = [f"{name} {version}{fault}".strip() for name, version, fault in packages if fault]
    if not faults:
        return Finding(extra, ", ".join(f"{name} {version}" for name, version, _ in packages))
    return Finding(extra, f"{', '.join(faults)}: pip install 'clipgraft[{extra}]'", "missing")


def _version(requirement: str) -> tuple[str, str, str]:
    """Name and version of a package, and what is wrong with it or nothing."""
    from packaging.requirements import Requirement

    wanted = Requirement(requirement)
    try:
        version = metadata.version(wanted.name)
    except metadata.PackageNotFoundError:
        return wanted.name, "", "missing"
    if not wanted.specifier.contains(version, prereleases=True):
        return wanted.name, version, f", but {wanted.specifier} is needed"
    return wanted.name, version, ""


def folders() -> list[Finding]:
    """Sizes of the caches, room beside them, and whether temporary files can be written."""
    return [
        *attempt("cache", _cache),
        *attempt("hub cache", _hub_cache),
        *attempt("temporary files", _temporary, necessary=True),
    ]


def _cache() -> Finding:
    from clipgraft.files import cache_folder

    return _folder("cache", cache_folder())


def _hub_cache() -> Finding:
    from huggingface_hub import constants

    return _folder("hub cache", Path(constants.HF_HUB_CACHE))


def _folder(name: str, path: Path) -> Finding:
    existing = next(parent for parent in (path, *path.absolute().parents) if parent.exists())
    free = shutil.disk_usage(existing).free
    if existing != path:
        return Finding(
            name, f"{path}: not there yet, {format_bytes(free)} free", numbers={"bytes": 0, "free": free}
        )
    size, whole = _size(path)
    writable = "" if os.access(path, os.W_OK) else ", not writable"
    told = f"{path}: {'' if whole else 'more than '}{format_bytes(size)}, {format_bytes(free)} free{writable}"
    return Finding(name, told, "missing" if writable else "ok", {"bytes": size, "free": free})


def _size(folder: Path) -> tuple[int, bool]:
    """The bytes below a folder, and whether all were counted in the time there is."""
    end, total = time.monotonic() + _LOOKING, 0
    for size in _sizes(folder):
        total += size
        if time.monotonic() > end:
            return total, False
    return total, True


def _sizes(folder: Path) -> Iterator[int]:
    """Sizes of the files below a folder; links are not followed, so that no file counts twice."""
    for root, _, names in os.walk(folder):
        for name in names:
            try:
                yield os.lstat(Path(root) / name).st_size
            except OSError:  # deleted meanwhile
                continue


def _temporary() -> Finding:
    folder = tempfile.gettempdir()
    with tempfile.NamedTemporaryFile() as file:
        file.write(b"clipgraft")
        file.flush()
    return Finding(
        "temporary files", f"{folder}: writable, {format_bytes(shutil.disk_usage(folder).free)} free"
    )


def hub() -> list[Finding]:
    """Whether the hub answers, and what the environment says of it."""
    return [*attempt("hub", _hub), *_environment()]


def _hub() -> Finding:
    from huggingface_hub import constants, is_offline_mode
    from huggingface_hub.utils import get_session

    endpoint = constants.ENDPOINT
    if is_offline_mode():
        names = [name for name in _OFFLINE if os.environ.get(name)]
        return Finding(
            "hub",
            f"not asked: {' and '.join(names) or 'offline mode'} is set, downloaded models alone are used",
        )
    told = [f"no answer in {_ANSWER:.0f} s"]

    def ask() -> None:
        started = time.perf_counter()
        try:
            status = get_session().head(endpoint, timeout=_ANSWER).status_code
        except Exception as error:  # each release of huggingface_hub has another HTTP library
            told[0] = " ".join(str(error).split())[:200] or type(error).__name__
        else:
            told[:] = [
                f"{endpoint} answers ({status}) in {1000 * (time.perf_counter() - started):.0f} ms",
                "",
            ]

    # A name server that is silent keeps a request longer than its own timeout.
    asking = threading.Thread(target=ask, daemon=True)
    asking.start()
    asking.join(_ANSWER)
    if len(told) > 1:
        return Finding("hub", told[0], numbers={"reachable": True})
    return Finding("hub", f"{endpoint} does not answer: {told[0]}", "missing", {"reachable": False})


def _environment() -> list[Finding]:
    """Variables that are set; of secrets, only that they are."""
    shown = [Finding(name, os.environ[name]) for name in (*_NAMED, *_OFFLINE) if os.environ.get(name)]
    return shown + [Finding(name, "set (its value is not shown)") for name in _SECRET if os.environ.get(name)]


SECTIONS: dict[str, Callable[[], list[Finding]]] = {
    "versions": versions,
    "extras": extras,
    "devices": devices,
    "matrix products": speed,
    "decoders": decoders,
    "folders": folders,
    "hub and environment": hub,
}
