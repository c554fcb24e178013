"""SigLIP in transformers, open_clip and PEFT: one set of weights, one adapter, the same features."""

from __future__ import annotations

import copy
import itertools
import json
import logging
from pathlib import Path

import numpy as np
import pytest
import torch
from peft import LoraConfig, PeftModel, get_peft_model
from PIL import Image
from torch import Tensor, nn
from transformers import Siglip2ImageProcessor, SiglipImageProcessor

import clipgraft as cg
from clipgraft.models.clip import as_clip
from clipgraft.models.convert import to_open_clip
from clipgraft.models.names import is_module_of
from explicit_lora import largest, randomise_active, randomise_lora
from tiny_siglip import build_siglip, build_siglip2, hf_features, save_siglip, to_openclip
from weight_places import ids, pixels

pytestmark = pytest.mark.filterwarnings("ignore:.*gradient_checkpointing.*:FutureWarning")
IN_PEFT = "all,-vision.pool_q+pool_k+pool_v+pool_out"
MHA = "vision_model.head.attention."
_ROWS = {"pool_q": 0, "pool_k": 1, "pool_v": 2}


def features(model: nn.Module) -> tuple[Tensor, Tensor]:
    family = as_clip(model).family
    return family.encode_image(model, pixels()), family.encode_text(model, ids())


def bound(wanted: tuple[Tensor, ...]) -> float:
    return 3e-5 * max(1.0, *(t.abs().max().item() for t in wanted))


def explicit(base: nn.Module, updates: dict[str, tuple[Tensor, Tensor, float]]) -> nn.Module:
    """A copy of a transformers model with W + s·B·A in its weights; names written a second time."""
    model = copy.deepcopy(base)
    attention = {
        "q": "self_attn.q_proj",
        "k": "self_attn.k_proj",
        "v": "self_attn.v_proj",
        "out": "self_attn.out_proj",
    }
    with torch.no_grad():
        for site, (a, b, scale) in updates.items():
            tower, *block, role = site.split(".")
            stem, delta = f"{tower}_model.", scale * b.flatten(1) @ a.flatten(1)
            if role in _ROWS:
                weight = model.get_parameter(f"{MHA}in_proj_weight").chunk(3)[_ROWS[role]]
            elif role == "pool_out":
                weight = model.get_parameter(f"{MHA}out_proj.weight")
            elif role.startswith("pool_"):
                weight = model.get_parameter(f"vision_model.head.mlp.{role.removeprefix('pool_')}.weight")
            elif role == "proj":
                weight = model.get_parameter(f"{stem}head.weight")
            elif block:
                place = attention.get(role, f"mlp.{role}")
                weight = model.get_parameter(f"{stem}encoder.layers.{block[0]}.{place}.weight")
            else:
                weight = model.get_parameter(f"{stem}embeddings.{role}.weight")
                delta = delta.T if role in ("token_embedding", "position_embedding") else delta
            weight += delta.reshape(weight.shape)
    return model


def build_siglip2_of_one_size() -> nn.Module:
    """A `SiglipModel` as the SigLIP 2 checkpoints of one image size are: texts with the tanh form of GELU."""
    model = build_siglip()
    for layer in model.text_model.encoder.layers:
        layer.mlp.activation_fn = nn.GELU(approximate="tanh")
    return model


@pytest.mark.parametrize("build", [build_siglip, build_siglip2])
def test_every_site_of_transformers(build: object) -> None:
    """An adapter on a SigLIP of transformers computes something else than its weights say."""
    base = build()
    model = copy.deepcopy(base)
    cg.apply_lora(model, targets="all", r=3, alpha=5)
    updates = randomise_lora(model, size=0.1)
    assert len(updates) == 35
    wanted_model = explicit(base, updates)
    for train, grad in itertools.product((False, True), repeat=2):
        with torch.set_grad_enabled(grad):
            wanted = features(wanted_model.train(train))
            assert largest(features(model.train(train)), wanted) <= bound(wanted)
    with torch.no_grad():
        plain, alone = features(base), copy.deepcopy(base)
        for site in updates:
            cg.apply_lora(alone, targets=site, r=3, alpha=5)
            wanted = features(explicit(base, randomise_lora(alone, size=0.5)))
            assert largest(features(alone), wanted) <= bound(wanted), site
            assert largest(wanted, plain) > 1e-4, site
            cg.remove_lora(alone)


def test_both_libraries_hold_one_model() -> None:
    """The same SigLIP has another fingerprint, other sites or other features in the other library."""
    siglip = build_siglip()
    openclip = to_openclip(siglip)
    assert as_clip(siglip).fingerprint == as_clip(openclip).fingerprint
    assert as_clip(siglip).sites == as_clip(openclip).sites
    with torch.no_grad():
        wanted = hf_features(siglip, pixels(), ids())
        assert largest(features(openclip), wanted) <= bound(wanted)
        assert largest(features(siglip), wanted) == 0


