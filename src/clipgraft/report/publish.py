"""Publish an adapter on the Hugging Face hub, with a card that its run writes."""

from __future__ import annotations

import json
import shutil
import tempfile
from dataclasses import dataclass
from pathlib import Path, PurePath
from typing import Any

from clipgraft.adapters.folder import NATIVE_FILE, WEIGHTS_FILE, is_adapter, read_adapter
from clipgraft.adapters.hub import is_repository
from clipgraft.adapters.peft import CONFIG_FILE
from clipgraft.adapters.run_folder import find_run_model, is_run
from clipgraft.errors import AdapterError, ConfigError, HubError
from clipgraft.models.hub import hub_access
from clipgraft.report.args import PushArgs
from clipgraft.report.card import Published, base_on_hub, make_card
from clipgraft.report.runs import Run, read_run
from clipgraft.results import Result

_CARD = "README.md"
_PUBLISHED = (WEIGHTS_FILE, CONFIG_FILE, NATIVE_FILE, _CARD)


@dataclass(frozen=True, repr=False)
class Pushed(Result):
    """What was published.

    Attributes:
        url: of the repository.
        files: names that were uploaded.
        bytes: of them together.
        notes: what whoever published it should know.
    """

    url: str
    files: tuple[str, ...]
    bytes: int
    notes: tuple[str, ...] = ()


def push(source: str | Path, repository: str, args: PushArgs | None = None, **options: Any) -> Pushed:
    """Upload an adapter and its card to a repository of the hub, which is made if need be.

    Paths of this machine that the adapter's records hold are cut to their last part. Who one is on the hub,
    and which hub that is, are huggingface_hub's settings (`hf auth login`, `HF_TOKEN`, `HF_ENDPOINT`).

    Args:
        source: the folder of a run that trained an adapter, or of an adapter.
        repository: OWNER/NAME.
        args: how it is published.
        **options: single fields of `PushArgs` in place of those of `args`.

    Raises:
        AdapterError: there is no adapter.
        ConfigError: the repository's name cannot be one, or it holds other things.
        HubError: the hub refuses, or cannot be reached; nothing is half there.
    """
    args = (args or PushArgs()).replace(**options)
    with tempfile.TemporaryDirectory() as folder:
        staged = Path(folder)
        notes = stage(source, repository, args, staged)
        url = _upload(staged, repository, args)
        sizes = {path.name: path.stat().st_size for path in sorted(staged.iterdir())}
    return Pushed(url, tuple(sizes), sum(sizes.values()), notes)


def stage(source: str | Path, repository: str, args: PushArgs, folder: Path) -> tuple[str, ...]:
    """Write into an empty folder what `push` would upload; returns what its user should know.

    Raises AdapterError and ConfigError as `push` does.
    """
    if not is_repository(repository):
        raise ConfigError(f"repository {repository!r}: write OWNER/NAME, as at the hub")
    place, run = _adapter_of(Path(source))
    adapter = read_adapter(place)
    shutil.copyfile(place / WEIGHTS_FILE, folder / WEIGHTS_FILE)
    hub, cut = base_on_hub(adapter.base), False
    for name in (CONFIG_FILE, NATIVE_FILE):
        record = json.loads((place / name).read_text(encoding="utf-8"))
        if name == CONFIG_FILE and hub is not None:
            record["base_model_name_or_path"] = hub
        plain = _without_folders(record)
        cut |= plain != record
        (folder / name).write_text(json.dumps(plain, indent=2) + "\n", encoding="utf-8")
    size = sum(path.stat().st_size for path in folder.iterdir())
    full = None if args.full_run is None else _full_run(args.full_run)
    what = Published(repository, adapter, run, full, args.license, size)
    (folder / _CARD).write_text(make_card(what), encoding="utf-8")
    return tuple(_notes(what, hub, cut))


