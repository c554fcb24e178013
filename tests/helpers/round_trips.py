"""Take adapters of small models through a file, stock PEFT and merging, and say which models they stand for.

A small tower stands for every tower that is built alike (`Kind`): an adapter meets the same kinds of weights,
under the same names, in both.
"""

from __future__ import annotations

import copy
import re
import tempfile
import warnings
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from functools import cache
from typing import Any

import open_clip
import torch
from peft import PeftModel
from torch import Tensor, nn

import clipgraft as cg
import tiny_dual
import tiny_towers
from clipgraft.models.clip import Clip, as_clip
from clipgraft.models.convert import to_transformers
from clipgraft.models.names import is_module_of
from clipgraft.models.sites import TOWERS, Site, SiteKind, SiteRef, Tower
from explicit_lora import custom_text, randomise_lora
from tiny_models import TINY_HF_TOWER, TINY_OPENCLIP, build_hf, randomise
from tiny_siglip import build_siglip, build_siglip2

_BLOCK_NUMBER = re.compile(r"(?<=\.)\d+(?=\.|$)")
_LENGTH = 16


@dataclass(frozen=True)
class Place:
    """Where a site's weight is: `Site.role` and whether it is in a block, and `SiteRef` without numbers."""

    role: str
    in_block: bool
    kind: SiteKind
    module: str
    parameter: str
    bias: str


@dataclass(frozen=True)
class Kind:
    """How a tower is built, as far as an adapter meets it.

    Attributes:
        tower: which one.
        names: the class of transformers in whose names it is saved; "" for the model's own names.
        plain: whether its family knows it as a plain transformer.
        places: where its sites' weights are.
    """

    tower: Tower
    names: str
    plain: bool
    places: frozenset[Place]


@dataclass(frozen=True)
class RoundTrip:
    """What became of the features of a small tower, each as a share of the largest feature.

    Attributes:
        moved: how far the adapter moves them.
        file: how far they are off after saving, and loading into a fresh copy of the base.
        peft: how far they are off in stock PEFT; None where it has no module of the tower, or no class to
            open the adapter on.
        merged: how far they are off with the adapter merged.
        undone: whether unmerging gives every weight back to the bit.
    """

    moved: float
    file: float
    peft: float | None
    merged: float
    undone: bool


def kinds_of(clip: Clip) -> dict[Tower, Kind]:
    """How each tower is built that has sites."""
    twin, plain = clip.family.twin(clip.model), plain_towers(clip)
    refs = clip.site_refs.values()
    own = {tower: [ref for ref in refs if ref.site.tower == tower] for tower in TOWERS}
    names = "" if twin.paths else twin.name
    return {
        tower: Kind(tower, names, plain[tower], frozenset(map(_place, found)))
        for tower, found in own.items()
        if found
    }


def plain_towers(clip: Clip) -> dict[Tower, bool]:
    """Whether the family of a model knows each of its towers as a plain transformer."""
    family, model = clip.family, clip.model
    return {
        "text": family.text_tower(model) is not None,
        "vision": family.vision_tower(model) is not None,
    }


def _place(ref: SiteRef) -> Place:
    paths = (_BLOCK_NUMBER.sub("N", path) for path in (ref.module, ref.parameter, ref.bias))
    return Place(ref.site.role, ref.site.block is not None, ref.kind, *paths)


def peft_base(clip: Clip) -> Clip:
    """The model that stock PEFT opens an adapter on, which may be on the meta device.

    Raises:
        ModelError: no class of transformers holds the weights.
    """
    if clip.family.name == "transformers" or clip.family.twin(clip.model).paths:
        return clip
    with clip.device:
        return to_transformers(clip)


def sites_in_peft(clip: Clip) -> tuple[Site, ...]:
    """The sites at which PEFT has a module to adapt."""
    twin = clip.family.twin(clip.model)
    return tuple(site for site in clip.sites if is_module_of(site, twin))


def stand_in(kind: Kind) -> str | None:
    """The first small model with a tower of this kind; None if there is none."""
    return next((name for name in SMALL if _kinds(name).get(kind.tower) == kind), None)


@cache
def _kinds(name: str) -> dict[Tower, Kind]:
    return kinds_of(as_clip(SMALL[name]()))


@cache
def round_trips(name: str) -> Mapping[Tower, RoundTrip]:
    """Adapt all sites of a small model, by its name in `SMALL`, and take the adapter everywhere."""
    base = SMALL[name]().requires_grad_(False)
    model = copy.deepcopy(base)
    cg.apply_lora(model, r=3, alpha=5, targets="all")
    randomise_lora(model, size=0.1)
    inputs = _inputs(base)
    plain, wanted = _features(base, inputs), _features(model, inputs)
    loaded, in_peft = _features(_loaded(model, base), inputs), _peft_errors(base)
    before = copy.deepcopy(model.state_dict())
    cg.merge_lora(model)
    merged = _features(model, inputs)
    cg.unmerge_lora(model)
    undone = all(tensor.equal(before[key]) for key, tensor in model.state_dict().items())
    return {
        tower: RoundTrip(
            moved=_share(plain[tower], wanted[tower]),
            file=_share(loaded[tower], wanted[tower]),
            peft=in_peft.get(tower),
            merged=_share(merged[tower], wanted[tower]),
            undone=undone,
        )
        for tower in wanted
    }


