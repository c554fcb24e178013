"""Name what features depend on besides the image: the tower's weights, structure and preprocessing."""

from __future__ import annotations

import hashlib
import types
from collections.abc import Iterator, Mapping
from enum import Enum
from functools import partial
from pathlib import PurePath
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn

from clipgraft.data.feature_cache import FeatureKey
from clipgraft.data.loading import Transform
from clipgraft.data.stored_rows import FEATURES, RowKind
from clipgraft.lora.layers import AdapterSlot, BiasLayer, LoraLayer
from clipgraft.lora.parameters import AdaptedProjection
from clipgraft.lora.rows import RowSlots
from clipgraft.lora.state import lora_state
from clipgraft.models.clip import Clip
from clipgraft.models.lone_tower import lone_tower
from clipgraft.models.processors import OWN_TOWERS

_DIGITS = 32
_SCALARS = (bool, int, float, str, bytes, complex, type(None))
_MODULE_STATE = frozenset(vars(nn.Module()))
# Both families, and the canonical names of weights, name the image tower's parts so.
_IMAGE_TOWER = ("visual", "vision_model", "visual_projection")
_OWN_IMAGE_TOWER = ("vision_tower", "vision_projection")
_LIBRARIES = ("torch", "transformers", "timm", "open_clip", "clipgraft")


class UnknownError(Exception):
    """A transform cannot be described; the message says because of what."""


def image_key(
    clip: Clip, transform: Transform, kind: RowKind = FEATURES, *, autocast: bool = False
) -> FeatureKey:
    """Return the key of rows that the image tower's base weights make; adapters do not count.

    Raises UnknownError for a transform that holds a function or object of no fixed meaning.
    """
    return FeatureKey(
        tower=tower_fingerprint(clip),
        preprocessing=describe(transform),
        stored=kind.stored,
        precision=f"{str(clip.dtype).removeprefix('torch.')}{' in bf16 autocast' if autocast else ''}",
        dtype=str(kind.dtype).removeprefix("torch."),
    )


def vision_lora_is_active(clip: Clip) -> bool:
    """Tell whether an active adapter changes image features."""
    state = lora_state(clip)
    return state is not None and state.in_effect is not None and state.in_effect.touches("vision")


def tower_fingerprint(clip: Clip) -> str:
    """Hash every bit of the image tower's base weights, and how they are used, to 32 hex digits.

    `Clip.fingerprint` would tell too little and too much: it rounds to bfloat16, does not know a GELU from a
    QuickGELU, and changes when the text tower is tuned. Takes a fifth of a second for ViT-B-32.
    """
    digest = hashlib.sha256()
    weights = dict(clip.family.canonical_weights(clip.model))
    alone, own = lone_tower(clip.model) == "vision", clip.family.name == OWN_TOWERS
    prefixes = ("",) if alone else _OWN_IMAGE_TOWER if own else _IMAGE_TOWER
    for name in sorted(name for name in weights if name.startswith(prefixes)):
        digest.update(f"{name} {_tensor(weights[name])}\n".encode())
    lines = [*_structure(clip.model, prefixes), *(_code_of_towers(clip.model) if own else ())]
    for line in sorted(lines):
        digest.update(f"{line}\n".encode())
    return digest.hexdigest()[:_DIGITS]


def _code_of_towers(model: nn.Module) -> Iterator[str]:
    """What the user's own classes compute, which no library's version tells."""
    parts = [model, *(part for name, part in model.named_modules() if name.startswith(_OWN_IMAGE_TOWER))]
    for kind in {type(part) for part in parts}:
        if kind.__module__.partition(".")[0] not in _LIBRARIES:
            yield _name(kind)


def _structure(model: nn.Module, prefixes: tuple[str, ...]) -> Iterator[str]:
    """List settings that no weight shows: the number of heads, the activation, epsilons, pooling."""
    for path, module in model.named_modules():
        if not path.startswith(prefixes) or "parametrizations" in path:
            continue
        if isinstance(module, LoraLayer | BiasLayer | AdapterSlot | RowSlots | AdaptedProjection):
            continue
        leaf = all(isinstance(child, AdapterSlot | RowSlots) for child in module.children())
        # Only a leaf's class is told: a parametrised module has a class of its own.
        settings = {name: value for name, value in vars(module).items() if _is_setting(name, value)}
        yield f"{path} {type(module).__name__ if leaf else ''} {sorted(settings.items())}"


