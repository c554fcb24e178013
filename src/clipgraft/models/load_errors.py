"""What went wrong while a model was loaded, in one line that says what to do now."""

from __future__ import annotations

import difflib
from collections.abc import Iterable
from pathlib import Path

from clipgraft.errors import ModelError
from clipgraft.models.hub import names_in_chain

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


def checkpoint_failure(path: str | Path, name: str, reason: str) -> ModelError:
    """A local checkpoint that cannot be read, or is of another architecture."""
    return ModelError(f"{path} cannot be read as weights of {name}: {reason}")


def config_failure(path: str | Path, error: Exception) -> ModelError:
    """A JSON model config or a local open_clip folder that open_clip cannot build a model from."""
    return ModelError(
        f"{path} cannot be built as an open_clip model: {one_line(error)}; correct it, or load by name"
    )


def openclip_failure(name: str, pretrained: str, error: Exception, offline: str) -> ModelError:
    """An open_clip tag or `hf-hub:` id that cannot be fetched; `offline` says why the hub cannot be used."""
    what = f"'{name}'" + (f" with pretrained '{pretrained}'" if pretrained else "")
    instead = "download the weights elsewhere and pass the file as `pretrained`"
    if name.startswith("hf-hub:"):
        instead = "pass a local folder"
    return ModelError(f"cannot fetch {what}: {_fetch_reason(error, offline)}, or {instead}")


def hf_failure(path: str, error: Exception, offline: str) -> ModelError:
    """A transformers folder that cannot be read, or a hub id that cannot be fetched."""
    if Path(path).is_dir():
        return ModelError(f"{path} cannot be read as a transformers CLIP folder: {one_line(error)}")
    reason = _fetch_reason(error, offline)
    near = "" if path in KNOWN_HUB_IDS else nearest(path, KNOWN_HUB_IDS)
    return ModelError(f"cannot fetch hf:{path}{near}: {reason}, or pass a local folder")


def _fetch_reason(error: Exception, offline: str) -> str:
    """What stopped a download, and what to do about it."""
    names = names_in_chain(error)
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
