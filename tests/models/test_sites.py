"""Sites name the same weights in every family and layout, and can be written down and read back."""

from __future__ import annotations

import copy

import open_clip
import pytest
import torch
from hypothesis import example, given
from hypothesis import strategies as st
from torch import nn

import clipgraft as cg
from clipgraft.models.clip import as_clip
from clipgraft.models.family import site_weight
from clipgraft.models.names import TWINS, path_site, site_path
from clipgraft.models.sites import BLOCK_ROLES, POOL_ROLES, ROLES, ROLES_IN_BLOCKS, TOWERS, Site
from tiny_models import TINY_OPENCLIP, in_every_layout, randomise

BLOCK_SITES = st.builds(Site, st.sampled_from(TOWERS), st.integers(0, 999), st.sampled_from(ROLES_IN_BLOCKS))
WHOLE_SITES = st.sampled_from(
    [
        Site("text", None, "token_embedding"),
        Site("vision", None, "patch_embedding"),
        *(Site(tower, None, role) for tower in TOWERS for role in ("position_embedding", "proj")),
        *(Site("vision", None, role) for role in (*POOL_ROLES, "proj_fc1", "proj_fc2")),
    ]
)
SITES = BLOCK_SITES | WHOLE_SITES


@given(SITES)
def test_sites_read_back(site: Site) -> None:
    """An adapter file names a site that cannot be read again."""
    assert Site.parse(str(site)) == site
    assert all(path_site(site_path(site, twin)) == site for twin in TWINS.values())


ALMOST = st.lists(
    st.sampled_from([*TOWERS, *ROLES, "0", "3", "03", "-1", "²", "٣", "", "x", "9" * 30]), max_size=4
).map(".".join)


@given(st.text(max_size=30) | ALMOST)
@example("text.03.q")
@example("text.².q")
@example(f"text.{'9' * 5000}.q")
def test_texts_that_are_no_sites(text: str) -> None:
    """A typing error in a target ends with a traceback, or names another site than it seems to."""
    try:
        site = Site.parse(text)
    except cg.errors.TargetError:
        return
    assert str(site) == text


PARTS = "text_model vision_model encoder layers 0 03 ² self_attn q_proj mlp fc1 embeddings text_projection x"
PATHS = st.lists(st.sampled_from([*PARTS.split(), "token_embedding", ""]), max_size=7).map(".".join)


@example("text_model.encoder.layers.03.mlp.fc1")
@example("text_model.encoder.layers.².mlp.fc1")
@example("3.mlp.fc1")
@given(PATHS | st.text(max_size=20) | SITES.map(lambda site: site_path(site).partition("layers.")[2]))
def test_paths_that_are_no_modules(path: str) -> None:
    """Weights of a foreign adapter file land in a module they were not written for."""
    try:
        site = path_site(path)
    except cg.errors.AdapterError:
        return
    assert site_path(site) == path


@given(st.lists(SITES, unique=True))
def test_order_follows_the_data(sites: list[Site]) -> None:
    """Reports list a tower's projection before its blocks, or block 10 before block 2."""
    ordered = sorted(sites, key=lambda site: site.order)
    for tower in TOWERS:
        blocks = [site.block for site in ordered if site.tower == tower and site.block is not None]
        assert blocks == sorted(blocks)
        roles = [site.role for site in ordered if site.tower == tower]
        ends = [role for role in roles if role.startswith(("pool", "proj"))]
        assert ends == roles[len(roles) - len(ends) :]
    assert [site.tower for site in ordered] == sorted(site.tower for site in sites)


def test_every_layout_has_the_same_sites(tiny_openclip: nn.Module, tiny_openclip_4x: nn.Module) -> None:
    """An adapter trained on open_clip does not fit the same model in transformers or the next open_clip."""
    blocks = [Site(tower, block, role) for tower in TOWERS for block in range(2) for role in BLOCK_ROLES]
    rest = [Site(tower, None, role) for tower in TOWERS for role in ("position_embedding", "proj")]
    rest += [Site("text", None, "token_embedding"), Site("vision", None, "patch_embedding")]
    expected = tuple(sorted([*blocks, *rest], key=lambda site: site.order))
    for layout, model in in_every_layout(tiny_openclip, tiny_openclip_4x).items():
        assert as_clip(model).sites == expected, layout


