"""`torch.device("standin")`: behaves as a GPU does, computes on the CPU, and needs no GPU.

Its tensors claim the device and hold a CPU tensor, on which the CPU's kernels run, so that results are the
CPU's to rounding. As on a GPU,

- an operator that gets tensors of both devices raises (0-dim ones of the CPU are numbers
  where CUDA takes them);
- operators and layouts that the CPU alone has raise;
- random numbers come from a stream of its own, which `torch.manual_seed` seeds;
- whatever makes the host wait for the device can be recorded, with the line that asked (`recorded_waits`).

It cannot show a type that a GPU's kernels lack, another order of adding, or a race between streams.
"""

from __future__ import annotations

import contextlib
import functools
import sys
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from types import FrameType
from typing import Any, cast

import pytest
import torch
from torch import Tensor
from torch.utils import backend_registration

import clipgraft

aten = torch.ops.aten
NAME = "standin"
SUPPORTED = hasattr(backend_registration, "_setup_privateuseone_for_python_backend")
_SOURCE = Path(clipgraft.__file__).parent


# ------------------------------------------------------------------------------------------------ what waits


@dataclass(frozen=True)
class Wait:
    """The host waited for the device.

    Attributes:
        operator: what for: "item", "to host", "to device", "nonzero" …
        place: the innermost function of clipgraft that asked, "train/loop.py:read"; "" where none did.
    """

    operator: str
    place: str


_recorders: list[list[Wait]] = []


@contextlib.contextmanager
def recorded_waits() -> Iterator[list[Wait]]:
    """Gives the list of what the host has waited for since."""
    found: list[Wait] = []
    _recorders.append(found)
    try:
        yield found
    finally:
        _recorders.remove(found)


def _wait(operator: str) -> None:
    if _recorders:
        wait = Wait(operator, _place(sys._getframe(1)))
        for found in _recorders:
            found.append(wait)


def _place(frame: FrameType | None) -> str:
    while frame is not None:
        path = Path(frame.f_code.co_filename)
        if path.is_relative_to(_SOURCE) and not frame.f_code.co_name.startswith("<"):  # a comprehension
            return f"{path.relative_to(_SOURCE).as_posix()}:{frame.f_code.co_name}"
        frame = frame.f_back
    return ""


# ---------------------------------------------------------------------------------------------- its tensors


class StandInTensor(Tensor):
    """A tensor on the device; `held` is the CPU tensor with its values."""

    held: Tensor
    __torch_function__ = torch._C._disabled_torch_function_impl

    @staticmethod
    def __new__(cls, held: Tensor) -> StandInTensor:
        assert not isinstance(held, StandInTensor)
        tensor = cls._make_wrapper_subclass(  # type: ignore[attr-defined]
            cls,
            held.shape,
            strides=held.stride(),
            storage_offset=held.storage_offset(),
            dtype=held.dtype,
            device=torch.device(NAME, 0),
        )
        tensor.held = held.detach()
        return cast(StandInTensor, tensor)

    def __init__(self, held: Tensor) -> None:
        pass

    @classmethod
    def __torch_dispatch__(
        cls, func: Any, types: Any, args: tuple[Any, ...] = (), kwargs: Mapping[str, Any] | None = None
    ) -> Any:
        return _run(func, args, dict(kwargs or {}))

    # For `nn.Module.to`, which then puts the new values into the same parameters, as it does on a GPU.
    def __tensor_flatten__(self) -> tuple[list[str], None]:
        return ["held"], None

    @staticmethod
    def __tensor_unflatten__(inner: dict[str, Tensor], *_: object) -> StandInTensor:
        return StandInTensor(inner["held"])

    @property
    def data(self) -> Tensor:
        return cast(Tensor, Tensor.data.__get__(self))  # type: ignore[attr-defined]

    @data.setter
    def data(self, other: StandInTensor) -> None:
        Tensor.data.__set__(self, other)  # type: ignore[attr-defined]
        self.held = other.held

    def untyped_storage(self) -> torch.UntypedStorage:
        return self.held.untyped_storage()

    def tolist(self) -> Any:
        return self.cpu().tolist()

    def __repr__(self, **_: object) -> str:  # type: ignore[override]
        return f"StandInTensor({self.held!r})"

    def __reduce_ex__(self, protocol: Any) -> Any:
        """A file holds plain tensors, which `map_location` puts anywhere, as those of a GPU."""
        return self.cpu().__reduce_ex__(protocol)


