"""Sets of vectors that a base with adapters makes: one for each different tower.

An adapter that leaves the tower alone leaves its vectors as they are: all such adapters share the base's.
"""

from __future__ import annotations

import contextlib
import hashlib
from collections.abc import Iterator, Mapping, Sequence

from torch import Tensor, nn

from clipgraft.errors import AdapterError
from clipgraft.lora.control import disable_lora, set_adapter
from clipgraft.lora.state import Adapter, lora_state, require_lora, require_unmerged
from clipgraft.models.clip import Clip
from clipgraft.models.sites import Tower
from clipgraft.search.manifest import AdapterNote, VectorSet, is_set_folder

TOWERS: tuple[Tower, ...] = ("text", "vision")
BASE_FOLDER = "base"


def adapter_digest(adapter: Adapter | None, tower: Tower) -> str | None:
    """Return 16 hex digits that identify an adapter's effect on a tower; None if it has none."""
    if adapter is None or not adapter.touches(tower):
        return None
    parts: dict[str, tuple[float, nn.Module]] = {
        str(site): (layer.scaling, layer) for site, layer in adapter.layers.items() if site.tower == tower
    }
    for path, norm in adapter.norms.items():
        if path.startswith(f"{tower}_model."):
            parts[path] = (1.0, norm)
    digest = hashlib.sha256()
    for name, (scaling, module) in sorted(parts.items()):
        for part, tensor in sorted(module.state_dict().items()):
            digest.update(f"{name}.{part} {scaling!r} {tuple(tensor.shape)}\n".encode())
            digest.update(_bytes(tensor))
    return digest.hexdigest()[:16]


def acting_digest(clip: Clip, tower: Tower) -> str | None:
    """Return `adapter_digest` of the active adapter; raises AdapterError while adapters are merged."""
    require_unmerged(clip, "tell whose vectors these are")
    state = lora_state(clip)
    return adapter_digest(None if state is None else state.in_effect, tower)


def vector_sets(clip: Clip, adapters: Sequence[str] | None, tower: Tower) -> tuple[VectorSet, ...]:
    """List the sets of vectors to make: one at the root for the active adapter, or one per named adapter.

    Raises:
        AdapterError: the model carries no such adapter, or one is called like the folder of the base.
    """
    require_unmerged(clip, "encode with adapters")
    if adapters is None:
        state = lora_state(clip)
        digest = acting_digest(clip, tower)
        return (VectorSet("", state.active if state and digest else None, digest),)
    state = require_lora(clip)
    found: dict[str | None, VectorSet] = {}
    for name in adapters:
        if name == BASE_FOLDER or not is_set_folder(name):
            raise AdapterError(
                f"adapter {name!r} would be taken for another folder: load it under another name"
            )
        digest = adapter_digest(state.named(name), tower)
        folder, adapter = (BASE_FOLDER, None) if digest is None else (name, name)
        found.setdefault(digest, VectorSet(folder, adapter, digest))
    return tuple(found.values())


def sharing(clip: Clip, names: Sequence[str], tower: Tower) -> list[str]:
    """Return the names of adapters that leave a tower unchanged."""
    state = require_lora(clip)
    return [name for name in names if adapter_digest(state.named(name), tower) is None]


def adapter_notes(clip: Clip, names: Sequence[str], paths: Mapping[str, str]) -> tuple[AdapterNote, ...]:
    """Describe adapters for the manifest, those that share vectors included."""
    notes = []
    for name in names:
        adapter = require_lora(clip).named(name)
        digests: dict[str, str] = {
            tower: found for tower in TOWERS if (found := adapter_digest(adapter, tower))
        }
        notes.append(AdapterNote(name, paths.get(name, ""), digests))
    return tuple(notes)


@contextlib.contextmanager
def adapters_as_they_were(clip: Clip) -> Iterator[None]:
    """Restore the active adapter at the end."""
    state = lora_state(clip)
    before = (state.active, state.enabled) if state else None
    try:
        yield
    finally:
        if before is not None:
            set_adapter(clip, before[0])
            if not before[1]:
                disable_lora(clip)


def _bytes(tensor: Tensor) -> memoryview:
    return memoryview(tensor.detach().float().cpu().contiguous().numpy()).cast("B")
