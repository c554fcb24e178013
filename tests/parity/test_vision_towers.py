"""Adapters on vision towers of timm and of open_clip's own against models whose weights are W + s·B·A."""

from __future__ import annotations

import copy
import itertools
from collections.abc import Mapping
from pathlib import Path

import pytest
import torch
from torch import Tensor, nn
from torch.func import functional_call

import clipgraft as cg
from clipgraft.lora.initialization import start_from_data
from clipgraft.lora.state import require_lora
from clipgraft.models.clip import as_clip
from explicit_lora import largest, randomise_active, randomise_lora
from tiny_towers import WEIGHTS, build_tower
from weight_places import Update, explicit_model, explicit_weights, ids, pixels

FAMILIES = sorted(WEIGHTS)
VISION = "vision.*.*,vision.*"


@pytest.fixture(scope="module", params=FAMILIES)
def family(request: pytest.FixtureRequest) -> str:
    return str(request.param)


@pytest.fixture(scope="module")
def base(family: str) -> nn.Module:
    return build_tower(family)


def image_features(model: nn.Module) -> Tensor:
    family = as_clip(model).family
    features: Tensor = family.encode_image(model, pixels(family.image_size(model)[0]))
    return features


def adapted(base: nn.Module, **options: object) -> tuple[nn.Module, dict[str, Update]]:
    model = copy.deepcopy(base)
    cg.apply_lora(model, **{"r": 3, "alpha": 5, "targets": VISION, **options})
    return model, randomise_lora(model, size=0.1)


def bound(wanted: Tensor) -> float:
    return 3e-5 * max(1.0, wanted.abs().max().item())


def test_sites_are_those_of_the_hand_written_table(family: str, base: nn.Module) -> None:
    """A site of the tower is missing, or a place that is none is offered."""
    found = {str(site) for site in as_clip(base).sites if site.tower == "vision"}
    assert found == set(WEIGHTS[family])


def test_forward_of_all_sites(family: str, base: nn.Module) -> None:
    """An adapter on the tower computes something else than its weights say, in training or in use."""
    model, updates = adapted(base)
    explicit = explicit_model(base, WEIGHTS[family], updates)
    for train, grad in itertools.product((False, True), repeat=2):
        ours, theirs = copy.deepcopy(model).train(train), copy.deepcopy(explicit).train(train)
        for module in theirs.modules():
            if isinstance(module, nn.BatchNorm2d):
                module.eval()  # as an adapter does not hold other averages than the base's
        with torch.set_grad_enabled(grad):
            torch.manual_seed(0)  # timm drops out parts of its tables of relative positions
            wanted = image_features(theirs)
            torch.manual_seed(0)
            assert largest((image_features(ours),), (wanted,)) <= bound(wanted)


def test_training_leaves_the_base_alone(base: nn.Module) -> None:
    """Batch norms take over averages of the training data, which no adapter file holds."""
    model, _ = adapted(base)
    image_features(model.train()).sum().backward()
    changed = dict(model.named_buffers())
    assert all(buffer.equal(changed[name]) for name, buffer in base.named_buffers())
    cg.remove_lora(model)
    assert all(module.training for module in model.modules())


def test_every_site_acts_alone(family: str, base: nn.Module) -> None:
    """The update of a site is ignored: the module that it hangs on is never called."""
    plain, model = image_features(base).detach(), copy.deepcopy(base)
    for site in WEIGHTS[family]:
        cg.apply_lora(model, r=3, alpha=5, targets=site)
        updates = randomise_lora(model, size=0.5)
        with torch.no_grad():
            ours = image_features(model)
            wanted = image_features(explicit_model(base, WEIGHTS[family], updates))
        assert largest((ours,), (wanted,)) <= bound(wanted), site
        assert largest((wanted,), (plain,)) > 1e-5, site
        cg.remove_lora(model)


def test_gradients_of_all_sites(family: str, base: nn.Module) -> None:
    """Training moves an adapter on the tower into a wrong direction, or not at all."""
    model, updates = adapted(base)
    weights = torch.linspace(-1, 1, image_features(base).numel())
    (image_features(model).flatten() * weights).sum().backward()
    leaves = {site: (a.requires_grad_(), b.requires_grad_(), s) for site, (a, b, s) in updates.items()}
    wanted = _explicit_features(base, explicit_weights(base, WEIGHTS[family], leaves))
    (wanted.flatten() * weights).sum().backward()
    for site, layer in require_lora(model).layers.items():
        a, b, _ = leaves[str(site)]
        pair = (a.grad, b.grad)
        assert largest((layer.lora_A.grad, layer.lora_B.grad), pair) <= bound(
            torch.cat([t.flatten() for t in pair])
        )


