"""Adapters on the Hugging Face hub: whether a repository holds one, and its files in the local cache."""

from __future__ import annotations

import re
from pathlib import Path

from clipgraft.adapters.folder import FILES
from clipgraft.adapters.peft import CONFIG_FILE
from clipgraft.errors import AdapterError
from clipgraft.models.hub import hub_access, tell_fetch

HUB = "hf:"
_REPOSITORY = re.compile(r"[\w.-]+/[\w.-]+")


def is_repository(name: str) -> bool:
    """Whether a name is written like OWNER/NAME."""
    return _REPOSITORY.fullmatch(name) is not None


def find_adapter(repository: str) -> Path | None:
    """Return the folder of an adapter on the hub, fetched if need be; None where there is none.

    Raises AdapterError where there is one that cannot be fetched.
    """
    from huggingface_hub import hf_hub_download, try_to_load_from_cache

    if isinstance(try_to_load_from_cache(repository, "config.json"), str):
        return None  # a whole model, that was loaded before
    with hub_access(True):
        try:
            hf_hub_download(repository, CONFIG_FILE)
        except Exception:  # not there, gated, or no answer: whoever loads it as a model says so
            return None
    return fetch_adapter(repository)


def fetch_adapter(repository: str) -> Path:
    """Return the folder of a hub's repository in the local cache, with the files of an adapter alone.

    Raises AdapterError where it cannot be fetched and is not in the cache.
    """
    from huggingface_hub import snapshot_download

    with hub_access(True) as offline:
        tell_fetch(repository, FILES)
        try:
            return Path(snapshot_download(repository, allow_patterns=["*.json", *FILES]))
        except Exception as error:  # each release of huggingface_hub has its own errors
            told = " ".join(str(error).split())[:200] or type(error).__name__
            reason = f"{offline}, and it is not in the local cache" if offline else told
            raise AdapterError(f"adapter {HUB}{repository} cannot be fetched: {reason}") from error
