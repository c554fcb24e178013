"""Which number type features are computed in, and the largest memory of a stretch of work."""

from __future__ import annotations

import logging
import sys
from collections.abc import Iterator

import pytest
import torch
import torch.nn.functional as F
from torch import nn

from clipgraft.models import device
from clipgraft.models.clip import as_clip
from clipgraft.models.device import peak_memory

CPU = torch.device("cpu")


@pytest.fixture(autouse=True)
def forgotten() -> Iterator[None]:
    """Each test measures anew, and leaves nothing of it behind."""
    device.bf16_speed.cache_clear()
    yield
    device.bf16_speed.cache_clear()


def take(monkeypatch: pytest.MonkeyPatch, fp32: float, bf16: float) -> list[torch.dtype]:
    """Stub the measurement; returns the list of types that were measured."""
    measured: list[torch.dtype] = []

    def seconds(_: torch.device, dtype: torch.dtype) -> float:
        measured.append(dtype)
        return {torch.float32: fp32, torch.bfloat16: bf16}[dtype]

    monkeypatch.setattr(device, "_matmul_seconds", seconds)
    return measured


@pytest.mark.parametrize(("fp32", "bf16", "fast"), [(6.0, 1.0, True), (1.0, 1.0, False), (1.0, 30.0, False)])
def test_auto_follows_the_measurement(
    fp32: float, bf16: float, fast: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Encoding on a processor without bf16 units would be thirty times slower, or miss a fast one."""
    take(monkeypatch, fp32, bf16)
    assert device.use_autocast(None, CPU) is fast


@pytest.mark.parametrize("choice", [True, False])
def test_a_choice_is_not_measured(choice: bool, monkeypatch: pytest.MonkeyPatch) -> None:
    """`--precision fp32` would still compute in bf16."""
    measured = take(monkeypatch, 1.0, 1.0)
    assert device.use_autocast(choice, CPU) is choice
    assert measured == []


def test_a_device_is_measured_once(monkeypatch: pytest.MonkeyPatch) -> None:
    """Two calls of one run could disagree, and its features would not compare."""
    measured = take(monkeypatch, 6.0, 1.0)
    assert [device.use_autocast(None, CPU) for _ in range(3)] == [True] * 3
    assert len(measured) == 2


@pytest.mark.parametrize(
    ("fp32", "bf16", "told"),
    [
        (
            4.2,
            1.0,
            "computing in bf16: this CPU multiplies it 4.2 times as fast as fp32; "
            "`precision='fp32'` for full precision",
        ),
        (
            1.0,
            2.0,
            "computing in fp32: this CPU multiplies bf16 only 0.5 times as fast; "
            "`precision='amp_bf16'` to do so all the same",
        ),
    ],
)
def test_what_was_measured_is_told(
    fp32: float,
    bf16: float,
    told: str,
    monkeypatch: pytest.MonkeyPatch,
    caplog: pytest.LogCaptureFixture,
) -> None:
    """Results would differ from another machine's, and nothing would say why."""
    caplog.set_level(logging.INFO, "clipgraft")
    take(monkeypatch, fp32, bf16)
    device.use_autocast(None, CPU)
    assert caplog.messages == [told]


def test_bf16_features_stay_close(tiny_openclip: nn.Module) -> None:
    """Evaluation that chooses bf16 by itself would report another model's numbers."""
    clip = as_clip(tiny_openclip)
    pixels = torch.randn(4, 3, 32, 32, generator=torch.Generator().manual_seed(0))
    with torch.no_grad():
        exact = clip.encode_image(pixels)
        with torch.autocast("cpu", torch.bfloat16):
            rounded = clip.encode_image(pixels).float()
    assert not torch.equal(exact, rounded)
    assert F.cosine_similarity(exact, rounded).min() >= 0.999


def test_features_are_normalised_in_full_precision(tiny_openclip: nn.Module) -> None:
    """Unit-norm features that are 0.4 % too long or short make cosines that are wrong in the third digit."""
    clip = as_clip(tiny_openclip)
    pixels = torch.randn(16, 3, 32, 32, generator=torch.Generator().manual_seed(0))
    with torch.no_grad(), torch.autocast("cpu", torch.bfloat16):
        found = clip.encode_image(pixels, normalize=True), clip.encode_text(torch.ones(4, 77).long(), True)
    with torch.no_grad():
        clip.to(torch.bfloat16)
        found += (clip.encode_image(pixels, normalize=True),)
        assert clip.encode_image(pixels).dtype == torch.bfloat16
    for features in found:
        assert features.dtype == torch.float32
        torch.testing.assert_close(features.norm(dim=-1), torch.ones(len(features)), rtol=0, atol=1e-6)


@pytest.mark.skipif(sys.platform != "linux", reason="only Linux tells the mark")
def test_a_stretch_is_charged_for_its_own_memory() -> None:
    """The table blames a small run for what a larger one before it took, or misses what is freed."""
    with peak_memory() as small:
        before = small()
    assert before is not None
    with peak_memory() as large:
        held = [torch.ones(64, 1024) for _ in range(400)]
        del held
        high = large()
    with peak_memory() as again:
        after = again()
    assert high is not None
    assert after is not None
    assert high > before + 90
    assert after < before + 30
