"""VeRA against stock PEFT, both ways and in both families, and through all that an adapter goes through."""

from __future__ import annotations

import copy
import json
from pathlib import Path
from typing import Any, get_args

import peft
import pytest
import torch
from safetensors.torch import load_file
from torch import Tensor, nn

import clipgraft as cg
from clipgraft.adapters.convert import write_any
from clipgraft.engine.encoder import Encoder
from clipgraft.lora.config import LoraConfig, Variant
from clipgraft.lora.state import require_lora
from clipgraft.lora.variants import VARIANTS
from clipgraft.models.clip import as_clip
from explicit_lora import largest
from peft_models import outputs

pytestmark = [
    pytest.mark.filterwarnings("ignore:.is_gradient_checkpointing.:FutureWarning"),
    pytest.mark.filterwarnings("ignore:Specified to not"),
]
LINEAR = ["q_proj", "k_proj", "v_proj", "out_proj", "fc1", "fc2", "visual_projection", "text_projection"]
OURS: dict[str, dict[str, Any]] = {
    "everywhere": {"targets": "linear"},
    "one tower": {"targets": "text.*.fc1+q", "variant_options": {"projection_prng_key": 7}},
    "the seed alone": {"targets": "attention", "variant_options": {"save_projection": False}},
    "biases": {"targets": "vision.*.q+fc2", "bias": "lora_only"},
    "all biases": {"targets": "mlp", "bias": "all", "variant_options": {"d_initial": 0.3}},
}
THEIRS: dict[str, dict[str, Any]] = {
    "everywhere": {"target_modules": LINEAR},
    "a pattern": {"target_modules": r".*text_model.*(q_proj|fc2)", "projection_prng_key": 11},
    "the seed alone": {"target_modules": ["k_proj", "fc1"], "save_projection": False},
    "biases": {"target_modules": ["v_proj"], "bias": "vera_only"},
    "all biases": {"target_modules": ["v_proj"], "bias": "all"},
}


def randomise_vectors(model: nn.Module) -> None:
    """Random values for all that an adapter trains."""
    generator = torch.Generator().manual_seed(1)
    for parameter in model.parameters():
        if parameter.requires_grad:
            parameter.data += torch.randn(parameter.shape, generator=generator) * 0.3


def close(got: tuple[Tensor, Tensor], wanted: tuple[Tensor, Tensor]) -> bool:
    return largest(got, wanted) <= 1e-5 * max(1, *(t.abs().max().item() for t in wanted))


@pytest.mark.parametrize("options", OURS)
def test_stock_peft_opens_ours(
    trained_on: nn.Module, tiny_hf: nn.Module, options: str, tmp_path: Path
) -> None:
    """A VeRA adapter trained here computes something else in PEFT, or after being loaded."""
    stock, again, base = copy.deepcopy(tiny_hf), copy.deepcopy(trained_on), outputs(tiny_hf)
    cg.apply_lora(trained_on, r=5, variant="vera", **OURS[options])
    assert close(outputs(trained_on), base), "a new adapter has no effect"
    randomise_vectors(trained_on)
    wanted = outputs(trained_on)
    assert not close(wanted, base)
    folder = cg.save_adapter(trained_on, tmp_path / "adapter")
    opened = peft.PeftModel.from_pretrained(stock, folder).eval()
    assert close(outputs(opened), wanted)
    assert opened.peft_config["default"].peft_type == "VERA"
    cg.load_adapter(again, folder)
    assert close(outputs(again), wanted)
    cg.disable_lora(again)
    assert close(outputs(again), base)


@pytest.mark.parametrize("options", THEIRS)
def test_we_open_theirs(trained_on: nn.Module, tiny_hf: nn.Module, options: str, tmp_path: Path) -> None:
    """A VeRA adapter that PEFT trained computes something else here, or saved again."""
    pristine = copy.deepcopy(tiny_hf)
    config = peft.VeraConfig(r=5, d_initial=0.2, **THEIRS[options])
    stock = peft.get_peft_model(copy.deepcopy(tiny_hf), config)
    randomise_vectors(stock.eval())
    wanted = outputs(stock)
    stock.save_pretrained(tmp_path)
    cg.load_adapter(trained_on, tmp_path)
    assert close(outputs(trained_on), wanted)
    again = cg.save_adapter(trained_on, tmp_path / "again")
    assert close(outputs(peft.PeftModel.from_pretrained(pristine, again).eval()), wanted)