def test_every_layout_has_the_same_weights(tiny_openclip: nn.Module, tiny_openclip_4x: nn.Module) -> None:
    """A site is another weight in one library than in the other: k for q, or transposed."""
    layouts = in_every_layout(tiny_openclip, tiny_openclip_4x)
    twin = layouts["CLIPModel"]
    for layout, model in layouts.items():
        for site, ref in as_clip(model).site_refs.items():
            weight = site_weight(model, ref)
            assert tuple(weight.shape) == ref.shape, (layout, site)
            assert weight.equal(twin.get_submodule(site_path(site)).weight), (layout, site)


def test_conversion_of_this_test_is_right(tiny_openclip: nn.Module, tiny_openclip_4x: nn.Module) -> None:
    """The oracle of the tests above is wrong, and they prove nothing."""
    generator = torch.Generator().manual_seed(0)
    image = torch.randn(2, 3, 32, 32, generator=generator)
    tokens = torch.randint(1, 49000, (2, 77), generator=generator)
    tokens[:, 20] = 49407
    with torch.no_grad():
        images, texts = tiny_openclip.encode_image(image), tiny_openclip.encode_text(tokens)
        for layout, model in in_every_layout(tiny_openclip, tiny_openclip_4x).items():
            clip = as_clip(model)
            torch.testing.assert_close(clip.encode_image(image), images, atol=1e-4, rtol=1e-4, msg=layout)
            torch.testing.assert_close(clip.encode_text(tokens), texts, atol=1e-4, rtol=1e-4, msg=layout)


def test_site_weights_are_the_models_own(tiny_openclip: nn.Module, tiny_hf: nn.Module) -> None:
    """Merging writes into a copy, and the model stays as it was."""
    for model in (tiny_openclip, tiny_hf):
        clip = as_clip(model)
        with torch.no_grad():
            for ref in clip.site_refs.values():
                site_weight(model, ref).fill_(0.5)
        matrices = [p for name, p in model.named_parameters() if p.ndim > 1]
        assert len(matrices) >= 15
        assert all((p == 0.5).all() for p in matrices)


@pytest.mark.parametrize("r", [1, 5])
def test_lora_shapes_multiply_to_the_weight(
    tiny_openclip: nn.Module, tiny_openclip_4x: nn.Module, r: int
) -> None:
    """A and B of some site do not multiply to an update of its weight's shape."""
    for model in in_every_layout(tiny_openclip, tiny_openclip_4x).values():
        for ref in as_clip(model).site_refs.values():
            a, b = (torch.ones(shape) for shape in ref.lora_shapes(r))
            update = torch.einsum("r...,or->o...", a, b.flatten(1))
            if ref.kind in ("embedding", "table"):
                update = update.T
            assert tuple(update.shape) == ref.shape
            assert (update == r).all()


def test_towers_without_some_sites() -> None:
    """A ResNet tower, a model without projection or one with a biased one, cannot be opened at all."""
    config = copy.deepcopy(TINY_OPENCLIP)
    config["vision_cfg"] = {"image_size": 64, "layers": [1, 1, 1, 1], "width": 8}
    resnet = as_clip(open_clip.CLIP(**copy.deepcopy(config)))
    assert "vision.0.conv1" in map(str, resnet.sites)
    assert len(resnet.fingerprint) == 16
    config = {**copy.deepcopy(TINY_OPENCLIP), "embed_dim": 32}
    config["text_cfg"]["proj_type"] = "none"
    assert Site("text", None, "proj") not in as_clip(open_clip.CustomTextCLIP(**copy.deepcopy(config))).sites
    config["text_cfg"] = {**TINY_OPENCLIP["text_cfg"], "proj_bias": True}
    biased = randomise(open_clip.CLIP(**copy.deepcopy(config)))
    ref = as_clip(biased).site_refs[Site("text", None, "proj")]
    assert ref.kind == "linear"
    assert site_weight(biased, ref) is biased.text_projection.weight
