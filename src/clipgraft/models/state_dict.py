"""Weights from a file to a model, whatever the file calls them.

Wrappers leave prefixes (`module.`, `_orig_mod.`, Lightning's `model.`), and the same model has other names in
open_clip, in open_clip's split form (`text.`) and in transformers. The names that fit best are taken, all of
the model's weights must be among them, and what else the file holds is refused or said.
"""

from __future__ import annotations

import re
from collections import Counter
from collections.abc import Iterable, Mapping
from dataclasses import dataclass

import torch
from torch import Tensor, nn

from clipgraft.errors import ModelError
from clipgraft.models.clip import Clip, family_of
from clipgraft.models.convert import config_of_shape, shape_of
from clipgraft.models.family import is_lora
from clipgraft.models.library_calls import no_initialization
from clipgraft.models.mapped_weights import Adopted
from clipgraft.models.weights_file import WeightsFile

Layout = Mapping[str, Tensor]
_WRAPPERS = {"module", "_orig_mod", "_fsdp_wrapped_module", "_checkpoint_wrapped_module"}
# Numbers of OpenAI's archives and tables that a model computes itself.
_INERT = re.compile(r"(.*\.)?(input_resolution|context_length|vocab_size|n_averaged|attn_mask|position_ids)")
_AVERAGE = re.compile(r"ema|averag|swa|teacher|target|momentum", re.IGNORECASE)
_SPLIT = ("text_projection", "positional_embedding", "token_embedding", "transformer.", "ln_final.")
_TEXT_TABLE = (
    "positional_embedding",
    "text.positional_embedding",
    "text_model.embeddings.position_embedding.weight",
)
_VISION_TABLE = ("visual.positional_embedding", "vision_model.embeddings.position_embedding.weight")
_DEEPEST = 32


class MisfitError(ValueError):
    """Weights that are of another model; the message says which and what to do."""


@dataclass(frozen=True)
class _Found:
    """Weights of the file under one layout's names, and what the file calls the rest."""

    layout: Layout
    prefix: str
    state: dict[str, Tensor]
    others: list[str]

    @property
    def covered(self) -> int:
        return len(self.layout.keys() & self.state.keys())


@torch.no_grad()
def load_weights(model: nn.Module, file: WeightsFile) -> list[str]:
    """Give a model of either family the weights of a file: mapped where that is safe, else copied.

    Returns:
        What was chosen, left out or changed on the way, each as one line for the user.

    Raises:
        MisfitError: weights are missing, left over, or of other shapes.
    """
    state = _unwrapped(file.state)
    own = dict(model.state_dict(keep_vars=True))
    adopted = Adopted(file.opened, own.values())
    found = max((_named(state, layout) for layout in _layouts(model, own)), key=lambda found: found.covered)
    twin = None
    if found.covered < len(found.layout) and (twin := _openclip_twin(model)) is not None:
        found = max(
            found, _named(state, dict(twin.state_dict())), key=lambda found: found.covered / len(found.layout)
        )
    notes = [*file.notes, *_others(found)]
    _check_names(found, model)
    for name, target in found.layout.items():
        value = found.state.get(name)
        if value is None or not adopted.take(target, value):
            _put(model, name, target, value, notes)
    adopted.keep(model)
    if twin is not None and found.layout.keys() != own.keys():
        given = dict(family_of(twin).canonical_weights(twin))
        for name, target in family_of(model).canonical_weights(model):
            target.copy_(given[name].reshape(target.shape))
        notes.append("its names are open_clip's: they were translated")
    elif found.layout.keys() != own.keys() and any(name.startswith("vision_model.") for name in found.layout):
        notes.append("its names are transformers': they were translated")
    return notes


def _layouts(model: nn.Module, own: Layout) -> list[Layout]:
    """The names that this very model's weights have in different libraries, its own first."""
    if any(name.startswith("text.") for name in own):
        other = {name.removeprefix("text."): tensor for name, tensor in own.items()}
    else:
        other = {f"text.{n}" if n.startswith(_SPLIT) else n: tensor for n, tensor in own.items()}
    layouts: list[Layout] = [own]
    if family_of(model).name == "open_clip":
        layouts += [other, dict(family_of(model).canonical_weights(model))]
    return layouts


def _openclip_twin(model: nn.Module) -> nn.Module | None:
    """An open_clip model of the same shape as a plain transformers one; None for others."""
    if family_of(model).name != "transformers":
        return None
    import open_clip

    try:
        config = config_of_shape(shape_of(Clip(model, family_of(model))))
        with no_initialization():
            twin: nn.Module = open_clip.CLIP(**config)
    except ModelError:
        return None
    return twin