def test_a_new_adapter_is_that_of_peft(tiny_hf: nn.Module, tmp_path: Path) -> None:
    """A and B are not those that PEFT draws: an adapter stored as its seed is another one there."""
    stock = peft.get_peft_model(
        copy.deepcopy(tiny_hf), peft.VeraConfig(r=4, target_modules=LINEAR, projection_prng_key=3)
    )
    stock.save_pretrained(tmp_path / "theirs")
    cg.apply_lora(tiny_hf, r=4, targets="linear", variant="vera", variant_options={"projection_prng_key": 3})
    cg.save_adapter(tiny_hf, tmp_path / "ours")
    theirs, ours = (load_file(tmp_path / name / "adapter_model.safetensors") for name in ("theirs", "ours"))
    assert theirs.keys() == ours.keys()
    assert all(torch.equal(theirs[name], ours[name]) for name in theirs)


def test_an_adapter_is_two_vectors_a_site(tiny_hf: nn.Module, tmp_path: Path) -> None:
    """The shared matrices are trained, counted or stored once a site."""
    sites = cg.apply_lora(
        tiny_hf, r=4, targets="text.*.q", variant="vera", variant_options={"save_projection": False}
    )
    assert cg.count_parameters(tiny_hf).trainable == cg.count_parameters(tiny_hf).lora == sites * (4 + 32)
    folder = cg.save_adapter(tiny_hf, tmp_path / "small")
    assert set(load_file(folder / "adapter_model.safetensors")) == {
        f"base_model.model.text_model.encoder.layers.{block}.self_attn.q_proj.vera_lambda_{part}"
        for block in range(2)
        for part in "db"
    }
    assert cg.read_adapter(folder).settings.variant == "vera"
    record = json.loads((folder / "clipgraft.json").read_text())
    assert record["settings"]["variant"] == "vera"


def test_projections_are_one_in_memory(tiny_hf: nn.Module) -> None:
    """Each of a thousand adapters on a server keeps matrices of its own."""
    for name in ("one", "two"):
        cg.apply_lora(tiny_hf, r=4, targets="linear", variant="vera", name=name)
    state = require_lora(copy.deepcopy(tiny_hf))
    owned = {id(layer.projections) for a in state.adapters.values() for layer in a.layers.values()}
    assert len(owned) == 1


def test_merged_summed_mixed_and_unmerged(trained_on: nn.Module) -> None:
    """Merging, a sum with plain LoRA or a mixed batch computes something else than the adapter."""
    clip = cg.Clip.over(as_clip(trained_on))
    cg.apply_lora(clip, r=6, targets="linear", variant="vera", name="vera")
    randomise_vectors(clip.model)
    cg.apply_lora(clip, r=2, targets="linear", name="plain")
    randomise_vectors(clip.model)
    base_weights = {name: p.clone() for name, p in clip.model.named_parameters() if "lora" not in name}
    wanted = {}
    for name in ("vera", "plain"):
        cg.set_adapter(clip, name)
        wanted[name] = outputs(clip.model)
    cg.set_adapter(clip, "vera")
    cg.merge_lora(clip)
    assert close(outputs(clip.model), wanted["vera"])
    cg.unmerge_lora(clip)
    after = dict(clip.model.named_parameters())
    assert all(torch.equal(after[name], weight) for name, weight in base_weights.items())
    cg.combine_adapters(clip, {"vera": 1.0}, "as-lora")
    assert require_lora(clip).adapters["as-lora"].settings.variant == "lora"
    assert close(outputs(clip.model), wanted["vera"])
    pixels = torch.randn(3, 3, 32, 32, generator=torch.Generator().manual_seed(2))
    mixed = clip.encode_image(pixels, adapters=["vera", "plain", None])
    for row, name in enumerate(("vera", "plain", None)):
        cg.set_adapter(clip, name)
        with torch.no_grad():
            alone = clip.encode_image(pixels[row : row + 1])[0]
        assert (mixed[row] - alone).abs().max() <= 1e-5 * max(1.0, alone.abs().max().item())


