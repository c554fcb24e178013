"""Products in 8-bit integers: close to those in fp32, and of each row alone."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
import torch.nn.functional as F

import clipgraft as cg
from clipgraft.engine import quantized
from clipgraft.engine.encoder import Encoder
from clipgraft.engine.quantized import Int8Weight, int8_works
from clipgraft.errors import ModelError
from clipgraft.models.load import load

needs_vnni = pytest.mark.skipif(not int8_works(), reason="int8 needs a CPU with VNNI")


@needs_vnni
def test_product_is_that_of_rounded_factors() -> None:
    """A wrong scale, offset or bias would move every feature of a folder encoded in int8."""
    torch.manual_seed(0)
    x = (torch.randn(12, 40) * torch.logspace(-3, 3, 12)[:, None]).to(torch.bfloat16)
    x[3] = 0
    weights, biases = [torch.randn(8, 40), torch.randn(24, 40)], [torch.randn(8), None]
    found = Int8Weight(weights, biases).forward(x).double()
    weight = torch.cat(weights).double()
    outputs = weight.abs().amax(1, keepdim=True) / 127
    rows = (x.abs().amax(1, keepdim=True) / 126).double().clamp(min=1e-30)
    wanted = ((x.double() / rows).round() * rows) @ ((weight / outputs).round() * outputs).T
    wanted[:, :8] += biases[0].double()  # type: ignore[union-attr]
    # A quotient that bf16 rounds across a half is one step off; that and bf16's own rounding are allowed.
    allowed = 0.01 * wanted.abs() + rows * outputs.T * 127 * 3 + 1e-2
    assert ((found - wanted).abs() <= allowed).all()
    assert F.cosine_similarity(found, wanted, dim=1).min() > 0.9999


@needs_vnni
@pytest.mark.parametrize("adapted", [False, True])
def test_features_are_close_and_of_each_row_alone(tiny_config: Path, adapted: bool) -> None:
    """An image would get another vector in another batch, or one that a search does not find."""
    clip = load(str(tiny_config), "none").eval()
    if adapted:
        torch.manual_seed(1)
        cg.apply_lora(clip, r=2, targets="linear")
        for name, parameter in clip.model.named_parameters():
            if "lora_B" in name:
                torch.nn.init.normal_(parameter, std=0.1)
    lossy = Encoder(clip, int8=True)
    images = torch.randn(6, 3, *clip.family.image_size(clip.model))
    tokens = clip.tokenize(["a cat", "a dog in the snow", "a cat on a mat"])
    with torch.inference_mode():
        pairs = (
            (lossy.encode_image(images), clip.encode_image(images)),
            (lossy.encode_text(tokens), clip.encode_text(tokens)),
        )
        alone = lossy.encode_image(images[4:5])
    for found, exact in pairs:
        assert F.cosine_similarity(found, exact).min() > 0.999
        assert not torch.equal(found, exact)
    assert F.cosine_similarity(alone, pairs[0][0][4:5]) > 0.99999


def test_a_cpu_that_cannot_is_refused(tiny_config: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Sums would overflow on a CPU without VNNI, silently."""
    monkeypatch.setattr(quantized, "int8_works", lambda: False)
    with pytest.raises(ModelError, match="int8 needs a CPU with VNNI"):
        Encoder(load(str(tiny_config), "none"), int8=True)
