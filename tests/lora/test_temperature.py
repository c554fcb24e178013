"""A trained temperature goes wherever its adapter goes: `logit_scale`, and SigLIP's `logit_bias`."""

from __future__ import annotations

import copy
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from torch import nn

import clipgraft as cg
from clipgraft.adapters.convert import read_any, write_any
from clipgraft.errors import AdapterError
from clipgraft.models.clip import Clip, as_clip
from clipgraft.models.export import write_model
from tiny_siglip import BIAS, SCALE, build_siglip, with_logit_bias

Make = Callable[[], Clip]
BASE = (SCALE, BIAS)


@pytest.fixture(params=["open_clip", "transformers"])
def make(request: pytest.FixtureRequest, tiny_openclip: nn.Module) -> Make:
    """A fresh tiny model with a `logit_bias` a call, of either family."""
    if request.param == "transformers":
        return lambda: as_clip(build_siglip())
    return lambda: with_logit_bias(as_clip(tiny_openclip))


def values(clip: Clip) -> tuple[float, float]:
    assert clip.logit_bias is not None
    return clip.logit_scale.item(), clip.logit_bias.item()


def trained(clip: Clip, scale: float, bias: float, name: str = "default", **options: object) -> Clip:
    """Apply LoRA that has learnt a temperature."""
    cg.apply_lora(clip, **{"r": 2, "targets": "text.*.q", "train_logit_scale": True, "name": name, **options})
    with torch.no_grad():
        for parameter, value in zip(clip.temperature.values(), (scale, bias), strict=True):
            parameter.fill_(value)
    return clip


def test_it_acts_with_its_adapter_alone(make: Make) -> None:
    """The base, or another adapter, would be run with the bias of one that is switched off."""
    clip = trained(make(), 1.5, -2.0)
    assert all(parameter.requires_grad for parameter in clip.temperature.values())
    with cg.lora_disabled(clip):
        assert values(clip) == BASE
        assert not any(parameter.requires_grad for parameter in clip.temperature.values())
    assert values(clip) == (1.5, -2.0)
    trained(clip, 3.0, -8.0, "other")
    cg.apply_lora(clip, r=2, targets="text.*.q", name="without")
    assert values(clip) == BASE
    for name, wanted in {"default": (1.5, -2.0), "other": (3.0, -8.0), "without": BASE}.items():
        cg.set_adapter(clip, name)
        assert values(clip) == wanted
    cg.remove_lora(clip)
    assert values(clip) == BASE


def test_sums_add_up_what_was_learnt(make: Make) -> None:
    """Two adapters that are merged or combined would have the bias of one of them."""
    clip = trained(trained(make(), 1.5, -2.0, "one"), 3.0, -8.0, "two")
    wanted = pytest.approx(
        (SCALE + 0.5 * (1.5 - SCALE) + 3.0 - SCALE, BIAS + 0.5 * (-2.0 - BIAS) - 8.0 - BIAS)
    )
    cg.merge_lora(clip, {"one": 0.5, "two": 1.0})
    assert values(clip) == wanted
    cg.unmerge_lora(clip)
    assert values(clip) == (3.0, -8.0)
    cg.combine_adapters(clip, {"one": 0.5, "two": 1.0}, "sum")
    cg.set_adapter(clip, "sum")
    assert values(clip) == wanted
    cg.merge_lora(clip)
    cg.remove_lora(clip, keep_merged=True)
    assert values(clip) == wanted


def test_files_hold_it(make: Make, tmp_path: Path) -> None:
    """A saved adapter would come back with the bias of the base."""
    clip = trained(make(), 1.5, -2.0)
    with cg.lora_disabled(clip):
        cg.save_adapter(clip, tmp_path / "adapter")
    file = cg.read_adapter(tmp_path / "adapter")
    assert (file.logit_scale, file.logit_bias) == (1.5, -2.0)
    other = make()
    cg.load_adapter(other, tmp_path / "adapter")
    assert values(other) == (1.5, -2.0)
    assert all(parameter.requires_grad for parameter in other.temperature.values())


def test_files_without_a_bias_leave_the_bases(make: Make, tmp_path: Path) -> None:
    """An adapter of before, which has a scale alone, could not be loaded, or would take the bias away."""
    cg.save_adapter(trained(make(), 1.5, -2.0), tmp_path / "adapter")
    record = tmp_path / "adapter" / "clipgraft.json"
    lines = record.read_text(encoding="utf-8").splitlines()
    record.write_text("\n".join(line for line in lines if '"logit_bias"' not in line), encoding="utf-8")
    clip = make()
    cg.load_adapter(clip, tmp_path / "adapter")
    assert values(clip) == (1.5, BIAS)


@pytest.mark.parametrize("form", ["guide", "guide-full"])
def test_the_guides_files_hold_it(form: str, tiny_openclip: nn.Module, tmp_path: Path) -> None:
    """An adapter that goes through the guide's format and back has lost its bias."""
    base = with_logit_bias(as_clip(tiny_openclip))
    cg.save_adapter(trained(with_logit_bias(as_clip(tiny_openclip)), 1.5, -2.0), tmp_path / "adapter")
    file = read_any(tmp_path / "adapter")
    file.base.update(name="ViT-B-32", pretrained="")
    state = base.model.state_dict()
    write_any(file, tmp_path / "guide.pt", form, base_state_dict=state if form == "guide-full" else None)
    again = read_any(tmp_path / "guide.pt")
    assert (again.logit_scale, again.logit_bias) == (1.5, -2.0)
    if form == "guide-full":
        written = torch.load(tmp_path / "guide.pt", weights_only=True)["state_dict"]
        assert written["logit_bias"].item() == -2.0
        with pytest.raises(AdapterError, match="has a trained logit_bias, and the base has none"):
            write_any(file, tmp_path / "other.pt", form, base_state_dict=tiny_openclip.state_dict())


def test_a_base_without_a_bias_refuses_one(tiny_openclip: nn.Module, tmp_path: Path) -> None:
    """The same weights without the bias pass for the same base, and what was learnt would be dropped."""
    cg.save_adapter(trained(with_logit_bias(as_clip(tiny_openclip)), 1.5, -2.0), tmp_path / "adapter")
    with pytest.raises(AdapterError, match="has a trained `logit_bias`, and this model has none"):
        cg.load_adapter(copy.deepcopy(tiny_openclip), tmp_path / "adapter")


def test_bf16_bases_get_their_own_bits_back(make: Make) -> None:
    """A bias that training holds in fp32 would leave the base in another type than it was loaded in."""
    clip = make().to(torch.bfloat16)
    cg.apply_lora(clip, r=2, targets="text.*.q", train_logit_scale=True)
    for parameter in clip.temperature.values():
        parameter.data = parameter.data.float() + 0.001
    cg.remove_lora(clip)
    assert [p.dtype for p in clip.temperature.values()] == [torch.bfloat16] * 2
    assert values(clip) == BASE


def test_a_merged_model_is_written_with_its_bias(tiny_openclip: nn.Module, tmp_path: Path) -> None:
    """The standalone model would have the probabilities of its base."""
    clip = trained(with_logit_bias(as_clip(tiny_openclip)), 1.5, -2.0)
    cg.merge_lora(clip)
    cg.remove_lora(clip, keep_merged=True)
    write_model(clip, tmp_path / "model.pt", "open_clip", progress=False)
    written = torch.load(tmp_path / "model.pt", weights_only=True)
    state = written.get("state_dict", written)
    assert (state["logit_scale"].item(), state["logit_bias"].item()) == (1.5, -2.0)