def _is_setting(name: str, value: object) -> bool:
    if name.startswith("_") or name == "training" or "checkpointing" in name:
        return False
    return isinstance(value, _SCALARS) or (
        isinstance(value, tuple) and all(isinstance(part, _SCALARS) for part in value)
    )


def describe(value: Any) -> str:
    """Describe a transform, or anything in it, as text that is equal only for what computes the same.

    Raises UnknownError for lambdas, local functions, what a script itself defines, and objects without
    readable state.
    """
    try:
        return _describe(value)
    except RecursionError:
        raise UnknownError(f"a {type(value).__name__} that refers to itself") from None


def _describe(value: Any) -> str:
    if isinstance(value, Enum):
        return f"{_name(type(value))}.{value.name}"
    if isinstance(value, _SCALARS):
        return repr(value)
    if isinstance(value, PurePath | torch.dtype | torch.device):
        return f"{type(value).__name__}({value})"
    if isinstance(value, Tensor):
        return _tensor(value)
    if isinstance(value, np.ndarray):
        return _tensor(torch.from_numpy(np.ascontiguousarray(value)))
    if isinstance(value, type):
        return _name(value)
    if isinstance(value, list | tuple):
        return f"{type(value).__name__}[{', '.join(map(_describe, value))}]"
    if isinstance(value, set | frozenset):
        return f"set[{', '.join(sorted(map(_describe, value)))}]"
    if isinstance(value, Mapping):
        items = sorted(f"{_describe(name)}: {_describe(part)}" for name, part in value.items())
        return f"{type(value).__name__}{{{', '.join(items)}}}"
    return _describe_callable(value)


def _describe_callable(value: Any) -> str:
    if isinstance(value, partial):
        return f"partial({_describe(value.func)}, {_describe(value.args)}, {_describe(value.keywords)})"
    if isinstance(value, types.MethodType):
        return f"{_describe(value.__self__)}.{value.__name__}"
    if isinstance(value, types.BuiltinFunctionType):
        return f"{value.__module__}.{value.__qualname__}"
    if isinstance(value, types.FunctionType):
        return f"{_name(value)} {_code(value)}"
    return f"{_name(type(value))}({_describe(_state(value))})"


def _state(value: Any) -> dict[str, Any]:
    """Return what makes an object differ from others of its class."""
    if isinstance(value, nn.Module):
        own = {name: part for name, part in vars(value).items() if name not in _MODULE_STATE}
        return {**own, **dict(value.named_children()), **value.state_dict()}
    slots = [name for kind in type(value).__mro__ for name in _slots(kind)]
    if not hasattr(value, "__dict__") and not slots:
        raise UnknownError(f"a {type(value).__name__}, whose settings cannot be read")
    return {**getattr(value, "__dict__", {}), **{name: getattr(value, name, None) for name in slots}}


def _slots(kind: type) -> tuple[str, ...]:
    slots = vars(kind).get("__slots__", ())
    names = (slots,) if isinstance(slots, str) else tuple(slots)
    return tuple(name for name in names if name not in ("__dict__", "__weakref__"))


def _name(value: type | types.FunctionType) -> str:
    """Return module and name of a class or function that means the same in the next process."""
    if value.__module__ == "__main__" or "<" in value.__qualname__:
        raise UnknownError(f"{value.__qualname__}, which a script or function defines: move it to a module")
    if isinstance(value, types.FunctionType) and value.__closure__:
        raise UnknownError(f"{value.__qualname__}, which depends on variables around it")
    called = [vars(value).get(name) for name in ("__call__", "forward")] if isinstance(value, type) else []
    codes = [_code(function) for function in called if isinstance(function, types.FunctionType)]
    return " ".join((f"{value.__module__}.{value.__qualname__}", *codes))


def _code(function: types.FunctionType) -> str:
    """Hash a function's instructions: an edited transform is another one."""
    code = function.__code__
    constants = [part for part in code.co_consts if isinstance(part, _SCALARS)]
    text = repr((code.co_code, constants, code.co_names, function.__defaults__))
    return hashlib.sha256(text.encode()).hexdigest()[:8]


def _tensor(value: Tensor) -> str:
    """Return type, shape and a hash of every bit."""
    plain = value.detach().cpu().contiguous().reshape(-1)
    digest = hashlib.sha256(memoryview(plain.view(torch.uint8).numpy()))
    return f"{value.dtype}{tuple(value.shape)} {digest.hexdigest()[:_DIGITS]}"