@pytest.mark.parametrize(
    "options", [{}, {"use_dora": True}, {"bias": "all"}, {"variant": "vera", "targets": "linear"}]
)
@pytest.mark.parametrize("made_on", ["open_clip", "transformers"])
def test_an_adapter_works_in_the_other_library(
    made_on: str, options: dict[str, object], tmp_path: Path
) -> None:
    """An adapter of SigLIP that was trained with one library is useless, or another one, in the other."""
    siglip = build_siglip()
    bases = {"open_clip": to_openclip(siglip), "transformers": siglip}
    model, other = bases.pop(made_on), next(iter(bases.values()))
    cg.apply_lora(model, **{"targets": "all", "r": 3, **options})
    randomise_active(model)
    cg.load_adapter(other, cg.save_adapter(model, tmp_path))
    with torch.no_grad():
        wanted = features(model)
        assert largest(features(other), wanted) <= bound(wanted)


@pytest.mark.parametrize("build", [build_siglip, build_siglip2, build_siglip2_of_one_size])
@pytest.mark.parametrize("options", [{}, {"use_dora": True}, {"bias": "lora_only"}, {"use_rslora": True}])
def test_stock_peft_opens_the_folder(build: object, options: dict[str, object], tmp_path: Path) -> None:
    """`PeftModel.from_pretrained` cannot open a SigLIP adapter, or computes something else with it."""
    base = build()
    model = copy.deepcopy(base)
    targets = IN_PEFT + (",-vision.position_embedding" if build is build_siglip2 else "")
    cg.apply_lora(model, targets=targets, r=3, alpha=5, **options)
    randomise_active(model)
    cg.save_adapter(model, tmp_path)
    with torch.no_grad():
        wanted = features(model)
        peft = PeftModel.from_pretrained(copy.deepcopy(base), tmp_path)
        assert largest(features(peft.get_base_model()), wanted) <= bound(wanted)
        assert largest(features(base), wanted) > 1e-2


@pytest.mark.parametrize("build", [build_siglip, build_siglip2, build_siglip2_of_one_size])
@pytest.mark.parametrize("options", [{}, {"use_dora": True}, {"bias": "lora_only"}, {"use_rslora": True}])
def test_a_folder_of_peft_is_read(build: object, options: dict[str, object], tmp_path: Path) -> None:
    """An adapter that PEFT trained on a SigLIP or SigLIP 2 cannot be used, or comes back to PEFT changed."""
    base = build()
    names = ["q_proj", "v_proj", "self_attn.out_proj", "fc1", "text_model.head", "token_embedding"]
    names.append("patch_embedding")
    model = get_peft_model(
        copy.deepcopy(base), LoraConfig(r=4, lora_alpha=7, target_modules=names, **options)
    )
    randomise_active(model)
    model.save_pretrained(tmp_path / "theirs")
    ours = copy.deepcopy(base)
    cg.load_adapter(ours, tmp_path / "theirs")
    cg.save_adapter(ours, tmp_path / "ours")
    again = PeftModel.from_pretrained(copy.deepcopy(base), tmp_path / "ours")
    with torch.no_grad():
        wanted = features(model.get_base_model())
        assert largest(features(ours), wanted) <= bound(wanted)
        assert largest(features(again.get_base_model()), wanted) <= bound(wanted)
        assert largest(features(base), wanted) > 1e-2