def _explicit_features(base: nn.Module, weights: Mapping[str, Tensor]) -> Tensor:
    named = {f"model.{name}": weight for name, weight in weights.items()}
    found: Tensor = functional_call(_Images(base), named, ())
    return found


class _Images(nn.Module):
    """Make encoding a forward, as `functional_call` replaces weights only during a forward."""

    def __init__(self, model: nn.Module) -> None:
        super().__init__()
        self.model = model

    def forward(self) -> Tensor:
        return image_features(self.model)


@pytest.mark.parametrize(
    "options", [{}, {"use_dora": True}, {"bias": "all"}, {"use_dora": True, "bias": "lora_only"}]
)
def test_merging_is_exact_and_undone(base: nn.Module, options: dict[str, object]) -> None:
    """A merged model computes something else than the adapted one, or unmerging leaves other weights."""
    model, _ = adapted(base, **options)
    randomise_active(model)
    wanted, before = image_features(model).detach(), copy.deepcopy(model.state_dict())
    cg.merge_lora(model)
    merged = image_features(model).detach()
    assert largest((merged,), (wanted,)) <= bound(wanted)
    cg.unmerge_lora(model)
    assert [name for name, tensor in model.state_dict().items() if not tensor.equal(before[name])] == []


def test_removing_leaves_the_base(base: nn.Module) -> None:
    """After remove_lora the model is not the base any more: other weights, names or features."""
    model, _ = adapted(base, bias="all")
    cg.remove_lora(model)
    assert list(model.state_dict()) == list(base.state_dict())
    assert image_features(model).equal(image_features(base))


@pytest.mark.parametrize("options", [{}, {"use_dora": True}, {"bias": "all"}])
def test_files_hold_every_site(base: nn.Module, options: dict[str, object], tmp_path: Path) -> None:
    """A saved adapter comes back as another one, or not at all."""
    model, _ = adapted(base, **options)
    randomise_active(model)
    other = copy.deepcopy(base)
    cg.load_adapter(other, cg.save_adapter(model, tmp_path))
    wanted = image_features(model)
    assert largest((image_features(other),), (wanted,)) <= 1e-6 * max(1.0, wanted.abs().max().item())


def test_disabled_is_the_base_to_the_bit(base: nn.Module) -> None:
    """A disabled adapter, or a new one, changes the base's features."""
    model = copy.deepcopy(base)
    cg.apply_lora(model, targets=VISION, r=3)
    # torch multiplies by a weight that wants gradients in another way, which rounds differently.
    frozen = copy.deepcopy(base).requires_grad_(False)
    with torch.no_grad():
        assert largest((image_features(model),), (image_features(frozen),)) <= 1e-6
        with cg.lora_disabled(model):
            assert image_features(model).equal(image_features(frozen))


def test_texts_are_encoded(base: nn.Module) -> None:
    """The text tower beside such a vision tower cannot be adapted, or is cut where it sees its padding."""
    model = copy.deepcopy(base)
    cg.apply_lora(model, targets="text-attention", r=3)
    with torch.no_grad():
        wanted = base.encode_text(ids())
        assert largest((as_clip(model).encode_text(ids()),), (wanted,)) <= 1e-5


def test_starts_on_the_base_and_on_data(base: nn.Module) -> None:
    """An initialization of the factors fails on these towers, or moves the model before it trains."""
    with torch.no_grad():
        plain = image_features(base)
        for init in ("pissa", "eva"):
            model = copy.deepcopy(base)
            cg.apply_lora(model, targets=VISION, r=2, init=init)
            if init == "eva":
                assert start_from_data(model, lambda model=model: image_features(model)) > 0
                model.eval()
            assert largest((image_features(model),), (plain,)) <= bound(plain), init


def test_base_in_bf16(base: nn.Module, family: str) -> None:
    """On a base in bf16 an adapter ends in an error of types, or is rounded away."""
    model, updates = adapted(copy.deepcopy(base).bfloat16())
    wanted = as_clip(explicit_model(base, WEIGHTS[family], updates).bfloat16())
    with torch.no_grad():
        size = wanted.family.image_size(wanted.model)[0]
        ours = as_clip(model).encode_image(pixels(size)).float()
        rounded = wanted.encode_image(pixels(size)).float()
    assert torch.cosine_similarity(ours, rounded).min() > 0.98
