"""A `Service` whose model is on the stand-in device, against one on the CPU."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path

import numpy as np
import pytest
import torch

import clipgraft as cg
from clipgraft.evaluate.head import Head, save_head
from clipgraft.serve.args import ServiceArgs
from clipgraft.serve.messages import Classify, Encode, Picture, Text, With
from clipgraft.serve.service import Service
from served_adapters import KINDS, picture_bytes, write_adapter, write_adapters
from standin_device import recorded_waits

ITEMS = (
    *map(Text, ("a red apple", "hai con mèo", "x", "a dog on a hill at night")),
    Picture(picture_bytes(1)),
)


@pytest.fixture
def services(device: torch.device, tmp_path: Path) -> Iterator[tuple[Service, Service]]:
    """The same adapters on the CPU and on the device."""
    folder = write_adapters(cg.load("emoji"), tmp_path / "adapters")
    run = folder / "run"
    write_adapter(cg.load("emoji"), run / "adapter", 9, targets="vision-attention", r=2)
    (run / "params.json").write_text('{"model": "emoji"}', encoding="utf-8")
    save_head(Head("linear", torch.randn(3, 192), 20.0), ("cat", "dog", "fox"), run / "head")
    args = ServiceArgs(adapters=(str(folder),))
    with (
        Service.load(args=args) as on_cpu,
        Service.load(device=str(device), args=args) as on_device,
    ):
        yield on_cpu, on_device


def test_answers_are_the_cpus(services: tuple[Service, Service]) -> None:
    """A server on a GPU fails, answers with other vectors, or reads more back than its answers."""
    on_device = services[1]
    assert on_device.clip.device.type != "cpu"
    for using in (With(), *(With(name, strength) for name in KINDS for strength in (1.0, 0.5))):
        wanted, got = (service.ask(Encode(ITEMS, using)) for service in services)
        assert np.abs(got.vectors - wanted.vectors).max() < 1e-5, using
        with recorded_waits() as waits:
            on_device.ask(Encode(ITEMS, using))
        assert {(w.operator, w.place) for w in waits} == {("to host", "serve/service.py:_compute")}, using
        assert len(waits) == 2, "a batch of each tower"
    asked = (
        Classify((ITEMS[-1],), ("cat", "dog"), using=With("both")),
        Classify((ITEMS[-1],), using=With("run")),
    )
    for message in asked:
        wanted_classes, got_classes = (service.ask(message) for service in services)
        assert got_classes.classes == wanted_classes.classes
        assert np.allclose(got_classes.probabilities, wanted_classes.probabilities, atol=1e-5)
