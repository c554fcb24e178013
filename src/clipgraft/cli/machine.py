"""Looks of `clipgraft doctor` at the machine: devices, their speed, and what decodes pictures."""

from __future__ import annotations

import importlib.util
import os
import platform
import re
from functools import partial
from importlib import metadata
from pathlib import Path

from clipgraft.cli.findings import Finding, attempt, format_bytes

_FLAGS = ("avx2", "avx512f", "avx512_bf16", "avx512_vnni", "amx_bf16", "amx_int8", "asimd", "bf16", "i8mm")


def devices() -> list[Finding]:
    """The CPU, its memory, and the accelerators that torch sees."""
    return [
        *attempt("CPU", _cpu),
        *attempt("memory", _memory),
        *attempt("torch", _torch, necessary=True),
        *attempt("accelerators", _accelerators),
    ]


def _cpu() -> Finding:
    model, flags = platform.machine(), set[str]()
    information = Path("/proc/cpuinfo")
    if information.exists():
        text = information.read_text(encoding="utf-8", errors="replace")
        if named := re.search(r"^model name\s*: (.+)$", text, re.M):
            model = f"{named[1].strip()}, {model}"
        for line in re.findall(r"^(?:flags|Features)\s*: (.+)$", text, re.M)[:1]:
            flags = set(line.split())
    known = [flag for flag in _FLAGS if flag in flags]
    usable = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count()
    told = f"{model}; {usable} of {os.cpu_count()} cores{'; ' if known else ''}{' '.join(known)}"
    return Finding("CPU", told, numbers={"cores": usable})


def _memory() -> Finding:
    """Memory of the machine, and the limit of a container where that is less."""
    pages, size = os.sysconf("SC_PHYS_PAGES"), os.sysconf("SC_PAGE_SIZE")
    total, limits = pages * size, []
    for name in ("/sys/fs/cgroup/memory.max", "/sys/fs/cgroup/memory/memory.limit_in_bytes"):
        text = Path(name).read_text(encoding="ascii").strip() if Path(name).exists() else ""
        limits += [int(text)] if text.isdecimal() and int(text) < total else []
    free = re.search(r"^MemAvailable:\s+(\d+) kB", _read("/proc/meminfo"), re.M)
    parts = [format_bytes(total), *(f"a limit of {format_bytes(limit)}" for limit in limits[:1])]
    parts += [f"{format_bytes(1024 * int(free[1]))} available"] if free else []
    return Finding("memory", ", ".join(parts), numbers={"bytes": min([total, *limits])})


def _read(path: str) -> str:
    return Path(path).read_text(encoding="utf-8") if Path(path).exists() else ""


def _torch() -> Finding:
    import torch

    build = [f"{torch.get_num_threads()} threads", f"CPU kernels {torch.backends.cpu.get_cpu_capability()}"]
    if torch.version.cuda:
        build.append(f"built for CUDA {torch.version.cuda}")
    if hip := getattr(torch.version, "hip", None):
        build.append(f"built for ROCm {hip}")
    return Finding(
        "torch", ", ".join([torch.__version__, *build]), numbers={"threads": torch.get_num_threads()}
    )


def _accelerators() -> list[Finding]:
    import torch

    found = []
    for index in range(torch.cuda.device_count()):
        about = torch.cuda.get_device_properties(index)
        capability = f"compute capability {about.major}.{about.minor}"
        told = f"{about.name}, {format_bytes(about.total_memory)}, {capability}"
        found.append(Finding(f"cuda:{index}", told, numbers={"bytes": about.total_memory}))
    current = torch.accelerator.current_accelerator(check_available=True)
    if current is not None and current.type != "cuda":
        count = torch.accelerator.device_count()
        found.append(Finding(current.type, f"{count} device{'s' * (count != 1)}"))
    if not found:
        built = "" if torch.version.cuda else ": this torch is built without CUDA"
        found.append(Finding("accelerators", f"none that torch sees{built}"))
    return found


def speed() -> list[Finding]:
    """Speed of matrix products where clipgraft computes."""
    from clipgraft.cli.product_speed import KINDS, gigaflops

    def measured(kind: str, device: str) -> Finding:
        found = gigaflops(kind, device)
        unit = "Gop/s" if kind == "int8" else "GFLOP/s"
        return Finding(
            f"{kind} on {device}", f"{found:,.0f} {unit}", numbers={"giga_per_second": round(found, 1)}
        )

    return [
        finding
        for device in _places()
        for kind in KINDS
        for finding in attempt(f"{kind} on {device}", partial(measured, kind, device))
    ]


def _places() -> list[str]:
    """Torch's names of the kinds of device here; what is wrong with torch is told by another look."""
    try:
        import torch

        current = torch.accelerator.current_accelerator(check_available=True)
    except Exception:
        return ["cpu"]
    return ["cpu"] if current is None else ["cpu", current.type]


def decoders() -> list[Finding]:
    """What decodes pictures."""
    return [
        *attempt("Pillow", _pillow, necessary=True),
        *attempt("torchvision", _torchvision, necessary=True),
        *attempt("simplejpeg", lambda: _module("simplejpeg", "simplejpeg")),
        *attempt("HEIC", _heic),
    ]


def _pillow() -> Finding:
    """Pillow decodes a JPEG that it wrote; its codecs."""
    import io

    import PIL
    from PIL import Image, features

    stored = io.BytesIO()
    Image.new("RGB", (32, 24), (200, 40, 40)).save(stored, "JPEG")
    with Image.open(io.BytesIO(stored.getvalue())) as picture:
        red = picture.convert("RGB").getpixel((4, 4))
    if not isinstance(red, tuple) or max(abs(a - b) for a, b in zip(red, (200, 40, 40), strict=True)) > 8:
        raise ValueError(f"a JPEG of one colour came back as {red}")
    turbo = features.version_feature("libjpeg_turbo") if features.check("libjpeg_turbo") else None
    names = [f"libjpeg-turbo {turbo}" if turbo else "libjpeg (not turbo: slower)"]
    names += [name for name in ("webp", "avif", "jpg_2000") if features.check(name)]
    return Finding("Pillow", f"{PIL.__version__}, {', '.join(names)}")


def _torchvision() -> Finding:
    import torchvision

    return Finding("torchvision", str(torchvision.__version__))


def _module(name: str, package: str) -> Finding:
    if importlib.util.find_spec(name) is None:
        return Finding(name, "not installed")
    return Finding(name, metadata.version(package))


def _heic() -> Finding:
    if importlib.util.find_spec("pillow_heif") is None:
        return Finding("HEIC", "missing: pip install 'clipgraft[heic]'", "missing")
    return Finding("HEIC", f"pillow-heif {metadata.version('pillow-heif')}")
