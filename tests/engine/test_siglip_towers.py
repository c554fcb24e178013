"""The engine on SigLIP's towers, which see all of a row, against the forwards of both libraries."""

from __future__ import annotations

import copy

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn
from transformers import Siglip2Config, Siglip2Model, SiglipConfig, SiglipModel

import clipgraft as cg
from clipgraft.engine.encoder import Encoder, encode_rows
from clipgraft.lora.state import require_lora
from clipgraft.models.clip import as_clip
from clipgraft.models.sites import Tower
from explicit_lora import randomise_active
from tiny_models import randomise
from tiny_towers import build_tower
from weight_places import CONTEXT, SIZE

LAYOUTS = ("open_clip", "transformers")
layouts = pytest.mark.parametrize("layout", LAYOUTS)
_TOWER = {"hidden_size": 32, "num_hidden_layers": 2, "num_attention_heads": 2, "intermediate_size": 48}
_TEXT = {**_TOWER, "vocab_size": 100, "max_position_embeddings": CONTEXT, "projection_size": 32}


def build(layout: str) -> nn.Module:
    if layout == "open_clip":
        return build_tower("SigLIP")
    torch.manual_seed(0)
    vision = {**_TOWER, "image_size": SIZE, "patch_size": 8}
    return randomise(SiglipModel(SiglipConfig(text_config=_TEXT, vision_config=vision))).eval()


def inputs(rows: int = 5) -> tuple[Tensor, Tensor]:
    """Pixels, and ids of which the last are padding, as tokenizers of SigLIP give them."""
    generator = torch.Generator().manual_seed(1)
    ids = torch.randint(2, 100, (rows, CONTEXT), generator=generator)
    for row in range(rows):
        ids[row, 4 + row :] = 1
    return torch.randn(rows, 3, SIZE, SIZE, generator=generator), ids


def loss_of(images: Tensor, texts: Tensor) -> Tensor:
    return (F.normalize(images, dim=-1) @ F.normalize(texts, dim=-1).T).square().sum()


def close(got: Tensor, wanted: Tensor) -> bool:
    got, wanted = got.detach(), wanted.detach()
    return torch.allclose(got, wanted, rtol=1e-4, atol=1e-5 * max(1.0, float(wanted.abs().max())))


@layouts
@pytest.mark.parametrize("targets", ["all", "text.*.q,v", "vision.1.fc1,vision.pool_k+pool_fc2", "text.proj"])
def test_features_and_gradients_are_those_of_the_model(layout: str, targets: str) -> None:
    """A fast run of SigLIP would train another adapter than the slow one."""
    model = build(layout)
    cg.apply_lora(model, targets=targets, r=3, alpha=5)
    randomise_active(model, 0)
    clip = as_clip(model)
    encoder, (pixels, ids) = Encoder(clip), inputs()
    assert encoder.is_plain("text")
    assert encoder.is_plain("vision")
    found: list[list[Tensor]] = []
    for image, text in ((encoder.encode_image, encoder.encode_text), (clip.encode_image, clip.encode_text)):
        model.zero_grad()
        features = image(pixels), text(ids)
        loss_of(*features).backward()
        grads = [p.grad.clone() for p in require_lora(model).chosen().parameters() if p.grad is not None]
        found.append([*features, *grads])
    fast, slow = found
    assert len(fast) == len(slow) > 2
    assert all(close(got, wanted) for got, wanted in zip(fast, slow, strict=True))


@layouts
def test_a_whole_model_has_the_gradients_of_its_own_forward(layout: str) -> None:
    """Full fine-tuning by the engine would leave the probe, a norm or a fused bias as it was."""
    model = build(layout)
    clip, other = as_clip(model), as_clip(copy.deepcopy(model))
    encoder, (pixels, ids) = Encoder(clip), inputs()
    loss_of(encoder.encode_image(pixels), encoder.encode_text(ids)).backward()
    loss_of(other.encode_image(pixels), other.encode_text(ids)).backward()
    pairs = list(zip(model.named_parameters(), other.model.parameters(), strict=True))
    for (name, mine), theirs in pairs:
        assert (mine.grad is None) == (theirs.grad is None), name
        assert mine.grad is None or close(mine.grad, theirs.grad), name
    assert sum(mine.grad is not None for (_, mine), _ in pairs) > 40


@layouts
@pytest.mark.parametrize("tower", ["text", "vision"])
def test_rows_of_several_adapters(layout: str, tower: Tower) -> None:
    """A server would answer with another user's adapter, or with the base."""
    model = build(layout)
    clip = as_clip(model)
    for seed, (name, targets) in enumerate((("a", "all"), ("b", "attention"))):
        cg.apply_lora(model, targets=targets, r=3, name=name)
        randomise_active(model, seed)
    pixels, ids = inputs()
    rows = ids if tower == "text" else pixels
    encode = clip.encode_text if tower == "text" else clip.encode_image
    names = ["b", None, "a", "a", "b"]
    wanted = []
    with torch.no_grad():
        for row, name in zip(rows, names, strict=True):
            cg.set_adapter(clip, name)
            wanted.append(encode(row[None])[0])
    assert close(encode_rows(clip, tower, rows, names), torch.stack(wanted))


@layouts
def test_images_from_a_block_on(layout: str) -> None:
    """Cached inputs of a block would give other features than the images do."""
    clip = as_clip(build(layout))
    encoder, (pixels, _) = Encoder(clip), inputs()
    with torch.no_grad():
        x = encoder.encode_to_block(pixels, 1)
        assert x.shape[1:] == encoder.vision_shape == (SIZE * SIZE // 64, 32)
        assert close(encoder.encode_from_block(x, 1), clip.encode_image(pixels))


@layouts
def test_bf16_is_near(layout: str) -> None:
    """Autocast would lose more than rounding to bf16 does."""
    clip = as_clip(build(layout))
    encoder, (pixels, ids) = Encoder(clip, autocast=True), inputs()
    with torch.no_grad():
        fast = encoder.encode_image(pixels), encoder.encode_text(ids)
        slow = clip.encode_image(pixels), clip.encode_text(ids)
    for got, wanted in zip(fast, slow, strict=True):
        assert float(F.cosine_similarity(got, wanted).min()) > 0.999


def test_siglip2_keeps_its_own_image_tower() -> None:
    """Positions of one grid would be added to images of another."""
    torch.manual_seed(0)
    vision = {**_TOWER, "num_patches": 16, "patch_size": 8}
    model = randomise(Siglip2Model(Siglip2Config(text_config=_TEXT, vision_config=vision))).eval()
    clip, (pixels, ids) = as_clip(model), inputs()
    encoder = Encoder(clip)
    assert encoder.is_plain("text")
    assert not encoder.is_plain("vision")
    with torch.no_grad():
        assert close(encoder.encode_text(ids), clip.encode_text(ids))
        assert close(encoder.encode_image(pixels), clip.encode_image(pixels))


def test_other_options_of_timm_are_not_plain() -> None:
    """A tower with layer scale, a class token or norms of q and k would be computed without them."""
    for options in ({"init_values": 1e-5}, {"qk_norm": True}, {"class_token": True}, {"reg_tokens": 2}):
        model = build_tower("SigLIP")
        trunk = _trunk(options)
        model.visual.trunk = trunk
        assert not Encoder(as_clip(model)).is_plain("vision")


def _trunk(options: dict[str, object]) -> nn.Module:
    import timm

    sizes = {"img_size": SIZE, "patch_size": 8, "embed_dim": 32, "depth": 2, "num_heads": 2}
    return timm.create_model("vit_base_patch16_siglip_224", num_classes=0, **sizes, **options)
