"""The stand-in device itself: what it refuses, what it records, and that its values are the CPU's."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from standin_device import Wait, recorded_waits

Made = Callable[[Tensor, Tensor], object]
MIXED: dict[str, Made] = {
    "sum": lambda here, there: here + there,
    "product": lambda here, there: here @ there,
    "linear": lambda here, there: F.linear(there, here),
    "cat": lambda here, there: torch.cat([here, there]),
    "in place": lambda here, there: here.add_(there),
    "embedding": lambda here, there: F.embedding(torch.tensor([0]), here),
    "loss": lambda here, there: F.cross_entropy(here, torch.tensor([0, 1, 2])),
    "index of the CPU's": lambda here, there: there[torch.zeros(1, dtype=torch.long, device=here.device)],
    "select": lambda here, there: here.index_select(0, torch.tensor([0])),
    "layer norm": lambda here, there: F.layer_norm(here, (3,), there[0]),
    "array": lambda here, there: here.numpy(),
    "generator": lambda here, there: here.normal_(generator=torch.Generator()),
    "mkldnn": lambda here, there: here.to_mkldnn(),
}


@pytest.mark.parametrize("name", MIXED)
def test_what_a_gpu_refuses_is_refused(name: str, device: torch.device) -> None:
    """A tensor that is left on the CPU is not found here, but by users."""
    there = torch.randn(3, 3)
    with pytest.raises((RuntimeError, NotImplementedError)):
        MIXED[name](torch.randn(3, 3).to(device), there)


def test_what_a_gpu_takes_of_the_cpu_is_taken(device: torch.device) -> None:
    """Code that is right on a GPU fails here."""
    here, number, rows = torch.ones(3, 3).to(device), torch.tensor(2.0), torch.tensor([0, 2])
    assert (here + number).tolist() == [[3.0] * 3] * 3
    assert torch.where(here > 0, number, here).device == device
    assert here[rows].shape == (2, 3)
    here[rows] = number
    assert here.sum().item() == 15


WAITS: dict[str, tuple[Callable[[Tensor], object], list[str]]] = {
    "item": (lambda x: x.sum().item(), ["item"]),
    "branch": (lambda x: bool(x.sum() > 0), ["item"]),
    "float": (lambda x: float(x[0, 0]), ["item"]),
    "list": (lambda x: x.tolist(), ["to host"]),
    "cpu": (lambda x: x.cpu(), ["to host"]),
    "copy": (lambda x: torch.empty(3, 3).copy_(x), ["to host"]),
    "upload": (lambda x: torch.ones(3).to(x.device), ["to device"]),
    "literal": (lambda x: torch.tensor([1.0], device=x.device), ["to device"]),
    "indices of the CPU": (lambda x: x[torch.tensor([1])], ["to device"]),
    "mask": (lambda x: x[x > 0], ["nonzero"]),
    "masked_select": (lambda x: x.masked_select(x > 0), ["masked_select"]),
    "nonzero": (lambda x: x.nonzero(), ["nonzero"]),
    "unique": (lambda x: x.unique(), ["unique"]),
    "equal": (lambda x: torch.equal(x, x), ["equal"]),
    "queued": (lambda x: torch.ones(3).pin_memory().to(x.device, non_blocking=True), []),
    "made there": (lambda x: torch.arange(3, device=x.device) + torch.zeros(3, device=x.device), []),
    "arithmetic": (lambda x: F.softmax(x @ x, -1).masked_fill(x > 0, 1).argmax(), []),
}


@pytest.mark.parametrize("name", WAITS)
def test_what_waits_for_a_gpu_is_recorded(name: str, device: torch.device) -> None:
    """A training loop that reads back at each step passes for one that does not."""
    call, wanted = WAITS[name]
    x = torch.randn(3, 3).to(device)
    with recorded_waits() as waits:
        call(x)
    assert [wait.operator for wait in waits] == wanted


def test_a_wait_names_who_asked(device: torch.device) -> None:
    """A failing test says that something waited, and not what."""
    from clipgraft.models.device import synchronize

    with recorded_waits() as waits:
        synchronize(device)
    assert waits == [Wait("synchronize", "models/device.py:synchronize")]


def _values(device: torch.device | str) -> list[Tensor]:
    """Outputs, gradients and updated weights of a small network."""
    torch.manual_seed(0)
    layers = nn.Sequential(nn.Conv2d(3, 8, 4, 4), nn.Flatten(2), nn.Linear(4, 8), nn.LayerNorm(8), nn.GELU())
    given = torch.randn(2, 3, 8, 8)
    parameters = list(layers.parameters())
    layers.to(device)
    optimizer = torch.optim.AdamW(parameters, fused=True)
    x = layers(given.to(device))
    x = F.scaled_dot_product_attention(x, x, x)
    torch.manual_seed(1)
    F.dropout(x, 0.3).square().mean().backward()
    norm = nn.utils.clip_grad_norm_(parameters, 0.1)
    optimizer.step()
    gradients = [p.grad for p in parameters if p.grad is not None]
    assert len(gradients) == len(parameters)
    return [x.detach(), norm, *gradients, *(p.detach() for p in parameters)]


def test_values_and_gradients_are_the_cpus(device: torch.device) -> None:
    """What runs here would say nothing about what runs on a CPU or a GPU."""
    wanted, found = _values("cpu"), _values(device)
    assert all(tensor.device == device for tensor in found)
    assert all(torch.allclose(a.cpu(), b, atol=1e-6) for a, b in zip(found, wanted, strict=True))


def test_random_numbers_are_its_own(device: torch.device) -> None:
    """A random stream that nobody saved, as GPUs have one, goes unnoticed."""
    torch.manual_seed(1)
    first = torch.randn(4, device=device)
    before = torch.get_rng_state()
    second = torch.randn(4, device=device)
    assert torch.equal(torch.get_rng_state(), before)
    torch.manual_seed(1)
    assert [torch.equal(torch.randn(4, device=device), x) for x in (first, second)] == [True, True]


def test_a_file_holds_plain_tensors(device: torch.device, tmp_path: Path) -> None:
    """A checkpoint could be read where the device is alone."""
    state: dict[str, Any] = {"x": torch.ones(2, device=device), "p": nn.Parameter(torch.ones(2).to(device))}
    torch.save(state, tmp_path / "state.pt")
    found = torch.load(tmp_path / "state.pt", weights_only=True, map_location="cpu")
    assert all(type(tensor) in (Tensor, nn.Parameter) for tensor in found.values())


@pytest.mark.parametrize("low", [torch.bfloat16, torch.float16])
def test_autocast_is_that_of_cuda(low: torch.dtype, device: torch.device) -> None:
    """`amp_bf16` is tested in fp32."""
    x = torch.randn(3, 3).to(device)
    with torch.autocast(device.type, low):
        assert F.linear(x, x).dtype == low
        assert F.layer_norm(x @ x, (3,)).dtype == torch.float32
    assert F.linear(x, x).dtype == torch.float32
