"""Every site role of both families against a model whose weights are W + s·B·A."""

from __future__ import annotations

import copy
import itertools

import open_clip
import pytest
import torch
from torch import Tensor, nn

import clipgraft as cg
from clipgraft.lora.state import require_lora
from clipgraft.models.clip import as_clip
from explicit_lora import (
    ROLES,
    custom_text,
    explicit_model,
    explicit_run,
    features,
    inputs,
    largest,
    loss_of,
    randomise_lora,
    target,
)
from tiny_models import TINY_OPENCLIP, randomise

LAYOUTS = ("tiny_openclip", "tiny_openclip_4x", "tiny_hf")
TEXT_LAYOUTS = ("custom_text", "linear_text_projection")


@pytest.fixture
def base(request: pytest.FixtureRequest) -> nn.Module:
    """The model of the layout that the test is parametrised with."""
    if request.param in LAYOUTS:
        return request.getfixturevalue(request.param)
    options = {"proj_type": "linear"} if request.param == "linear_text_projection" else {}
    return randomise(custom_text(TINY_OPENCLIP, **options)).eval()


def tolerance(wanted: tuple[Tensor, ...]) -> float:
    """A few roundings of fp32 at the size of the features."""
    return 2e-5 * max(1.0, *(t.abs().max().item() for t in wanted))


def adapted(base: nn.Module, targets: str, **options: object) -> tuple[nn.Module, dict]:
    """A copy of the base with random updates, and those updates."""
    model = copy.deepcopy(base)
    cg.apply_lora(model, targets=targets, **{"r": 3, "alpha": 5, **options})
    return model, randomise_lora(model)


def gradients(model: nn.Module, pixels: Tensor, ids: Tensor) -> dict[str, tuple[Tensor, Tensor]]:
    loss_of(features(model, pixels, ids)).backward()
    return collected(model)


def collected(model: nn.Module) -> dict[str, tuple[Tensor, Tensor]]:
    layers = require_lora(model).layers
    return {str(site): (layer.lora_A.grad, layer.lora_B.grad) for site, layer in layers.items()}


def explicit_gradients(
    base: nn.Module, updates: dict, pixels: Tensor, ids: Tensor
) -> dict[str, tuple[Tensor, Tensor]]:
    leaves = {site: (a.requires_grad_(), b.requires_grad_(), s) for site, (a, b, s) in updates.items()}
    loss_of(explicit_run(base, leaves, lambda model: features(model, pixels, ids))).backward()
    return {site: (a.grad, b.grad) for site, (a, b, _) in leaves.items()}


@pytest.mark.parametrize("role", ROLES)
@pytest.mark.parametrize("base", LAYOUTS, indirect=True)
def test_forward_of_every_role(base: nn.Module, role: str) -> None:
    """An adapter on that role computes something else than its weights say, in training or in use."""
    model, updates = adapted(base, target(role))
    pixels, ids = inputs(base)
    explicit = explicit_model(base, updates)
    for train, grad in itertools.product((False, True), repeat=2):
        model.train(train)
        explicit.train(train)
        with torch.set_grad_enabled(grad):
            ours, wanted = features(model, pixels, ids), features(explicit, pixels, ids)
            plain = features(base, pixels, ids)
        assert largest(ours, wanted) <= tolerance(wanted)
        assert largest(plain, wanted) > 1e-2  # or the test could not fail


@pytest.mark.parametrize("role", ROLES)
@pytest.mark.parametrize("base", LAYOUTS, indirect=True)
def test_gradients_of_every_role(base: nn.Module, role: str) -> None:
    """Training moves an adapter on that role into a wrong direction, or not at all."""
    model, updates = adapted(base, target(role))
    pixels, ids = inputs(base)
    ours = gradients(model, pixels, ids)
    wanted = explicit_gradients(base, updates, pixels, ids)
    assert set(ours) == set(wanted)
    for site, pair in wanted.items():
        assert max(t.abs().max().item() for t in pair) > 1e-4
        assert largest(ours[site], pair) <= tolerance(pair)


@pytest.mark.parametrize("base", LAYOUTS + TEXT_LAYOUTS, indirect=True)
def test_all_roles_at_once(base: nn.Module) -> None:
    """Updates of several sites disturb each other, or per-site ranks and alphas go to the wrong site."""
    model, updates = adapted(
        base,
        "all",
        rank_pattern={"text.0.*": 1, "vision.-1.q+v": 6},
        alpha_pattern={"vision.*": 2, "text.proj": 9},
        use_rslora=True,
    )
    ranks = {site: a.shape[0] for site, (a, _, _) in updates.items()}
    assert (ranks["text.0.fc1"], ranks["vision.1.v"], ranks["vision.1.k"]) == (1, 6, 3)
    assert updates["vision.1.v"][2] == pytest.approx(2 / 6**0.5)
    assert updates["text.proj"][2] == pytest.approx(9 / 3**0.5)
    assert updates["text.0.fc1"][2] == pytest.approx(5)
    pixels, ids = inputs(base)
    with torch.no_grad():
        wanted = features(explicit_model(base, updates), pixels, ids)
        assert largest(features(model, pixels, ids), wanted) <= tolerance(wanted)
    ours, expected = gradients(model, pixels, ids), explicit_gradients(base, updates, pixels, ids)
    for site, pair in expected.items():
        assert largest(ours[site], pair) <= tolerance(pair), site


