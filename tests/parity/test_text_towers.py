"""Adapters on towers of transformers and of the user's own against models whose weights are W + s·B·A."""

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
from clipgraft.lora.state import require_lora
from clipgraft.models.clip import as_clip
from explicit_lora import bound, largest, randomise_active, randomise_lora
from tiny_dual import BUILDERS, LONE, PAIRS, WEIGHTS, build, ids_of, padding_of, stock_features
from weight_places import Update, explicit_model, explicit_weights, pixels

ALL = "all"
_MASKED = [name for name in PAIRS if name != "CLIP and CLIP"]
# torch's kernel for attention with weights folded into it rounds otherwise than that without.
_LOOSE = 3e-5


@pytest.fixture(scope="module", params=list(BUILDERS))
def name(request: pytest.FixtureRequest) -> str:
    return str(request.param)


@pytest.fixture(scope="module")
def base(name: str) -> nn.Module:
    return build(name)


def features(model: nn.Module, name: str) -> tuple[Tensor, ...]:
    """What clipgraft makes of the towers that the model has."""
    clip = as_clip(model)
    towers = []
    if name in PAIRS or "Vision" in name:
        towers.append(clip.encode_image(pixels()))
    if name in PAIRS or "Text" in name:
        towers.append(clip.encode_text(ids_of(name)))
    return tuple(towers)


def frozen(model: nn.Module, name: str) -> tuple[Tensor, ...]:
    with torch.no_grad():
        return features(model, name)


def adapted(base: nn.Module, **options: object) -> tuple[nn.Module, dict[str, Update]]:
    model = copy.deepcopy(base)
    cg.apply_lora(model, **{"r": 3, "alpha": 5, "targets": ALL, **options})
    return model, randomise_lora(model, size=0.1)


def test_sites_are_those_of_the_hand_written_table(name: str, base: nn.Module) -> None:
    """A site is missing, or a place that is none is offered."""
    assert {str(site) for site in as_clip(base).sites} == set(WEIGHTS[name])


def test_base_is_encoded_as_by_its_own_functions(name: str, base: nn.Module) -> None:
    """Texts are read with their padding, or cut where that changes them; or other outputs are pooled."""
    with torch.no_grad():
        wanted = stock_features(base, name)
    assert largest(frozen(base, name), wanted) <= bound(wanted)


def test_forward_of_all_sites(name: str, base: nn.Module) -> None:
    """An adapter computes something else than its weights say, in training or in use."""
    model, updates = adapted(base)
    explicit = explicit_model(base, WEIGHTS[name], updates)
    for train, grad in itertools.product((False, True), repeat=2):
        ours, theirs = copy.deepcopy(model).train(train), copy.deepcopy(explicit).train(train)
        with torch.set_grad_enabled(grad):
            wanted = stock_features(theirs, name)
            assert largest(features(ours, name), wanted) <= bound(wanted, _LOOSE)


def test_every_site_acts_alone(name: str, base: nn.Module) -> None:
    """The update of a site is ignored: the module that it hangs on is never called."""
    plain, model = frozen(base, name), copy.deepcopy(base)
    for site in WEIGHTS[name]:
        cg.apply_lora(model, r=3, alpha=5, targets=site)
        updates = randomise_lora(model, size=0.1)
        with torch.no_grad():
            wanted = stock_features(explicit_model(base, WEIGHTS[name], updates), name)
        assert largest(frozen(model, name), wanted) <= bound(wanted, _LOOSE), site
        assert largest(wanted, plain) > 1e-5, site
        cg.remove_lora(model)


def test_gradients_of_all_sites(name: str, base: nn.Module) -> None:
    """Training moves an adapter into a wrong direction, or not at all."""
    model, updates = adapted(base)
    _loss(features(model, name)).backward()
    leaves = {site: (a.requires_grad_(), b.requires_grad_(), s) for site, (a, b, s) in updates.items()}
    _loss(_explicit_features(base, name, explicit_weights(base, WEIGHTS[name], leaves))).backward()
    for site, layer in require_lora(model).layers.items():
        wanted = tuple(leaf.grad for leaf in leaves[str(site)][:2])
        assert largest((layer.lora_A.grad, layer.lora_B.grad), wanted) <= bound(wanted, _LOOSE), site


def _loss(outputs: tuple[Tensor, ...]) -> Tensor:
    return sum((t.flatten() * torch.linspace(-1, 1, t.numel())).sum() for t in outputs)


def _explicit_features(base: nn.Module, name: str, weights: Mapping[str, Tensor]) -> tuple[Tensor, ...]:
    named = {f"model.{key}": weight for key, weight in weights.items()}
    found: tuple[Tensor, ...] = functional_call(_Stock(base, name), named, ())
    return found


class _Stock(nn.Module):
    """Make encoding a forward, as `functional_call` replaces weights only during a forward."""

    def __init__(self, model: nn.Module, name: str) -> None:
        super().__init__()
        self.model, self.name = model, name

    def forward(self) -> tuple[Tensor, ...]:
        return stock_features(self.model, self.name)


OPTIONS = [{}, {"use_dora": True}, {"bias": "all"}, {"use_dora": True, "bias": "lora_only"}]


