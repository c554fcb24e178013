"""The Hugging Face hub: whether it answers at all, asked once before anything is fetched; what is fetched."""

from __future__ import annotations

import contextlib
import logging
import threading
from collections.abc import Iterable, Iterator

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
            if not self._users:
                if is_offline_mode():
                    reason, ours = "HF_HUB_OFFLINE is set", False
                else:
                    unreachable = _unreachable(constants.ENDPOINT)
                    reason = f"{constants.ENDPOINT} cannot be reached ({unreachable})" if unreachable else ""
                    ours = bool(unreachable)
            else:
                reason, ours = self._reason, True
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


@contextlib.contextmanager
def hub_access(needed: bool) -> Iterator[str]:
    """Yield why the hub cannot be used, "" where it can or is not needed.

    huggingface_hub retries every file of an unreachable hub for half a minute and has no setting for it.
    So it is asked for one sign of life first; without one its own offline mode is on inside the block, in
    which cached files still load and missing ones fail at once.
    """
    if needed:
        with _OFFLINE.entered() as reason:
            yield reason
    else:
        yield ""


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


def names_in_chain(error: BaseException | None) -> set[str]:
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
        if "TransportError" not in names_in_chain(error):
            raise
        return str(error).strip() or type(error).__name__
    return ""