# -------------------------------------------------------------------------------------------- its operators

_CPU_ONLY = ("mkldnn", "onednn", "quantized", "fbgemm", "_for_cpu", "_mkl_")
_TAKES_HOST_NUMBERS = ("fill", "where", "masked_fill", "index_put", "lerp", "_foreach", "clamp", "full")
_TAKES_HOST_INDICES = ("index", "_unsafe_index", "index_put", "index_put_", "_index_put_impl_")
_WAITS = {
    "_local_scalar_dense": "item",
    "is_nonzero": "item",
    "nonzero": "nonzero",
    "masked_select": "masked_select",
    "_unique2": "unique",
    "unique_dim": "unique",
    "unique_consecutive": "unique",
    "bincount": "bincount",
    "equal": "equal",
}


@dataclass(frozen=True)
class _Facts:
    """What is known of an operator.

    Attributes:
        refusal: why the device does not have it; None if it does.
        is_made_of_others: which inference mode does not take apart before it dispatches.
        takes_numbers: whether a 0-dim tensor of the CPU may stand beside those of the device.
        takes_indices: whether its indices may be on the CPU.
        waits_for: what the host waits for in each call; None for nothing.
        is_view: whether its result shares memory with its first argument.
        is_random: whether it draws random numbers.
    """

    refusal: str | None
    is_made_of_others: bool
    takes_numbers: bool
    takes_indices: bool
    waits_for: str | None
    is_view: bool
    is_random: bool

    @classmethod
    @functools.cache
    def of(cls, func: Any) -> _Facts:
        name, told, aliases = func.overloadpacket.__name__, None, [r.alias_info for r in func._schema.returns]
        if any(word in str(func) for word in _CPU_ONLY):
            told = f"{func} is not implemented for {NAME}: the CPU alone has it"
        elif torch.Tag.inplace_view in func.tags:
            told = f"{func}: {NAME} does not change shapes in place"
        return cls(
            refusal=told,
            is_made_of_others=func._can_decompose(),
            takes_numbers=torch.Tag.pointwise in func.tags or name.startswith(_TAKES_HOST_NUMBERS),
            takes_indices=name in _TAKES_HOST_INDICES,
            waits_for="repeat_interleave" if func is aten.repeat_interleave.Tensor else _WAITS.get(name),
            is_view=any(alias is not None and not alias.is_write for alias in aliases),
            is_random=torch.Tag.nondeterministic_seeded in func.tags,
        )


