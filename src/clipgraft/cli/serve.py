"""`clipgraft serve`: a base and its adapters behind one address."""

from __future__ import annotations

import contextlib
import importlib.util
import logging
import os
import shlex
import time
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import TYPE_CHECKING

from clipgraft.cli import checks
from clipgraft.cli.flags.serve import SERVE
from clipgraft.cli.flags.shared import ModelFlags
from clipgraft.cli.parser import parse
from clipgraft.cli.terminal import plain_output
from clipgraft.errors import ClipgraftError, ConfigError
from clipgraft.serve.args import ServiceArgs, WebArgs
from clipgraft.shown import shown_line

if TYPE_CHECKING:
    from clipgraft.serve.computing import Begin
    from clipgraft.serve.messages import Backend, Description

log = logging.getLogger("clipgraft")
_SUMMARY = "Answer over HTTP with a base and any number of its adapters, mixed in one batch."
_PACKAGES = ("fastapi", "uvicorn", "prometheus_client")
_LISTED = 8  # adapters and folders named at the start
_EVERYWHERE = ("0.0.0.0", "::")
_KEYS = "CLIPGRAFT_API_KEYS"


def run_serve(argv: Sequence[str]) -> None:
    """Parse, check, listen, start the model, and serve until a signal."""
    begun = time.perf_counter()
    model, service, web = parse("serve", _SUMMARY, SERVE, argv)
    checks.refuse(_faults(model, service, web))
    if web.engine == "ray":
        from clipgraft.serve.ray_app import need_ray_serve, serve_on_ray

        checks.refuse(checks.fault_of(need_ray_serve))
        _warn_of_strangers(web)
        _end(serve_on_ray(ServiceRecipe(model, service), web, _Told(begun, web, None)))
        return
    from clipgraft.serve.launch import serve
    from clipgraft.serve.listening import address_of, listen
    from clipgraft.serve.web_process import Launch

    listening = listen(web)
    _warn_of_strangers(web)
    address = address_of(listening, web)
    recipe = ServiceRecipe(model, service, web.workers)
    launch = Launch(recipe, web, output=plain_output)
    log.info("starting on %s; requests are answered once the model is ready", address)
    _end(serve(launch, listening, _Told(begun, web, address)))


def _end(code: int) -> None:
    """End the command with a code: it has told why."""
    if code:
        raise SystemExit(code)


@dataclass(frozen=True)
class ServiceRecipe:
    """Builds the service of a command in the process that it is sent to."""

    model: ModelFlags
    service: ServiceArgs
    processes: int = 1
    process: int = 0
    begin: Begin | None = None

    def numbered(self, process: int) -> ServiceRecipe:
        """The recipe of one of several processes."""
        return replace(self, process=process)

    def computed_by(self, begin: Begin) -> ServiceRecipe:
        """The recipe of a service whose computing is begun by that."""
        return replace(self, begin=begin)

    def __call__(self) -> Backend:
        """Load the model; adapters that are not there are told before that."""
        _OUTPUT.enter_context(plain_output())
        from clipgraft.cli.common import load_model
        from clipgraft.serve.computing import Computing, alone, in_own_thread
        from clipgraft.serve.service import Service
        from clipgraft.serve.sources import find_sources

        sources = find_sources(self.service.adapters)
        model = _base_of(self.model, sources)
        computing = Computing(_own_threads(self.processes), self.begin or in_own_thread)
        alone()
        if self.processes > 1:
            model = model.model_copy(update={"device": _own_device(model.device, self.process)})
        return Service(load_model(model), self.service, computing)


def _base_of(model: ModelFlags, sources: Mapping[str, str]) -> ModelFlags:
    """The base to load: without --model that of the first adapter that tells its own.

    Raises:
        ConfigError: --model is an adapter.
    """
    from clipgraft.adapters.convert import read_any
    from clipgraft.adapters.open import split_adapter, tell_base

    if "model" in model.model_fields_set:
        _, adapter = split_adapter(model.model, model.pretrained)
        if adapter is not None:
            raise ConfigError(f"--model {model.model} is an adapter: give its base, and this with --adapters")
        return model
    for name, source in sources.items():
        if source.startswith("hf:"):
            continue
        try:
            base = read_any(Path(source)).base
        except ClipgraftError:  # told when it is asked for
            continue
        if base.get("name"):
            tell_base(base["name"], base.get("pretrained"), f"the adapter {name}")
            update = {"model": base["name"], "pretrained": base.get("pretrained") or None}
            return model.model_copy(update=update)
    return model


_OUTPUT = contextlib.ExitStack()  # of a model's process, which prints until it ends


def _own_device(name: str, process: int) -> str:
    """The device of one of several processes: of several GPUs each takes the next, if none is named."""
    import torch

    gpus = torch.cuda.device_count()
    return f"cuda:{process % gpus}" if name in ("auto", "cuda") and gpus > 1 else name