def _adapter_of(source: Path) -> tuple[Path, Run | None]:
    """Return the adapter folder that a path names, and the run that made it."""
    found = find_run_model(source) if is_run(source) or not is_adapter(source) else None
    if found is None:
        if not is_adapter(source):
            what = "holds no adapter and is no run" if source.exists() else "is not there"
            raise AdapterError(f"{source}: {what}; give the folder of a run, or of an adapter")
        place, run = source, None
    elif found.kind != "adapter":
        raise AdapterError(
            f"{source} made a {found.kind} model, no adapter; write it with `clipgraft merge` and upload "
            "that with `hf upload`"
        )
    else:
        place, run = found.saved, read_run(found.run)
    missing = [name for name in (WEIGHTS_FILE, CONFIG_FILE, NATIVE_FILE) if not (place / name).is_file()]
    if missing:
        raise AdapterError(
            f"{place} is no adapter that clipgraft wrote ({', '.join(missing)} missing): convert it first, "
            "`clipgraft convert IN OUT`"
        )
    return place, run


def _full_run(path: Path) -> Run:
    place = path / "run" if is_run(path / "run") else path  # of a sweep's cell
    run = read_run(place) if is_run(place) else None
    if run is None or run.kind != "full" or not run.metrics:
        raise ConfigError(f"`full_run` {path}: is no run that fine-tuned all weights and measured them")
    return run


def _without_folders(value: Any) -> Any:
    """Cut every absolute path in a record to its last part, behind a prefix such as `hf:` too."""
    if isinstance(value, dict):
        return {key: _without_folders(inner) for key, inner in value.items()}
    if isinstance(value, list):
        return [_without_folders(inner) for inner in value]
    if not isinstance(value, str):
        return value
    prefix = next((p for p in ("hf:", "hf-hub:") if value.startswith(p)), "")
    path = PurePath(value.removeprefix(prefix))
    return f"{prefix}{path.name}" if path.is_absolute() else value


def _notes(what: Published, hub: str | None, cut: bool) -> list[str]:
    notes = []
    if cut:
        notes.append("paths of this machine were cut to their last part")
    if hub is None and what.adapter.base.get("name") != "emoji":
        notes.append(
            "its base is not on the hub: whoever loads the adapter must bring that, as the card says"
        )
    if what.license is None:
        notes.append("the card names no licence: without one nobody may use the adapter; add `license`")
    if what.run is not None and not what.run.metrics:
        notes.append("the card has no numbers: the run had no validation data")
    return notes


def _upload(folder: Path, repository: str, args: PushArgs) -> str:
    from huggingface_hub import HfApi

    api = HfApi()
    with hub_access(True) as offline:
        if offline:
            raise HubError(f"{repository} cannot be pushed: {offline}; try again when the hub can be reached")
        try:
            url = api.create_repo(repository, private=args.private or None, exist_ok=True)
            there = {item.rfilename for item in api.model_info(repository).siblings or ()}
            _refuse_other(repository, there, args.overwrite)
            api.upload_folder(
                repo_id=repository, folder_path=folder, commit_message="An adapter, by clipgraft"
            )
        except ConfigError:
            raise
        except Exception as error:  # each release of huggingface_hub has its own errors
            raise HubError(f"{repository} cannot be pushed: {_reason(error)}") from error
    return str(url)


def _refuse_other(repository: str, there: set[str], overwrite: bool) -> None:
    others = sorted(there - {".gitattributes"})
    if others and NATIVE_FILE not in there and not overwrite:
        raise ConfigError(
            f"{repository} holds {', '.join(others[:3])}, and no adapter of clipgraft: choose another name, "
            "or replace it with `overwrite=True`"
        )


def _reason(error: Exception) -> str:
    status = getattr(getattr(error, "response", None), "status_code", None)
    told = " ".join(str(error).split())[:200] or type(error).__name__
    if status in (401, 403):
        return (
            f"the hub does not let you ({status}): log in with `hf auth login`, with a token that may write"
        )
    return told