def _loaded(model: nn.Module, base: nn.Module) -> nn.Module:
    other = copy.deepcopy(base)
    with tempfile.TemporaryDirectory() as folder:
        cg.load_adapter(other, cg.save_adapter(model, folder))
    return other


def _peft_errors(base: nn.Module) -> dict[Tower, float]:
    """The errors of stock PEFT with an adapter of all sites that it has modules for."""
    clip = as_clip(base)
    try:
        host = peft_base(clip).model
    except cg.errors.ModelError:
        return {}
    sites = sites_in_peft(clip)
    model = copy.deepcopy(base)
    cg.apply_lora(model, r=3, alpha=5, targets=",".join(map(str, sites)))
    randomise_lora(model, size=0.1)
    with tempfile.TemporaryDirectory() as folder, warnings.catch_warnings():
        warnings.simplefilter("ignore")  # PEFT's, on models that it does not know
        cg.save_adapter(model, folder)
        peft = PeftModel.from_pretrained(copy.deepcopy(host), folder).eval()
    inputs = {tower: given for tower, given in _inputs(base).items() if tower in _towers(sites)}
    theirs, wanted = _features(peft.base_model.model, inputs), _features(model, inputs)
    return {tower: _share(theirs[tower], wanted[tower]) for tower in inputs}


def _towers(sites: tuple[Site, ...]) -> set[Tower]:
    return {site.tower for site in sites}


def _inputs(base: nn.Module) -> dict[Tower, Tensor]:
    """Fixed random pixels and ids for the towers that a model has."""
    clip, generator = as_clip(base), torch.Generator().manual_seed(0)
    towers, found = _towers(clip.sites), {}
    if "vision" in towers:
        found["vision"] = torch.randn(3, 3, *clip.family.image_size(base), generator=generator)
    if "text" in towers:
        vocabulary = clip.site_refs[Site("text", None, "token_embedding")].shape[0]
        shape = (3, min(clip.context_length, _LENGTH))
        found["text"] = torch.randint(3, vocabulary - 2, shape, generator=generator)
        found["text"][:, -1] = vocabulary - 1
    return found


def _features(model: nn.Module, inputs: Mapping[Tower, Tensor]) -> dict[Tower, Tensor]:
    family = as_clip(model).family
    encode = {"vision": family.encode_image, "text": family.encode_text}
    with torch.no_grad():
        return {tower: encode[tower](model, given) for tower, given in inputs.items()}


def _share(ours: Tensor, wanted: Tensor) -> float:
    return ((ours - wanted).abs().max() / wanted.abs().max()).item()


def _clip() -> nn.Module:
    torch.manual_seed(0)
    return randomise(open_clip.CLIP(**copy.deepcopy(TINY_OPENCLIP))).eval()


def _clipseg() -> nn.Module:
    from transformers import CLIPSegConfig, CLIPSegModel

    words = {"vocab_size": 100, "max_position_embeddings": 16, "eos_token_id": 99}
    text = {**TINY_HF_TOWER, **words}
    vision = {**TINY_HF_TOWER, "image_size": 32, "patch_size": 8}
    torch.manual_seed(0)
    return randomise(
        CLIPSegModel(CLIPSegConfig(text_config=text, vision_config=vision, projection_dim=24))
    ).eval()


def _siglip_beside(text: nn.Module) -> nn.Module:
    """SigLIP's vision tower of open_clip beside another text tower."""
    model = tiny_towers.build_tower("SigLIP")
    model.text = text
    return model


def _custom_text(**text: Any) -> nn.Module:
    return randomise(custom_text(TINY_OPENCLIP, **text)).eval()


# Those first that another library holds too: stock PEFT is measured on them.
SMALL: dict[str, Callable[[], nn.Module]] = {
    "CLIP": _clip,
    "CustomTextCLIP": _custom_text,
    "CustomTextCLIP without causal mask": lambda: _custom_text(no_causal_mask=True, context_length=16),
    "CLIPModel": build_hf,
    "SiglipModel": build_siglip,
    "Siglip2Model": build_siglip2,
    "CLIPSegModel": _clipseg,
    **{name: lambda name=name: tiny_towers.build_tower(name) for name in tiny_towers.WEIGHTS},
    **{name: lambda name=name: tiny_dual.build(name) for name in tiny_dual.BUILDERS if "own" not in name},
    "SigLIP beside NLLB": lambda: _siglip_beside(tiny_dual.build("open_clip NLLB").text),
    "SigLIP beside a text tower without projection": lambda: _siglip_beside(
        _custom_text(no_causal_mask=True, pool_type="last", proj_type="none", context_length=16).text
    ),
}