def _run(func: Any, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
    """One operator, at least one of whose tensors is on the device."""
    facts = _Facts.of(func)
    if facts.is_made_of_others:
        return func.decompose(*args, **kwargs)
    if func is aten.copy_.default or func is aten._to_copy.default:
        return _copy(func, args, kwargs)
    if func is aten.detach_.default:
        return args[0]
    if facts.refusal is not None:
        raise NotImplementedError(facts.refusal)
    _refuse_mixed(func, facts, args, kwargs)
    _record(facts, args)
    elsewhere = kwargs.get("device") is not None and torch.device(kwargs["device"]).type != NAME
    if not elsewhere:
        kwargs.pop("device", None)
    kwargs.pop("pin_memory", None)
    with torch.inference_mode(False), _own_random(facts.is_random):
        found = func(*_held(args), **{name: _held(value) for name, value in kwargs.items()})
    if elsewhere:
        return found
    # A view of a tensor that is no inference tensor is none, within inference mode too.
    inference = torch.is_inference_mode_enabled() and not (facts.is_view and not args[0].is_inference())
    with torch.inference_mode(inference):
        return _mapped(_wrapping(func, args, kwargs), found)


def _wrapping(func: Any, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Callable[[Any], Any]:
    """Results on the device; those of an operator in place are the tensors that it was given."""
    given = {
        id(tensor.held): tensor for tensor in _tensors((args, kwargs)) if isinstance(tensor, StandInTensor)
    }
    if any(tensor.held.shape != tensor.shape for tensor in given.values()):
        raise NotImplementedError(f"{func}: {NAME} does not change shapes in place")

    def wrap(value: Any) -> Any:
        if not isinstance(value, Tensor):
            return value
        return given[id(value)] if id(value) in given else StandInTensor(value)

    return wrap


def _copy(func: Any, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
    with torch.inference_mode(False):
        if func is aten.copy_.default:
            into, source, *rest = args
            queued = bool(rest[0]) if rest else bool(kwargs.get("non_blocking", False))
            _record_copy(source, into.device, queued)
            _held(into).copy_(_held(source))
            return into
        source = args[0]
        device = torch.device(kwargs.pop("device", None) or source.device)
        queued = bool(kwargs.pop("non_blocking", False))
        kwargs.pop("pin_memory", None)
        _record_copy(source, device, queued)
        if device.type != NAME:
            return func(_held(source), device=device, **kwargs)
        copied = func(_held(source), **kwargs)
    return StandInTensor(copied)


def _record_copy(source: Tensor, into: torch.device, queued: bool) -> None:
    if source.device.type != into.type and not queued:
        _wait("to device" if into.type == NAME else "to host")


def _refuse_mixed(func: Any, facts: _Facts, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
    if facts.takes_indices and isinstance(args[0], StandInTensor):
        args = (args[0], *args[2:])
    if any(isinstance(value, torch.Generator) for value in kwargs.values()):
        raise RuntimeError(f"Expected a {NAME!r} device type for generator but found 'cpu' ({func})")
    for tensor in _tensors((args, kwargs)):
        if tensor.device.type == "cpu" and not (facts.takes_numbers and tensor.ndim == 0):
            raise RuntimeError(
                "Expected all tensors to be on the same device, but found at least two devices, "
                f"{NAME}:0 and cpu! ({func})"
            )


def _record(facts: _Facts, args: tuple[Any, ...]) -> None:
    if facts.waits_for is not None:
        _wait(facts.waits_for)
    elif facts.takes_indices:
        indices = list(_tensors(args[1]))
        if any(index.dtype in (torch.bool, torch.uint8) for index in indices):
            _wait("nonzero")
        if any(index.device.type == "cpu" for index in indices):
            _wait("to device")


def _mapped(change: Callable[[Any], Any], tree: Any) -> Any:
    if isinstance(tree, list | tuple):
        return type(tree)(_mapped(change, part) for part in tree)
    return change(tree)


def _held(tree: Any) -> Any:
    return _mapped(lambda value: value.held if isinstance(value, StandInTensor) else value, tree)


def _tensors(tree: Any) -> Iterator[Tensor]:
    if isinstance(tree, Tensor):
        yield tree
    elif isinstance(tree, list | tuple | dict):
        for part in tree.values() if isinstance(tree, dict) else tree:
            yield from _tensors(part)


# ---------------------------------------------------------------------------------------- its random numbers

_random = torch.Generator()


@contextlib.contextmanager
def _own_random(draws: bool) -> Iterator[None]:
    if not draws:
        yield
        return
    before = torch.default_generator.get_state()
    torch.default_generator.set_state(_random.get_state())
    try:
        yield
    finally:
        _random.set_state(torch.default_generator.get_state())
        torch.default_generator.set_state(before)


# --------------------------------------------------------------------------------------------- its autocast

# What torch's documentation of autocast says of CUDA.
_IN_LOW = (
    *("conv1d", "conv2d", "conv3d", "matmul", "mm", "mv", "linear", "addmm", "addmv", "baddbmm", "bmm"),
    *("addbmm", "scaled_dot_product_attention"),
)
_IN_FP32 = (
    *("layer_norm", "group_norm", "exp", "log", "rsqrt", "cosine_similarity", "logsumexp", "nll_loss"),
    *("softmax.int", "log_softmax.int", "sum", "sum.dim_IntList", "cumsum", "norm.ScalarOpt_dim"),
)


# What torch makes by changing the shape of an empty tensor.
_MADE = (
    "arange",
    "arange.start",
    "arange.start_step",
    "linspace",
    "eye",
    "eye.m",
    "randperm",
    "tril_indices",
)


def _cast(operator: Any, low: bool) -> Callable[..., Any]:
    key = torch._C.DispatchKey.AutocastPrivateUse1

    def call(*args: Any, **kwargs: Any) -> Any:
        wanted = torch.get_autocast_dtype(NAME) if low else torch.float32

        def change(value: Any) -> Any:
            casts = isinstance(value, StandInTensor) and value.is_floating_point()
            return value.to(wanted) if casts and value.dtype != torch.float64 else value

        with torch._C._ExcludeDispatchKeyGuard(torch._C.DispatchKeySet(key)):
            changed = {name: _mapped(change, value) for name, value in kwargs.items()}
            return operator(*_mapped(change, args), **changed)

    return call


# ------------------------------------------------------------------------------------- how torch learns of it


class _Module:
    """`torch.standin`, as `torch.cuda`."""

    available = False
    _initialized = True

    def is_initialized(self) -> bool:
        return True

    def is_available(self) -> bool:
        return self.available

    def device_count(self) -> int:
        return int(self.available)

    def current_device(self) -> int:
        return 0

    def set_device(self, device: object) -> None:
        pass

    def device(self, device: object) -> contextlib.AbstractContextManager[None]:
        return contextlib.nullcontext()

    def _is_in_bad_fork(self) -> bool:
        return False

    def manual_seed_all(self, seed: int) -> None:
        _random.manual_seed(seed)

    def get_rng_state(self, device: object = 0) -> Tensor:
        return _random.get_state()

    def set_rng_state(self, state: Tensor, device: object = 0) -> None:
        _random.set_state(state)

    def get_amp_supported_dtype(self) -> list[torch.dtype]:
        return [torch.bfloat16, torch.float16]

    def synchronize(self, device: object = None) -> None:
        _wait("synchronize")


_module = _Module()
_libraries: list[torch.library.Library] = []


def register() -> None:
    """Tell torch of the device: once in a process, and for good; before its first backward pass."""
    if _libraries or not SUPPORTED:
        return

    class Hooks(torch._C._acc.PrivateUse1Hooks):
        def is_available(self) -> bool:
            return _module.available

        def has_primary_context(self, device: int) -> bool:
            return True

        def is_built(self) -> bool:
            return True

    backend_registration._setup_privateuseone_for_python_backend(NAME, backend_module=_module, hook=Hooks())
    kernels, fallbacks = torch.library.Library("aten", "IMPL"), torch.library.Library("_", "IMPL")
    _libraries.extend((kernels, fallbacks))
    fallbacks.fallback(torch.library.fallthrough_kernel, "AutocastPrivateUse1")

    def empty(size: list[int], *, dtype: Any = None, memory_format: Any = None, **_: object) -> Tensor:
        options = {} if memory_format is None else {"memory_format": memory_format}
        return StandInTensor(torch.empty(size, dtype=dtype, **options))

    def empty_strided(size: list[int], stride: list[int], *, dtype: Any = None, **_: object) -> Tensor:
        return StandInTensor(torch.empty_strided(size, stride, dtype=dtype))

    def copy_from(source: Tensor, into: Tensor, non_blocking: bool = False) -> Tensor:
        return cast(Tensor, _copy(aten.copy_.default, (into, source, non_blocking), {}))

    def made(operator: Any) -> Callable[..., Tensor]:
        def make(*args: Any, **kwargs: Any) -> Tensor:
            with _own_random(_Facts.of(operator).is_random):
                return StandInTensor(operator(*args, **{**kwargs, "device": "cpu", "pin_memory": False}))

        return make

    for name in _MADE:
        packet, _, overload = name.partition(".")
        kernels.impl(name, made(getattr(getattr(aten, packet), overload or "default")), "PrivateUse1")
    kernels.impl("_copy_from", copy_from, "PrivateUse1")  # of `torch.tensor`, which dispatches to no subclass
    kernels.impl("empty.memory_format", empty, "PrivateUse1")
    kernels.impl("empty_strided", empty_strided, "PrivateUse1")
    for names, low in ((_IN_LOW, True), (_IN_FP32, False)):
        for name in names:
            packet, _, overload = name.partition(".")
            operator = getattr(getattr(aten, packet), overload or "default")
            kernels.impl(name, _cast(operator, low), "AutocastPrivateUse1")


@contextlib.contextmanager
def standin_device() -> Iterator[torch.device]:
    """The device, which torch's accelerator is within. Skips the test where torch cannot have it."""
    if not SUPPORTED:
        pytest.skip("this torch cannot have a device that is written in Python")
    register()
    swaps = torch.__future__.get_swap_module_params_on_conversion()
    torch.__future__.set_swap_module_params_on_conversion(True)
    _module.available = True
    try:
        with pytest.MonkeyPatch.context() as patch:
            # There is no memory to pin: a copy from here is queued if it is asked to be.
            patch.setattr(Tensor, "pin_memory", lambda self, device=None: self)
            yield torch.device(NAME, 0)
    finally:
        _module.available = False
        torch.__future__.set_swap_module_params_on_conversion(swaps)