def test_the_engine_trains_the_vectors_alone(tiny_openclip: nn.Module) -> None:
    """The matrices get gradients, or dropout thins out the base."""
    clip = as_clip(tiny_openclip)
    cg.apply_lora(clip, r=3, targets="linear", variant="vera", dropout=0.5)
    clip.model.train()
    pixels = torch.randn(2, 3, *clip.family.image_size(clip.model))
    Encoder(clip).encode_image(pixels).sum().backward()
    state = require_lora(clip)
    graded = {p for p in clip.model.parameters() if p.grad is not None}
    vision = {p for site, layer in state.layers.items() if site.tower == "vision" for p in layer.parameters()}
    assert graded == vision


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"targets": "all"}, r"VeRA: it acts on linear layers alone: leave text\.token_embedding"),
        ({"alpha": 3}, "VeRA: `alpha` and `use_rslora` scale nothing"),
        ({"use_rslora": True}, "VeRA: `alpha` and `use_rslora` scale nothing"),
        ({"rank_pattern": {"text.0.*": 2}}, "VeRA: all sites have one rank"),
        ({"init": "pissa"}, "VeRA: `init`: got 'pissa', allowed is one of 'default'"),
        (
            {"variant_options": {"d_inital": 1}},
            "VeRA: d_inital: there is no such option",
        ),
        ({"variant_options": {"d_initial": "x"}}, "VeRA: d_initial: got 'x', allowed is a number"),
        ({"use_dora": True}, "name two variants"),
        ({"variant": "lora", "variant_options": {"d_initial": 1}}, "LoRA has no `variant_options`"),
        ({"variant": "lokr"}, "variant: got 'lokr', allowed is one of 'lora', 'dora' or 'vera'"),
    ],
)
def test_what_vera_does_not_have(tiny_hf: nn.Module, options: dict[str, Any], message: str) -> None:
    """An option that VeRA ignores looks as if it acted."""
    with pytest.raises(cg.errors.ConfigError, match=message):
        cg.apply_lora(tiny_hf, **{"r": 4, "variant": "vera", **options})
    assert not hasattr(tiny_hf, "_clipgraft_lora")


def test_starts_from_data_are_refused(tiny_hf: nn.Module) -> None:
    """A of VeRA is set for all sites by what one of them sees."""
    cg.apply_lora(tiny_hf, r=4, variant="vera")
    with pytest.raises(cg.errors.AdapterError, match="sets A, which VeRA does not train"):
        cg.lora.start_from_data(tiny_hf, lambda: None)


@pytest.mark.parametrize("form", ["guide", "clip-lora"])
def test_formats_of_plain_lora_refuse_it(tiny_hf: nn.Module, form: str, tmp_path: Path) -> None:
    """A conversion writes a file that lacks what the adapter is."""
    cg.apply_lora(tiny_hf, r=4, variant="vera")
    folder = cg.save_adapter(tiny_hf, tmp_path / "vera")
    with pytest.raises(cg.errors.AdapterError, match=r"has VeRA vectors, which [^\n]+ cannot hold[^\n]+$"):
        write_any(cg.read_adapter(folder), tmp_path / "out.pt", form)


def damage(folder: Path, **changes: Any) -> None:
    path = folder / "adapter_config.json"
    path.write_text(json.dumps({**json.loads(path.read_text()), **changes}))


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"r": 7}, r"vera_lambda_d \(5,\).* where the configuration says rank 7"),
        ({"d_initial": "much"}, "VeRA: d_initial: got 'much'"),
        ({"projection_prng_key": -1}, "VeRA: projection_prng_key: got -1"),
        ({"bias": "some"}, "uses bias='some', which clipgraft does not read"),
        ({"modules_to_save": ["fc1"]}, "uses modules_to_save, which clipgraft does not read"),
        ({"peft_type": "LORA"}, "that are no LoRA on transformers.CLIPModel"),
        ({"peft_type": "PVERA"}, "is of PEFT type 'PVERA': clipgraft reads 'LORA' and 'VERA'"),
    ],
)
def test_damaged_folders(tiny_hf: nn.Module, changes: dict[str, Any], message: str, tmp_path: Path) -> None:
    """A configuration that does not fit the vectors is read as another adapter."""
    stock = peft.get_peft_model(copy.deepcopy(tiny_hf), peft.VeraConfig(r=5, target_modules=["q_proj"]))
    stock.save_pretrained(tmp_path)
    damage(tmp_path, **changes)
    with pytest.raises(cg.errors.AdapterError, match=message):
        cg.load_adapter(tiny_hf, tmp_path)
    assert not hasattr(tiny_hf, "_clipgraft_lora")


def test_every_variant_has_a_class_and_a_name() -> None:
    """A variant that can be asked for is not there, or one that is there cannot be asked for."""
    assert tuple(VARIANTS) == get_args(Variant)
    assert LoraConfig(use_dora=True) == LoraConfig(variant="dora")
