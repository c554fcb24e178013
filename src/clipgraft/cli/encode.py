"""`clipgraft encode`."""

from __future__ import annotations

import logging
from collections.abc import Sequence
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING

from clipgraft.cli import checks
from clipgraft.cli.flags.groups import Group
from clipgraft.cli.flags.search import EncodeFlags
from clipgraft.cli.flags.shared import ModelFlags
from clipgraft.cli.parser import parse
from clipgraft.data.args import TableArgs
from clipgraft.errors import ConfigError, DataError
from clipgraft.options import part
from clipgraft.search.args import EncodeArgs

if TYPE_CHECKING:
    from clipgraft.models.clip import Clip
    from clipgraft.search.encode import EncodeResult

log = logging.getLogger("clipgraft")
_NO_COPY = "npy"
_SUMMARY = (
    "Write unit-norm vectors of images or texts in clip-retrieval's layout; update them on a second run."
)


def run_encode(argv: Sequence[str]) -> None:
    """Parse, load, encode, and print what was done."""
    encoding = Group(EncodeArgs, without=frozenset({"autocast"}))
    model_spec, spec, args = parse("encode", _SUMMARY, [ModelFlags, EncodeFlags, encoding], argv)
    checks.refuse(_faults(model_spec, spec, args))
    from clipgraft.cli.common import load_model

    model_spec, spec = _adapter_apart(model_spec, spec)
    clip = load_model(_with_known_base(model_spec, spec))
    paths = _load_adapters(clip, spec)
    try:
        result = _encode(clip, spec, args.replace(autocast=model_spec.autocast), paths)
    except KeyboardInterrupt:
        what = "interrupted: finished shards are kept, and the same command goes on from there"
        raise KeyboardInterrupt(what) from None
    _report(result, spec.source, args)
    if spec.to != _NO_COPY:
        from clipgraft.cli.search import copy_vectors

        try:
            copy_vectors(spec.out, spec.to)
        except DataError as error:
            later = (
                f"{spec.out} is complete: `clipgraft index {spec.out} --to …` copies it, with --overwrite too"
            )
            raise DataError(f"{error}; {later}") from error


def _faults(model: ModelFlags, spec: EncodeFlags, args: EncodeArgs) -> list[str]:
    """List everything that is wrong and known without weights or pixels, missing packages included."""
    from clipgraft.search.store import need_pyarrow

    faults = []
    if Path(spec.source).suffix.lower() == ".txt" and not args.texts:
        faults.append(f"{spec.source}: a .txt file holds texts, and --texts is missing: add it")
    if spec.adapter is not None and spec.adapters is not None:
        faults.append("--adapter and --adapters: give one of them")
    faults += args.replace(autocast=model.autocast).faults()
    if args.gate is not None:
        faults += checks.missing_data("--gate", args.gate)
    if args.engine == "ray":
        from clipgraft.search.ray_engine import need_ray

        faults += checks.fault_of(need_ray)
    if spec.to != _NO_COPY:
        from clipgraft.search.export.driver import check_target

        faults += checks.fault_of(partial(check_target, spec.to))
    faults += checks.fault_of(need_pyarrow) + checks.output_faults("OUT", spec.out, folder=True)
    faults += checks.device_faults(model.device)
    clip = None
    if "model" in model.model_fields_set:
        clip, wrong = checks.structure_of(model)
        faults += wrong
    if spec.adapter is not None:
        faults += checks.adapter_faults("--adapter", spec.adapter, clip, spec.peft_out_proj)
    for path in spec.adapters or ():
        faults += checks.adapter_faults("--adapters", Path(path), clip, spec.peft_out_proj)
    return faults


def _adapter_apart(model: ModelFlags, spec: EncodeFlags) -> tuple[ModelFlags, EncodeFlags]:
    """Split `--model ADAPTER_OR_RUN` into its base and `--adapter`, whose path is recorded."""
    from clipgraft.adapters.open import split_adapter

    base, adapter = split_adapter(model.model, model.pretrained)
    if adapter is None:
        return model, spec
    if spec.adapter is not None or spec.adapters is not None:
        raise ConfigError(
            f"--model {model.model} is an adapter: give its base there, and the adapters with their own flag"
        )
    named = {"model": base.name, "pretrained": base.pretrained or None}
    return model.model_copy(update=named), spec.model_copy(update={"adapter": adapter})


def _with_known_base(model: ModelFlags, spec: EncodeFlags) -> ModelFlags:
    """Without --model, take the base of what the folder holds already, or of the adapter."""
    if "model" in model.model_fields_set:
        return model
    from clipgraft.adapters.convert import read_any
    from clipgraft.adapters.open import tell_base
    from clipgraft.search.manifest import read_manifest

    before = read_manifest(spec.out)
    given = spec.adapter or (Path(spec.adapters[0]) if spec.adapters else None)
    base = {"name": "", "pretrained": ""}
    if before is not None:
        base = {"name": before.origin.name, "pretrained": before.origin.pretrained}
    elif given is not None:
        base = read_any(given, peft_out_proj=spec.peft_out_proj).base
    if not base.get("name"):
        return model
    who = f"the adapter {given}" if before is None else f"the encoded folder {spec.out}"
    tell_base(base["name"], base.get("pretrained"), who)
    return model.model_copy(update={"model": base["name"], "pretrained": base.get("pretrained") or None})


def _load_adapters(clip: Clip, spec: EncodeFlags) -> dict[str, str]:
    """Put the adapters on the model; returns where each was read, by name."""
    from clipgraft.adapters.attach import load_adapter
    from clipgraft.cli.common import name_after

    given = [spec.adapter] if spec.adapter is not None else [Path(path) for path in spec.adapters or ()]
    paths: dict[str, str] = {}
    for path in given:
        name = name_after(path.resolve(), paths)
        load_adapter(
            clip,
            path,
            name,
            activate=spec.adapter is not None,
            force=spec.force,
            peft_out_proj=spec.peft_out_proj,
        )
        paths[name] = str(path.resolve())
    return paths


def _encode(clip: Clip, spec: EncodeFlags, args: EncodeArgs, paths: dict[str, str]) -> EncodeResult:
    from clipgraft.search.encode import encode_folder
    from clipgraft.search.folder import sharing

    shared = sharing(clip, list(paths), "text" if args.texts else "vision") if paths else []
    if shared:
        other, own = ("image", "text") if args.texts else ("text", "image")
        acts = "acts" if len(shared) == 1 else "act"
        log.info(
            "%s %s on the %s tower alone: the base's %s vectors are theirs",
            ", ".join(shared),
            acts,
            other,
            own,
        )
    return encode_folder(
        clip,
        spec.source,
        spec.out,
        args,
        data=part(spec, TableArgs),
        adapters=None if spec.adapters is None else list(paths),
        adapter_paths=paths,
    )


def _report(result: EncodeResult, source: str, args: EncodeArgs) -> None:
    what = "texts" if args.texts else "images"
    errors = result.out / "errors.parquet"
    if not result.rows:
        raise DataError(f"{source}: none of its {result.errors:,} {what} can be used; {errors} says why")
    rate = f" ({result.encoded / result.seconds:,.0f}/s)" if result.encoded else ""
    log.info("%s %s encoded in %.1f s%s", f"{result.encoded:,}", what, result.seconds, rate)
    for made in result.sets:
        by = f" by adapter {made.adapter}" if made.adapter else ""
        log.info("%s: %s vectors%s", result.out / made.folder, f"{result.rows:,}", by)
    if result.errors:
        log.info("%s could not be used: %s says why", f"{result.errors:,}", errors)