def _unwrapped(state: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """Names without the marks of wrappers, which torch puts anywhere in them."""
    bare: dict[str, Tensor] = {}
    for name, tensor in state.items():
        short = ".".join(part for part in name.split(".") if part not in _WRAPPERS)
        if short in bare:
            raise MisfitError(
                f"it holds {_brief(short)} twice, wrapped and bare: save one state_dict() alone"
            )
        bare[short] = tensor
    return bare


def _named(state: Mapping[str, Tensor], layout: Layout) -> _Found:
    """The weights below the prefix under which most of a layout's names are found."""
    counts: Counter[str] = Counter()
    for name in state:
        parts = name.split(".")[:_DEEPEST]
        for start in range(len(parts)):
            if ".".join(parts[start:]) in layout:
                counts[".".join((*parts[:start], ""))] += 1
    if not counts:
        return _Found(layout, "", dict(state), [])
    most = max(counts.values())
    best = [prefix for prefix, count in counts.items() if count == most]
    prefix = min(best, key=lambda prefix: (bool(_AVERAGE.search(prefix)), len(prefix)))
    copies = tuple(other for other, count in counts.items() if other != prefix and count == most)
    inside = {n.removeprefix(prefix): t for n, t in state.items() if n.startswith(prefix)}
    aside = [n for n in inside if copies and f"{prefix}{n}".startswith(copies) and n not in layout]
    outside = [n for n in state if not n.startswith(prefix)]
    return _Found(layout, prefix, {n: t for n, t in inside.items() if n not in aside}, [*outside, *aside])


def _others(found: _Found) -> list[str]:
    """What the file holds besides this model."""
    others = [name for name in found.others if not _INERT.fullmatch(name)]
    notes = []
    if found.prefix:
        notes.append(f"took the {found.covered} weights under '{_brief(found.prefix)}'")
    if others:
        notes.append(f"left out {len(others)} weights of something else: {_some(others)}")
    return notes


def _check_names(found: _Found, model: nn.Module) -> None:
    lora = [name for name in found.state if is_lora(name) or "lora_" in name]
    if lora or any(".base_layer." in name for name in found.state):
        raise MisfitError(
            f"it holds LoRA beside the base ({_some(lora or found.state)}): load it as an adapter, or merge "
            "it in the program that made it (PEFT: merge_and_unload()) and save that"
        )
    missing = [n for n in found.layout if n not in found.state and n.rpartition(".")[2] != "logit_bias"]
    surplus = [n for n in found.state if n not in found.layout and not _INERT.fullmatch(n)]
    if len(missing) == len(found.layout) or not found.covered:
        kind = type(model).__name__
        raise MisfitError(f"it holds no weight of a {kind}, but {_some(found.state) or 'nothing'}")
    if missing:
        extra = f", and holds {_some(surplus)} besides" if surplus else ""
        raise MisfitError(f"it lacks {len(missing)} of the model's weights, such as {_some(missing)}{extra}")
    if surplus:
        raise MisfitError(f"it holds {len(surplus)} weights that the model has not, {_some(surplus)}")


def _put(model: nn.Module, name: str, target: Tensor, value: Tensor | None, notes: list[str]) -> None:
    if value is None:
        target.zero_()
        notes.append(f"it has no {name}: zero is taken")
        return
    if target.is_floating_point() and not value.is_floating_point():
        raise MisfitError(f"{name} is of type {value.dtype}, no weight")
    # Libraries keep temperatures as numbers and as vectors of one.
    if value.shape != target.shape and not value.numel() == target.numel() == 1:
        value = _resized(model, name, target, value, notes)
    target.copy_(value.reshape(target.shape))


def _resized(model: nn.Module, name: str, target: Tensor, value: Tensor, notes: list[str]) -> Tensor:
    """The image positions of another resolution, interpolated as open_clip does it; else a MisfitError."""
    same_width = value.ndim == target.ndim == 2 and value.shape[1] == target.shape[1]
    if name in _TEXT_TABLE and same_width:
        raise MisfitError(
            f"its text tower has {value.shape[0]} positions and this model {target.shape[0]}: stretching "
            "them would change the features of every caption, so it is not done; set context_length to "
            f"{value.shape[0]}, or name the model that the file is of"
        )
    if name in _VISION_TABLE and same_width and family_of(model).name == "open_clip":
        from open_clip.model import resize_pos_embed

        patches = value.shape[0] - 1
        side = round(max(patches, 0) ** 0.5)
        if side and side * side == patches <= 1 << 20:
            key = "visual.positional_embedding"
            table = {key: value.float()}
            resize_pos_embed(table, model)
            rows, columns = model.visual.grid_size  # type: ignore[union-attr, misc]
            notes.append(
                f"its position table is of {side}×{side} patches and this model's of {rows}×{columns}: it "
                "was interpolated, and features are not those of the file's own model; if another image size "
                "was meant, name that model"
            )
            return table[key]
    raise MisfitError(f"{name} is {tuple(value.shape)}, but the model's {tuple(target.shape)}")


def _some(names: Iterable[str], most: int = 4) -> str:
    listed = list(names)
    shown = ", ".join(_brief(name) for name in listed[:most])
    return shown + (f" and {len(listed) - most} more" if len(listed) > most else "")


def _brief(name: str) -> str:
    return name if len(name) <= 80 else f"{name[:79]}…"
