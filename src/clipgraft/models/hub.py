"""The Hugging Face hub: whether it answers at all, asked once before anything is fetched; what is fetched."""

from __future__ import annotations

import contextlib
from collections.abc import Iterable, Iterator

from clipgraft.models.library_calls import say
from clipgraft.models.load_errors import names_in_chain


@contextlib.contextmanager
def hub_access(needed: bool) -> Iterator[str]:
    """Yields why the hub cannot be used, "" where it can or is not needed.

    huggingface_hub retries every file of an unreachable hub for half a minute and has no setting for it.
    So it is asked for one sign of life first; without one its own offline mode is on inside the block, in
    which cached files still load and missing ones fail at once.
    """
    from huggingface_hub import constants, is_offline_mode

    if not needed:
        yield ""
    elif is_offline_mode():
        yield "HF_HUB_OFFLINE is set"
    elif reason := _unreachable(constants.ENDPOINT):
        constants.HF_HUB_OFFLINE = True
        try:
            yield f"{constants.ENDPOINT} cannot be reached ({reason})"
        finally:
            constants.HF_HUB_OFFLINE = False
    else:
        yield ""


def tell_fetch(repository: str, names: Iterable[str]) -> None:
    """Say how large the first of these files that the hub has is, before it is fetched, unless it is here.

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
        say(f"fetching {repository} from the hub ({name}{about})")
        return


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
