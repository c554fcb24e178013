"""Where A and B start."""

from __future__ import annotations

import copy
from pathlib import Path

import pytest
import torch
from torch import nn

import clipgraft as cg
from clipgraft.lora.initialization import principal
from clipgraft.lora.state import require_lora
from clipgraft.models.clip import as_clip
from clipgraft.models.family import site_weight
from explicit_lora import bound, features, inputs, largest, run

layouts = pytest.mark.parametrize("layout", ["CLIP", "CLIP of open_clip 4", "CustomTextCLIP", "CLIPModel"])


@layouts
def test_pissa_starts_as_the_base_on_its_principal_directions(model: nn.Module) -> None:
    """A PiSSA run starts from another model than the base, or on directions that are not the base's own."""
    wanted = run(model)
    cg.apply_lora(model, r=3, alpha=6, targets="all", init="pissa")
    assert largest(run(model), wanted) <= bound(wanted)
    clip = as_clip(model)
    for site, layer in require_lora(model).layers.items():
        weight = layer.matrix(site_weight(model, clip.site_refs[site])).detach()
        start = layer.scaling * layer.lora_B.detach().flatten(1) @ layer.lora_A.detach().flatten(1)
        u, s, v = torch.linalg.svd(weight, full_matrices=False)
        assert torch.allclose(start, u[:, :3] * s[:3] @ v[:3], atol=1e-4 * s[0].item()), site


@layouts
def test_a_pissa_run_is_saved_as_what_it_does(model: nn.Module, tmp_path: Path) -> None:
    """A PiSSA adapter, loaded, adds its start to a base that still has it."""
    base = copy.deepcopy(model)
    cg.apply_lora(model, r=2, targets="attention", init="pissa", use_rslora=True)
    with torch.no_grad():
        for p in model.parameters():
            if p.requires_grad:
                p.mul_(1.2)
    wanted = run(model)
    cg.load_adapter(base, cg.save_adapter(model, tmp_path))
    assert largest(run(base), wanted) <= bound(wanted)
    assert {layer.r for layer in require_lora(base).layers.values()} == {4}


def test_principal_is_the_decomposition() -> None:
    """The short way to the largest singular triplets gives others than the long way."""
    torch.manual_seed(0)
    for shape in ((40, 7), (7, 40), (5, 5), (3, 1)):
        matrix = torch.randn(shape)
        u, s, v = principal(matrix, min(shape))
        assert torch.allclose(u * s @ v, matrix, atol=1e-5)
        assert torch.allclose(s, torch.linalg.svdvals(matrix), atol=1e-5)


@layouts
def test_eva_points_where_the_data_is(model: nn.Module) -> None:
    """A data-driven start ignores the data, changes the model, or leaves it in training mode."""
    wanted = run(model)
    cg.apply_lora(model, r=2, dropout=0.5, targets="text.0.q+v+fc1,text.1.out,vision.*.fc2,all", init="eva")
    pixels, ids = inputs(model, batch=4)
    seen: dict[str, torch.Tensor] = {}
    layers = require_lora(model).layers
    site = cg.models.Site.parse("vision.1.fc2")
    hook = layers[site].register_forward_pre_hook(lambda layer, args: seen.setdefault("x", args[0]))
    started = cg.lora.start_from_data(model, lambda: features(model, pixels, ids))
    hook.remove()
    assert not model.training
    assert largest(run(model), wanted) <= bound(wanted)
    read = [s for s in layers if s.role not in ("token_embedding", "position_embedding")]
    assert started == len(read)
    for s in read:
        a = layers[s].lora_A.detach().flatten(1)
        assert torch.allclose(a @ a.T, torch.eye(2), atol=1e-4), s
    x = seen["x"].reshape(-1, seen["x"].shape[-1])
    best = torch.linalg.svdvals(x)[:2].square().sum()
    assert torch.isclose((x @ layers[site].lora_A.detach().T).square().sum(), best, rtol=1e-3)
    q, v = (layers[cg.models.Site.parse(f"text.0.{role}")].lora_A for role in "qv")
    assert torch.allclose(q.abs(), v.abs(), atol=1e-4)


def test_eva_refuses_what_cannot_be_started(tiny_openclip: nn.Module) -> None:
    """A trained adapter is thrown away, or a start from no data goes unnoticed."""
    cg.apply_lora(tiny_openclip)
    with pytest.raises(cg.errors.AdapterError, match="no batch went through the adapted tower"):
        cg.lora.start_from_data(tiny_openclip, lambda: None)
    with torch.no_grad():
        require_lora(tiny_openclip).layers[cg.models.Site.parse("text.0.q")].lora_B.fill_(1)
    with pytest.raises(cg.errors.AdapterError, match="trained already"):
        cg.lora.start_from_data(tiny_openclip, lambda: None)
