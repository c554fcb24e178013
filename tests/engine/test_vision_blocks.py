"""The image tower in two parts: up to a block, and from there on."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor, nn

import clipgraft as cg
from clipgraft.engine.encoder import Encoder
from clipgraft.models.clip import as_clip
from explicit_lora import inputs, randomise_lora


def input_of_block(model: nn.Module, pixels: Tensor, block: int) -> Tensor:
    """What the model's own forward hands to one of its blocks."""
    vision = (
        model.visual.transformer.resblocks if hasattr(model, "visual") else model.vision_model.encoder.layers
    )
    seen: list[Tensor] = []
    hook = vision[block].register_forward_pre_hook(
        lambda _, args, kwargs: seen.append(args[0] if args else kwargs["hidden_states"]), with_kwargs=True
    )
    as_clip(model).encode_image(pixels)
    hook.remove()
    return seen[0]


@pytest.mark.parametrize("layout", ["tiny_openclip", "tiny_openclip_4x", "tiny_hf"])
@pytest.mark.parametrize("block", [0, 1])
@pytest.mark.parametrize("checkpointing", [False, True])
def test_two_parts_are_the_whole(
    layout: str, block: int, checkpointing: bool, request: pytest.FixtureRequest
) -> None:
    """An adapter on the upper blocks would be trained on activations that no image gives."""
    model = request.getfixturevalue(layout)
    cg.apply_lora(model, r=3, targets="vision.1.*,vision.proj")
    randomise_lora(model)
    pixels, _ = inputs(model, batch=4)
    encoder = Encoder(as_clip(model), grad_checkpointing=checkpointing)
    assert encoder.vision_blocks == 2
    with torch.no_grad():
        middle = encoder.encode_to_block(pixels, block)
        own = input_of_block(model, pixels, block)
    assert middle.shape == (4, *encoder.vision_shape) == (4, 17, 32)
    torch.testing.assert_close(middle, own, rtol=1e-5, atol=1e-5)
    torch.testing.assert_close(
        encoder.encode_from_block(middle, block), encoder.encode_image(pixels), rtol=1e-5, atol=1e-5
    )


def test_bf16_keeps_a_wide_residual(tiny_openclip: nn.Module) -> None:
    """Rounding after every block would add up; only what is stored may be rounded, and once."""
    clip = as_clip(tiny_openclip)
    pixels, _ = inputs(tiny_openclip, batch=4)
    encoder = Encoder(clip, autocast=True)
    with torch.no_grad():
        middle = encoder.encode_to_block(pixels, 1)
        features = encoder.encode_from_block(middle.bfloat16(), 1)
        wanted = clip.encode_image(pixels)
    assert middle.dtype == features.dtype == torch.float32
    assert torch.cosine_similarity(features, wanted).min() > 0.999
