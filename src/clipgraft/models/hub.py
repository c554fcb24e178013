"""The Hugging Face hub: whether it answers at all, asked once before anything is fetched."""

from __future__ import annotations

import contextlib
from collections.abc import Iterator

from clipgraft.models.failures import names_in_chain


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