@pytest.mark.parametrize(
    ("build", "ignored"),
    [(build_siglip, "vision.pool_out"), (build_siglip2, "vision.position_embedding")],
)
def test_where_peft_never_acts(
    build: object, ignored: str, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    """PEFT's update of a weight that SigLIP reads without its module acts after all where it is read."""
    base = build()
    names = ["text_model.head", "position_embedding", "out_proj"]
    model = get_peft_model(copy.deepcopy(base), LoraConfig(r=4, target_modules=names))
    model.save_pretrained(tmp_path / "new")
    cg.load_adapter(copy.deepcopy(base), tmp_path / "new")
    assert caplog.text == ""
    randomise_active(model)
    model.save_pretrained(tmp_path / "random")
    ours = copy.deepcopy(base)
    cg.load_adapter(ours, tmp_path / "random")
    assert f"PEFT's update of {ignored} never acted" in caplog.text
    with torch.no_grad():
        wanted = features(model.get_base_model())
        assert largest(features(ours), wanted) <= bound(wanted)


def test_an_adapter_of_peft_goes_to_open_clip(tmp_path: Path) -> None:
    """What PEFT trained on a fixed-size SigLIP 2 of transformers acts otherwise on the same in open_clip."""
    base = build_siglip2_of_one_size()
    names = ["q_proj", "k_proj", "fc2", "text_model.head", "vision_model.embeddings.patch_embedding"]
    model = get_peft_model(copy.deepcopy(base), LoraConfig(r=4, target_modules=names))
    randomise_active(model)
    model.save_pretrained(tmp_path)
    other = to_open_clip(as_clip(base)).model
    cg.load_adapter(other, tmp_path)
    with torch.no_grad():
        wanted = features(model.get_base_model())
        assert largest(features(other), wanted) <= bound(wanted)


def test_peft_refuses_what_it_cannot_hold(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    """PEFT opens an adapter of the pooling attention, leaves that out and says nothing."""
    base = build_siglip()
    model = copy.deepcopy(base)
    cg.apply_lora(model, targets="vision.pool_q+pool_out,text-attention", r=3)
    with caplog.at_level(logging.WARNING, "clipgraft"):
        cg.save_adapter(model, tmp_path)
    assert "stock PEFT" in caplog.text
    assert "vision.pool_q, vision.pool_out" in caplog.text
    assert json.loads((tmp_path / "adapter_config.json").read_text())["peft_type"] == "CLIPGRAFT_LORA"
    with pytest.raises((KeyError, ValueError, TypeError)):
        PeftModel.from_pretrained(copy.deepcopy(base), tmp_path)


def test_what_peft_can_hold() -> None:
    """A site is announced to PEFT whose update it would ignore, or one that it could hold is kept from it."""
    for build in (build_siglip, build_siglip2):
        clip = as_clip(build())
        twin = clip.family.twin(clip.model)
        names = {str(site) for site in clip.sites if not is_module_of(site, twin)}
        read = {"vision.position_embedding"} if build is build_siglip2 else set()
        assert names == {f"vision.pool_{role}" for role in ("q", "k", "v", "out")} | read


@pytest.mark.parametrize("build", [build_siglip, build_siglip2])
def test_merging(build: object) -> None:
    """A merged SigLIP computes something else than the adapted one."""
    model = build()
    cg.apply_lora(model, targets="all", r=3, use_dora=True, bias="all")
    randomise_active(model)
    with torch.no_grad():
        wanted = features(model)
        cg.merge_lora(model)
        assert largest(features(model), wanted) <= bound(wanted)


def picture(width: int = 50, height: int = 37) -> Image.Image:
    rng = np.random.default_rng(0)
    return Image.fromarray(rng.integers(0, 255, (height, width, 3), dtype=np.uint8))


def test_loading_siglip(tmp_path: Path) -> None:
    """A SigLIP folder of transformers cannot be loaded, or its texts are not padded as it was trained."""
    base = build_siglip()
    processor = SiglipImageProcessor(size={"height": 32, "width": 32})
    clip = cg.load(save_siglip(base, tmp_path / "siglip", processor))
    tokens = clip.tokenize(["w1 w2", "w3 w4 w5"])
    assert tokens.shape == (2, 16)
    assert tokens[0].tolist() == [3, 4, *[1] * 14]
    pixel_values = processor(picture(), return_tensors="pt")["pixel_values"]
    with torch.no_grad():
        wanted = hf_features(base, pixel_values, tokens)
        ours = clip.encode_image(picture()), clip.encode_text(["w1 w2", "w3 w4 w5"])
    assert largest(ours, wanted) <= 1e-6


def test_loading_siglip2_with_images_of_any_shape(tmp_path: Path) -> None:
    """Images of SigLIP 2 lose their shape or their mask on the way through batches."""
    base = build_siglip2()
    processor = Siglip2ImageProcessor(patch_size=8, max_num_patches=16)
    clip = cg.load(save_siglip(base, tmp_path / "siglip2", processor))
    pictures = [picture(), picture(20, 60), picture(40, 40)]
    inputs = processor(pictures, return_tensors="pt")
    with torch.no_grad():
        wanted = base.get_image_features(**inputs).pooler_output
        assert largest((clip.encode_image(pictures),), (wanted,)) <= 1e-5
        clip.model.bfloat16()
        base.bfloat16()
        for one in pictures:  # alone, as a batch is resized with other roundings
            rounded = base.get_image_features(**processor([one], return_tensors="pt")).pooler_output
            assert clip.encode_image(one).equal(rounded)


def test_siglip2_takes_square_pixels_too() -> None:
    """Pixels of a fixed size, which every other model takes, end in an error of shapes."""
    base = build_siglip2()
    processor = Siglip2ImageProcessor(patch_size=8, max_num_patches=16, do_resize=False)
    square = picture(32, 32)
    inputs = processor(square, return_tensors="pt")
    values = torch.from_numpy(np.asarray(square, dtype=np.float32) / 127.5 - 1).permute(2, 0, 1)[None]
    with torch.no_grad():
        wanted = base.get_image_features(**inputs).pooler_output
        assert largest((as_clip(base).encode_image(values),), (wanted,)) <= 1e-5
    with pytest.raises(cg.errors.DataError, match="multiples of its patches of 8"):
        as_clip(base).encode_image(torch.zeros(1, 3, 30, 32))
