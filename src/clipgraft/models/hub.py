"""Fetch from the Hugging Face hub, and say in one line why a model could not be fetched or read."""

from __future__ import annotations

import contextlib
import difflib
import logging
import threading
from collections.abc import Iterable, Iterator

from clipgraft.errors import ModelError
from clipgraft.files import folder_exists

log = logging.getLogger("clipgraft")


class _OfflineMode:
    """huggingface_hub's offline mode, on while any thread is loading from a hub that does not answer.

    The mode is a constant of the process, and open_clip's functions have no argument for one call. So a lock
    guards it: the first thread turns it on, the last one puts it back, and whoever comes between takes the
    first one's finding instead of asking the hub again.
    """

    def __init__(self) -> None:
        self._lock = threading.Lock()
        self._users = 0
        self._reason = ""

    @contextlib.contextmanager
    def entered(self) -> Iterator[str]:
        """Yield why the hub cannot be used; "" where it can."""
        from huggingface_hub import constants, is_offline_mode

        with self._lock:
            ours = bool(self._users)
            reason = self._reason
            if not ours and is_offline_mode():
                reason = "HF_HUB_OFFLINE is set"
            elif not ours:
                unreachable = _unreachable(constants.ENDPOINT)
                reason = f"{constants.ENDPOINT} cannot be reached ({unreachable})" if unreachable else ""
                ours = bool(unreachable)
            if ours:
                self._users += 1
                self._reason = reason
                constants.HF_HUB_OFFLINE = True
        try:
            yield reason
        finally:
            if ours:
                with self._lock:
                    self._users -= 1
                    if not self._users:
                        constants.HF_HUB_OFFLINE = False


_OFFLINE = _OfflineMode()


def hub_access(needed: bool) -> contextlib.AbstractContextManager[str]:
    """Yield why the hub cannot be used, "" where it can or is not needed.

    huggingface_hub retries every file of an unreachable hub for half a minute and has no setting for it.
    So it is asked for one sign of life first; without one its own offline mode is on inside the block, in
    which cached files still load and missing ones fail at once.
    """
    return _OFFLINE.entered() if needed else contextlib.nullcontext("")


def tell_fetch(repository: str, names: Iterable[str]) -> None:
    """Log how large the first of these files that the hub has is, unless it is in the local cache.

    What is wrong with the repository is said by whoever fetches from it.
    """
    from huggingface_hub import get_hf_file_metadata, hf_hub_url, is_offline_mode, try_to_load_from_cache

    for name in names:
        if is_offline_mode() or isinstance(try_to_load_from_cache(repository, name), str):
            return
        try:
            size = get_hf_file_metadata(hf_hub_url(repository, name)).size
        except Exception:  # not there, gated, or no answer: each release has its own errors
            continue
        about = f", about {size / 1e6:,.1f} MB" if size else ""
        log.info("fetching %s from the hub (%s%s)", repository, name, about)
        return


def _names_in_chain(error: BaseException | None) -> set[str]:
    """Class names of an error, its bases and everything it was raised from."""
    names: set[str] = set()
    while error is not None:
        names.update(kind.__name__ for kind in type(error).__mro__)
        error = error.__cause__ or error.__context__
    return names


def _unreachable(endpoint: str) -> str:
    """Why nothing answers at a URL, or "". Any answer will do, whatever its status."""
    from huggingface_hub import constants
    from huggingface_hub.utils import get_session

    try:
        get_session().head(endpoint, timeout=constants.HF_HUB_ETAG_TIMEOUT)
    except Exception as error:
        # The HTTP library differs between releases of huggingface_hub; the name of its base error does not.
        if "TransportError" not in _names_in_chain(error):
            raise
        return str(error).strip() or type(error).__name__
    return ""


KNOWN_HUB_IDS = (
    "openai/clip-vit-base-patch32",
    "openai/clip-vit-base-patch16",
    "openai/clip-vit-large-patch14",
    "openai/clip-vit-large-patch14-336",
    "laion/CLIP-ViT-B-32-laion2B-s34B-b79K",
    "laion/CLIP-ViT-B-16-laion2B-s34B-b88K",
    "laion/CLIP-ViT-L-14-laion2B-s32B-b82K",
    "laion/CLIP-ViT-H-14-laion2B-s32B-b79K",
)


def hf_failure(path: str, error: Exception, offline: str) -> ModelError:
    """A transformers folder that cannot be read, or a hub id that cannot be fetched."""
    if folder_exists(path):
        return ModelError(f"{path} cannot be read as a transformers CLIP folder: {one_line(error)}")
    reason = fetch_reason(error, offline)
    near = "" if path in KNOWN_HUB_IDS else nearest(path, KNOWN_HUB_IDS)
    return ModelError(f"cannot fetch hf:{path}{near}: {reason}, or pass a local folder")


def fetch_reason(error: Exception, offline: str) -> str:
    """What stopped a download, and what to do about it; `offline` says why the hub cannot be used."""
    names = _names_in_chain(error)
    if offline:
        return f"{offline} and it is not in the local cache; check the network connection"
    if "GatedRepoError" in names:
        return "it is gated; accept its terms on the hub and log in with `hf auth login`"
    if names & {"RepositoryNotFoundError", "HFValidationError"}:
        return "the hub has no such model that you may read; check the spelling, log in if it is private"
    return f"{one_line(error)}; check the network connection"


def one_line(error: BaseException, most: int = 200) -> str:
    """The message of an error as one line of at most `most` characters."""
    text = " ".join(str(error).split()) or type(error).__name__
    return (text if len(text) <= most else f"{text[: most - 1].rstrip()}…").rstrip(".:;")


def nearest(given: str, known: Iterable[str]) -> str:
    """` (did you mean a or b?)` for the nearest known names, or nothing."""
    by_lower = {name.lower(): name for name in known}
    close = difflib.get_close_matches(given.lower(), by_lower, n=3, cutoff=0.6)
    return f" (did you mean {' or '.join(by_lower[name] for name in close)}?)" if close else ""