@pytest.mark.parametrize("roles", ["q", "k", "v", "q+k", "q+v", "k+v", "q+k+v", "q+out", "v+out", "out"])
@pytest.mark.parametrize("layout", ["tiny_openclip", "tiny_openclip_4x"])
def test_any_subset_of_the_fused_weight(layout: str, roles: str, request: pytest.FixtureRequest) -> None:
    """An update of q lands on k or v, which share one weight, or leaks onto one that was not asked for."""
    base = request.getfixturevalue(layout)
    model, updates = adapted(base, f"*.*.{roles}")
    assert {site.split(".")[-1] for site in updates} == set(roles.split("+"))
    pixels, ids = inputs(base)
    for grad in (False, True):
        with torch.set_grad_enabled(grad):
            wanted = features(explicit_model(base, updates), pixels, ids)
            assert largest(features(model, pixels, ids), wanted) <= tolerance(wanted)


def test_odd_number_of_heads() -> None:
    """A model with an odd number of heads, which torch's fused kernel refuses, computes something else."""
    config = copy.deepcopy(TINY_OPENCLIP)
    config["vision_cfg"].update(width=48)
    config["text_cfg"].update(width=48, heads=3)
    torch.manual_seed(0)
    base = randomise(open_clip.CLIP(**config)).eval()
    model, updates = adapted(base, "attention")
    pixels, ids = inputs(base)
    for grad in (False, True):
        with torch.set_grad_enabled(grad):
            wanted = features(explicit_model(base, updates), pixels, ids)
            assert largest(features(model, pixels, ids), wanted) <= tolerance(wanted)


def mean_error(ours: tuple[Tensor, ...], wanted: tuple[Tensor, ...]) -> float:
    return sum((a.float() - b.float()).abs().mean().item() for a, b in zip(ours, wanted, strict=True))


@pytest.mark.parametrize("grad", [False, True])
@pytest.mark.parametrize("layout", LAYOUTS)
def test_bf16_base(layout: str, grad: bool, request: pytest.FixtureRequest) -> None:
    """On a base kept in bf16 the adapter is rounded away, or its own weights stop being fp32."""
    base = request.getfixturevalue(layout).bfloat16()
    model, updates = adapted(base, "all")
    assert {p.dtype for layer in require_lora(model).layers.values() for p in layer.parameters()} == {
        torch.float32
    }
    pixels, ids = inputs(base)
    explicit = explicit_model(base, updates)
    with torch.set_grad_enabled(grad):
        ours, wanted = features(model, pixels, ids), features(explicit, pixels, ids)
        rounded = features(explicit.bfloat16(), pixels, ids)
    assert {t.dtype for t in ours} == {torch.bfloat16}
    assert mean_error(ours, wanted) <= 2 * mean_error(rounded, wanted)


@pytest.mark.parametrize("grad", [False, True])
@pytest.mark.parametrize("layout", LAYOUTS)
def test_autocast(layout: str, grad: bool, request: pytest.FixtureRequest) -> None:
    """Mixed-precision training of an adapter fails on a type mismatch or drifts away from fp32."""
    base = request.getfixturevalue(layout)
    model, updates = adapted(base, "all")
    pixels, ids = inputs(base)
    explicit = explicit_model(base, updates)
    with torch.set_grad_enabled(grad):
        wanted = features(explicit, pixels, ids)
        with torch.autocast("cpu", dtype=torch.bfloat16):
            ours, rounded = features(model, pixels, ids), features(explicit, pixels, ids)
    assert mean_error(ours, wanted) <= 3 * mean_error(rounded, wanted) + 1e-4
    if grad:
        loss_of(ours).backward()
        found = collected(model)
        expected = explicit_gradients(base, updates, pixels, ids)
        for site, pair in expected.items():
            cosine = torch.cosine_similarity(found[site][1].flatten(), pair[1].flatten(), dim=0)
            assert cosine > 0.95, site
            assert found[site][0].dtype == torch.float32


@pytest.mark.parametrize("layout", LAYOUTS)
@pytest.mark.filterwarnings("ignore:.*gradient_checkpointing_.*:FutureWarning")
def test_gradient_checkpointing_changes_nothing(layout: str, request: pytest.FixtureRequest) -> None:
    """With --grad-checkpointing, dropout is drawn anew in the recomputation and gradients are wrong."""
    base = request.getfixturevalue(layout)
    model, _ = adapted(base, "all", dropout=0.3)
    model.train()
    pixels, ids = inputs(base)
    found = []
    for enabled in (False, True):
        as_clip(model).family.set_grad_checkpointing(model, enabled)
        model.zero_grad()
        torch.manual_seed(3)
        found.append(gradients(model, pixels, ids))
    for site, pair in found[0].items():
        assert largest(pair, found[1][site]) == 0, site