@pytest.mark.parametrize("options", OPTIONS)
def test_merging_is_exact_and_undone(name: str, base: nn.Module, options: dict[str, object]) -> None:
    """A merged model computes something else than the adapted one, or unmerging leaves other weights."""
    model, _ = adapted(base, **options)
    randomise_active(model)
    wanted, before = frozen(model, name), copy.deepcopy(model.state_dict())
    cg.merge_lora(model)
    assert largest(frozen(model, name), wanted) <= bound(wanted, _LOOSE)
    cg.unmerge_lora(model)
    assert all(tensor.equal(before[key]) for key, tensor in model.state_dict().items())


def test_removing_leaves_the_base(name: str, base: nn.Module) -> None:
    """After remove_lora the model is not the base any more: other weights, names or features."""
    model, _ = adapted(base, bias="all")
    cg.remove_lora(model)
    assert list(model.state_dict()) == list(base.state_dict())
    assert all(map(torch.equal, frozen(model, name), frozen(base, name)))


@pytest.mark.parametrize("options", OPTIONS[:3])
def test_files_hold_every_site(
    name: str, base: nn.Module, options: dict[str, object], tmp_path: Path
) -> None:
    """A saved adapter comes back as another one, or not at all."""
    model, _ = adapted(base, **options)
    randomise_active(model)
    other = copy.deepcopy(base)
    cg.load_adapter(other, cg.save_adapter(model, tmp_path))
    wanted = frozen(model, name)
    assert largest(frozen(other, name), wanted) <= bound(wanted)


def test_files_are_read_and_written_without_the_base(name: str, base: nn.Module, tmp_path: Path) -> None:
    """A tool that reads an adapter alone finds other sites in it, or writes it so that its base cannot."""
    model, _ = adapted(base, bias="all")
    randomise_active(model)
    file = cg.read_adapter(cg.save_adapter(model, tmp_path / "one"))
    assert {str(site) for site in file.sites} == set(WEIGHTS[name])
    cg.adapters.write_any(file, tmp_path / "two", "peft")
    other = copy.deepcopy(base)
    cg.load_adapter(other, tmp_path / "two")
    wanted = frozen(model, name)
    assert largest(frozen(other, name), wanted) <= bound(wanted)


def test_disabled_is_the_base_to_the_bit(name: str, base: nn.Module) -> None:
    """A disabled adapter, or a new one, changes the base's features."""
    model = copy.deepcopy(base)
    cg.apply_lora(model, targets=ALL, r=3)
    wanted = frozen(base, name)
    assert largest(frozen(model, name), wanted) <= bound(wanted)
    with cg.lora_disabled(model):
        assert all(map(torch.equal, frozen(model, name), wanted))


def test_rows_run_with_adapters_of_their_own(name: str, base: nn.Module) -> None:
    """A batch with an adapter for each row mixes them up."""
    model, _ = adapted(base)
    clip, names = cg.Clip.over(as_clip(model)), ["default", None, "default"]
    encode, inputs = clip.encode_text, ids_of(name)
    if name in LONE and "Vision" in name:
        encode, inputs = clip.encode_image, pixels()
    mixed = encode(inputs, adapters=names)
    tuned, plain = frozen(model, name)[-1], frozen(base, name)[-1]
    wanted = torch.stack([tuned[0], plain[1], tuned[2]])
    assert largest((mixed,), (wanted,)) <= bound((wanted,))


@pytest.mark.parametrize("name", [*PAIRS, "CLIPTextModel", "CLIPTextModelWithProjection"])
def test_cut_texts_give_what_whole_ones_do(name: str) -> None:
    """Cutting the padding off a batch changes the features of its texts."""
    model = build(name)
    clip, tokens = as_clip(model), ids_of(name)
    cut = clip.cut_tokens(tokens)
    assert cut.shape[1] == 11  # the longest row ends at position 10
    with torch.no_grad():
        whole = clip.family.encode_text(model, tokens)
        assert largest((clip.family.encode_text(model, cut),), (whole,)) <= bound((whole,))


@pytest.mark.parametrize("name", _MASKED)
def test_padding_is_no_word(name: str) -> None:
    """A text's features depend on how much padding stands behind it, as the mask is missing or wrong."""
    model, tokens = build(name), ids_of(name)
    clip, row = as_clip(model), tokens[:1, :7]
    longer = torch.nn.functional.pad(row, (0, 9), value=padding_of(name))
    words = torch.nn.functional.pad(row, (0, 9), value=42)
    with torch.no_grad():
        alone, padded, other = (clip.family.encode_text(model, t) for t in (row, longer, words))
    assert largest((alone,), (padded,)) <= bound((alone,))
    assert largest((alone,), (other,)) > 1e-3


@pytest.mark.parametrize("name", _MASKED)
def test_texts_of_padding_alone_are_left_whole(name: str) -> None:
    """An empty text is cut to one token, which changes what the tower makes of it."""
    empty = torch.full((1, 8), padding_of(name))
    clip = as_clip(build(name))
    assert clip.cut_tokens(empty).shape == (1, 8)
