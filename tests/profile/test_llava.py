"""LLaVA-NeXT from its configuration alone, against a published report of it and closed formulas."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
from torch import nn

from clipgraft.errors import ModelError
from clipgraft.profile.llava import LlavaProfile, LlavaTokens, llava_costs, llava_on_meta

CONFIG = Path(__file__).parents[2] / "examples" / "llava_next_8b.json"
# A report by calflops of LLaVA-NeXT-8B on 5,120 crops: weights, and multiply-adds in 10⁹.
TOKENS = LlavaTokens(crops=5120, language=2982, logits=1024)
_VISION, _LANGUAGE = "model.vision_tower", "model.language_model"
PRODUCTS = {
    f"{_VISION}.embeddings.patch_embedding": ("602.11 K", 1780),
    **{
        f"{_VISION}.encoder.layers.{block}.self_attn.{name}_proj": ("1.05 M", 3100)
        for block in range(24)
        for name in ("q", "k", "v", "out")
    },
    **{
        f"{_VISION}.encoder.layers.{block}.mlp.{name}": ("4.2 M", 12390)
        for block in range(24)
        for name in ("fc1", "fc2")
    },
    "model.multi_modal_projector.linear_1": ("4.2 M", 12370),
    "model.multi_modal_projector.linear_2": ("16.78 M", 49480),
    **{
        f"{_LANGUAGE}.layers.{block}.{name}": found
        for block in range(32)
        for name, found in {
            "self_attn.q_proj": ("16.78 M", 50.03),
            "self_attn.k_proj": ("4.19 M", 12.51),
            "self_attn.v_proj": ("4.19 M", 12.51),
            "self_attn.o_proj": ("16.78 M", 50.03),
            "mlp.gate_proj": ("58.72 M", 175.1),
            "mlp.up_proj": ("58.72 M", 175.1),
            "mlp.down_proj": ("58.72 M", 175.1),
        }.items()
    },
    "lm_head": ("525.6 M", 538.21),
}
SHARES = {
    "": ("8.36 B", 100),
    _VISION: ("303.51 M", 3.6325),
    f"{_VISION}.embeddings": ("1.19 M", 0.0143),
    f"{_VISION}.embeddings.position_embedding": ("590.85 K", 0.0071),
    f"{_VISION}.pre_layrnorm": ("2.05 K", 0),
    f"{_VISION}.encoder": ("302.31 M", 3.6182),
    f"{_VISION}.encoder.layers.7": ("12.6 M", 0.1508),
    f"{_VISION}.encoder.layers.7.self_attn": ("4.2 M", 0.0502),
    f"{_VISION}.encoder.layers.7.mlp": ("8.39 M", 0.1005),
    "model.multi_modal_projector": ("20.98 M", 0.2511),
    _LANGUAGE: ("7.51 B", 89.8257),
    f"{_LANGUAGE}.embed_tokens": ("525.6 M", 6.2906),
    f"{_LANGUAGE}.layers.31": ("218.11 M", 2.6105),
    f"{_LANGUAGE}.layers.31.self_attn": ("41.94 M", 0.5020),
    f"{_LANGUAGE}.layers.31.mlp": ("176.16 M", 2.1084),
    f"{_LANGUAGE}.norm": ("4.1 K", 0),
    "lm_head": ("525.6 M", 6.2906),
}


def small(**changes: Any) -> dict[str, Any]:
    """The same model with two blocks a part."""
    values: dict[str, Any] = json.loads(CONFIG.read_text())
    for part in ("vision_config", "text_config"):
        values[part]["num_hidden_layers"] = 2
    return {**values, **changes}


@pytest.fixture(scope="module")
def model() -> nn.Module:
    return llava_on_meta(CONFIG)


@pytest.fixture(scope="module")
def profile(model: nn.Module) -> LlavaProfile:
    return llava_costs(model, tokens=TOKENS)


def rounded(number: float) -> str:
    """As the report writes numbers of weights."""
    scale, letter = next(pair for pair in ((1e9, "B"), (1e6, "M"), (1e3, "K")) if number >= pair[0])
    return f"{number / scale:.2f}".rstrip("0").rstrip(".") + f" {letter}"


def test_every_linear_and_convolution_of_the_report(model: nn.Module, profile: LlavaProfile) -> None:
    """A multiply-add count or a number of weights differs from what a profiler of the real model printed."""
    kinds = (nn.Linear, nn.Conv2d)
    assert PRODUCTS.keys() == {path for path, module in model.named_modules() if isinstance(module, kinds)}
    for path, (weights, macs) in PRODUCTS.items():
        layer = profile.trace.layer(path)
        assert rounded(layer.parameters) == weights, path
        digits = 0.005 * (1000 if macs >= 1000 else 1)
        assert layer.macs / 1e9 == pytest.approx(macs, abs=1.01 * digits), path


def test_every_share_of_the_report(profile: LlavaProfile) -> None:
    """A module has another share of the weights than in the report of the real model."""
    total = profile.trace.total.parameters
    assert total == 8_355_276_800
    for path, (weights, share) in SHARES.items():
        layer = profile.trace.layer(path)
        assert rounded(layer.parameters) == weights, path
        assert 100 * layer.parameters / total == pytest.approx(share, abs=6e-5), path


def test_attention_is_counted(profile: LlavaProfile) -> None:
    """Attention is left out, as in the report, or is not queries × keys and scores × values."""
    vision = 24 * TOKENS.crops * 2 * 577**2 * 1024
    language = 32 * 2 * TOKENS.language**2 * 4096
    missing = vision + language
    assert profile.trace.total.macs / 1e12 == pytest.approx(977.124 + missing / 1e12, abs=0.001)
    found = sum(product.macs for product in profile.trace.products if product.weight is None)
    # Some releases of transformers compute the 64 rotary angles of each token by a matrix product.
    assert found in (missing, missing + TOKENS.language * 64)
    assert profile.trace.unpriced == ()


def test_weights_in_bytes(profile: LlavaProfile) -> None:
    """The memory of the weights is that of another type."""
    assert profile.dtype == "bfloat16"
    assert profile.weight_bytes == 2 * 8_355_276_800


@pytest.mark.parametrize(
    ("size", "crops", "tokens"),
    [
        # 24×24 patches a crop. 480×640 on a 2×2 grid: 6 rows are cut off at the top and at the bottom.
        ((480, 640), 5, 576 + 36 * (48 + 1)),
        ((672, 672), 5, 576 + 48 * (48 + 1)),
        ((336, 336), 3, 576 + 24 * (24 + 1)),
        # 1×3: as wide as the grid, or narrower.
        ((336, 1008), 4, 576 + 24 * (72 + 1)),
        ((2000, 200), 4, 576 + 72 * (8 + 1)),
    ],
)
def test_tokens_of_a_real_image(size: tuple[int, int], crops: int, tokens: int) -> None:
    """An image is cut into other crops, or leaves other tokens, than in the model."""
    found = llava_costs(llava_on_meta(small()), image_size=size, text_tokens=10).tokens
    assert (found.crops, found.language, found.logits) == (crops, tokens + 10, 1)


def test_the_processor_makes_as_many_tokens() -> None:
    """The tokens of an image are not those that transformers' own processor would put into the prompt."""
    from transformers.models.llava_next.processing_llava_next import LlavaNextProcessor

    class Grid:
        image_grid_pinpoints = small()["image_grid_pinpoints"]

    processor = object.__new__(LlavaNextProcessor)
    processor.image_processor, processor.patch_size, processor.num_additional_image_tokens = Grid(), 14, 0
    processor.vision_feature_select_strategy = "default"
    model = llava_on_meta(small())
    for height, width in ((480, 640), (100, 900), (1080, 1920), (333, 334)):
        wanted = processor._get_number_of_features(height, width, 336, 336)
        found = llava_costs(model, image_size=(height, width), text_tokens=1).tokens.language
        assert found == wanted + 1, (height, width)


@pytest.mark.parametrize(
    ("config", "message"),
    [
        ({"model_type": "clip"}, "model_type is 'clip', not 'llava_next'"),
        ({"model_type": "llava_next", "vision_config": {"model_type": "nonsense"}}, "no LLaVA-NeXT model"),
    ],
)
def test_other_configurations(config: dict[str, Any], message: str) -> None:
    """A configuration of another model ends in a traceback."""
    with pytest.raises(ModelError, match=message) as caught:
        llava_on_meta(config)
    assert "\n" not in str(caught.value)


def test_an_image_of_no_size() -> None:
    """An empty image is profiled."""
    with pytest.raises(ModelError, match="all must be 1 or more"):
        llava_costs(llava_on_meta(small()), image_size=(0, 10))