def _own_threads(processes: int) -> int:
    """How many threads of a process compute: its share of the cores, unless the environment says more."""
    import torch

    threads = torch.get_num_threads()
    return threads if "OMP_NUM_THREADS" in os.environ else max(1, threads // processes)


def _faults(model: ModelFlags, service: ServiceArgs, web: WebArgs) -> list[str]:
    """List everything that is wrong and known without a model."""
    faults = []
    if missing := [name for name in _PACKAGES if importlib.util.find_spec(name) is None]:
        faults.append(f"this needs {', '.join(missing)}: pip install 'clipgraft[serve]'")
    if model.precision == "amp_bf16":
        faults.append("--precision amp_bf16: a server computes as its weights are stored: give bf16 or fp32")
    for word in service.adapters:
        faults += _missing("--adapters", word, "adapter, run, or folder of them")
    for word in service.folders:
        faults += _missing("--folders", word, "folder that `clipgraft encode` wrote")
        if _path_of(word).exists() and not (_path_of(word) / "manifest.json").is_file():
            faults.append(f"--folders {word}: is no folder that `clipgraft encode` wrote; encode it first")
    for name, path in (("--api-keys", web.api_keys), ("--adapter-root", web.adapter_root)):
        if path is not None and not path.exists():
            faults.append(f"{name} {path}: there is no such file or folder; check the path")
    if web.ray_address is not None and web.engine != "ray":
        faults.append("--ray-address: goes with --engine ray")
    if web.uds is not None and {"host", "port"} & web.model_fields_set:
        faults.append("--uds and --host or --port both say where to listen: give one of them")
    if web.uds is not None and web.engine == "ray":
        faults.append("--uds: Ray Serve listens on a port; give --host and --port")
    if web.port == 0 and web.engine == "ray":
        faults.append("--port 0: Ray Serve wants to be told a port; give one")
    if web.allow_adapter_loading and web.engine == "ray":
        faults.append("--allow-adapter-loading: replicas on Ray keep the adapters they start with; drop it")
    if web.allow_adapter_loading and web.adapter_root is None:
        faults.append("--allow-adapter-loading: say with --adapter-root which folder they may lie in")
    return faults


def _missing(flag: str, word: str, what: str) -> list[str]:
    path = _path_of(word)
    if word.partition("=")[2].startswith("hf:") or word.startswith("hf:") or path.exists():
        return []
    return [f"{flag} {word}: there is no {what} at {path}; check the path"]


def _path_of(word: str) -> Path:
    """The path of NAME=PATH, or of a path alone."""
    _, equals, path = word.partition("=")
    return Path(path if equals and not Path(word).exists() else word)


def _warn_of_strangers(web: WebArgs) -> None:
    if web.host in _EVERYWHERE and web.uds is None and web.api_keys is None and not os.environ.get(_KEYS):
        log.warning(
            "--host %s without --api-keys: whoever reaches this machine can ask and see all", web.host
        )


class _Told:
    """Prints what is served, and what to try."""

    def __init__(self, begun: float, web: WebArgs, address: str | None) -> None:
        self._begun = begun
        self._web = web
        self._address = address or f"http://{web.host}:{web.port}"

    def __call__(self, described: Description) -> None:
        """Print it: a message has been answered."""
        seconds = time.perf_counter() - self._begun
        log.info("ready in %.1f s: %s", seconds, self._address)
        lines = {
            "base": f"{described.base} on {described.device} ({described.dtype}), {described.dim} dimensions",
            "adapters": _listed([adapter.name for adapter in described.adapters]),
            "folders": _listed([f"{folder.name} ({folder.rows:,})" for folder in described.folders]),
            "page": f"{self._address}/" if self._web.page and self._web.uds is None else "",
            "try": self._curl(described),
        }
        for name, line in lines.items():
            if line:
                log.info("  %-9s %s", name, line)

    def _curl(self, described: Description) -> str:
        if "text" not in described.towers:
            return f"curl {self._where('/describe')}"
        name = described.adapters[0].name if described.adapters else described.base
        body = f'{{"model": {_quoted(name)}, "input": "a red apple"}}'
        key = " -H 'Authorization: Bearer KEY'" if self._web.api_keys or os.environ.get(_KEYS) else ""
        head = "-H 'Content-Type: application/json'"
        return f"curl {self._where('/v1/embeddings')} {head}{key} -d {shlex.quote(body)}"

    def _where(self, path: str) -> str:
        if self._web.uds is not None:
            return f"--unix-socket {shlex.quote(str(self._web.uds))} http://localhost{path}"
        return f"{self._address}{path}"


def _quoted(text: str) -> str:
    import json

    return json.dumps(text, ensure_ascii=False)


def _listed(names: Sequence[str]) -> str:
    shown = ", ".join(shown_line(name, 60) for name in names[:_LISTED])
    rest = len(names) - _LISTED
    return f"{shown} and {rest:,} more" if rest > 0 else shown
