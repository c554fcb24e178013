"""Fetch a table from an address that fsspec knows, or a data set from the Hugging Face hub, into the cache.

A path that was an address has lost a slash (`s3:/bucket/t.csv`); it is understood all the same.
"""

from __future__ import annotations

import glob
import hashlib
import logging
import re
import shutil
from collections.abc import Sequence
from pathlib import Path
from typing import IO

from clipgraft.data.dataset_folders import known_part, part_of
from clipgraft.errors import DataError
from clipgraft.files import atomic_path, cache_folder
from clipgraft.models.hub import hub_access
from clipgraft.readers import reason

log = logging.getLogger("clipgraft")
_ADDRESS = re.compile(r"([A-Za-z][A-Za-z0-9+.-]+):[/\\]+(.*)", re.DOTALL)
_DATASET = re.compile(r"datasets/(?P<id>[^/@]+/[^/@]+)(?:@(?P<revision>[^/]+))?(?:/(?P<path>.+))?")


def as_address(source: Path) -> str | None:
    """Return the address that a path was made of; None for the path of a file.

    A letter alone before the colon is a Windows drive.
    """
    match = _ADDRESS.fullmatch(str(source))
    return f"{match[1]}://{match[2]}" if match and not source.exists() else None


def fetched(address: str, split: str | None) -> Path:
    """Return a local copy of what an address names: a file, or a folder of a data set on the hub.

    Of a data set on the hub (`hf://datasets/OWNER/NAME`, with `@REVISION`, or `/FILE` behind it) only the
    Parquet files of the parts in `split` are fetched, or all of it where it has none.

    Raises:
        DataError: there is no such thing, or it cannot be read from here.
    """
    protocol, _, rest = address.partition("://")
    if protocol == "hf":
        match = _DATASET.fullmatch(rest.rstrip("/"))
        if match is None:
            raise DataError(f"{address}: is no data set; write hf://datasets/OWNER/NAME")
        return _from_hub(address, match["id"], match["revision"], match["path"], split)
    return _from_filesystem(address)


def _from_hub(address: str, name: str, revision: str | None, path: str | None, split: str | None) -> Path:
    from huggingface_hub import HfApi

    api = HfApi()
    with hub_access(True) as offline:
        try:
            if offline:
                found = api.snapshot_download(
                    name, repo_type="dataset", revision=revision, local_files_only=True
                )
                return _below(Path(found), path)
            files = api.list_repo_files(name, repo_type="dataset", revision=revision)
            wanted = _wanted(files, path, split)
            if not wanted:
                raise DataError(f"{address}: has no such file; it has {', '.join(files[:6])}")
            log.info("fetching %d files of %s from the hub, or the cache", len(wanted), address)
            found = api.snapshot_download(
                name, repo_type="dataset", revision=revision, allow_patterns=list(map(glob.escape, wanted))
            )
        except DataError:
            raise
        except Exception as error:  # not there, gated, no answer: each release has its own errors
            why = f"{offline}, and the cache has no whole copy" if offline else reason(error)
            raise DataError(
                f"{address}: cannot be fetched ({why}); check its name, whether it needs a login "
                "(hf auth login), and the network"
            ) from error
    return _below(Path(found), path)


def _below(folder: Path, path: str | None) -> Path:
    if path is None:
        return folder
    if ".." in path.split("/"):
        raise DataError(f"{path}: leads out of the data set; name a file in it")
    return folder / path


def _wanted(files: Sequence[str], path: str | None, split: str | None) -> list[str]:
    """The files of a data set to fetch."""
    if path is not None:
        return [file for file in files if file == path or file.startswith(f"{path}/")]
    tables = [file for file in files if file.lower().endswith(".parquet")]
    if not tables:
        return list(files)
    parts = None if split is None else {known_part(part.strip()) for part in split.split(",")}
    chosen = [file for file in tables if parts is None or part_of(file) in parts]
    return chosen or tables  # whoever opens them says which parts there are


def _from_filesystem(address: str) -> Path:
    import fsspec

    try:
        files, path = fsspec.core.url_to_fs(address)
        if files.isdir(path):
            raise DataError(f"{address}: is a folder; name a table in it, or copy the folder here")
        key = hashlib.sha256(f"{address} {files.ukey(path)}".encode()).hexdigest()[:32]
        target: Path = cache_folder() / "tables" / key / path.rstrip("/").rpartition("/")[2]
        if not target.is_file():
            with files.open(path, "rb") as source:
                _copy(source, target)
            log.info("%s: fetched %.1f MB into %s", address, target.stat().st_size / 1e6, target.parent)
    except DataError:
        raise
    # Every file system has errors of its own: of the network, of credentials, of packages that it lacks.
    except Exception as error:
        raise DataError(
            f"{address}: cannot be read ({reason(error)}); check the address, the network and credentials"
        ) from error
    return target


def _copy(source: IO[bytes], target: Path) -> None:
    with atomic_path(target) as temporary, temporary.open("wb") as file:
        shutil.copyfileobj(source, file)


def refuse_loose_images(address: str) -> DataError:
    """Make an error for a table at an address whose images are files of their own."""
    return DataError(
        f"{address}: its images are not fetched with the table; copy them here, and give their folder as "
        "`image_root`"
    )
