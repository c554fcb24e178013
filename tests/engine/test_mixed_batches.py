"""Rows of several adapters in one batch against each row alone, by the model's own forward."""

from __future__ import annotations

import copy
import threading
from collections.abc import Sequence
from pathlib import Path

import pytest
import torch
from torch import Tensor, nn

import clipgraft as cg
from clipgraft.adapters.attach import detached, read_for
from clipgraft.adapters.open import Clip
from clipgraft.engine.encoder import encode_mixed, prepare_adapter
from clipgraft.engine.mixed_adapters import Factors, Product, add_rows, bundles
from clipgraft.lora.inject import hang
from clipgraft.lora.state import Adapter, lora_state, require_lora
from clipgraft.models.clip import as_clip
from explicit_lora import custom_text, inputs, randomise_active
from tiny_models import TINY_OPENCLIP, in_every_layout, randomise
from tiny_towers import SIZE, build_tower
from weight_places import ids as tower_ids

LAYOUTS = ("CLIP", "CLIP of open_clip 4", "CustomTextCLIP", "CLIPModel", "not causal")
layouts = pytest.mark.parametrize("layout", LAYOUTS)
VARIANTS = {
    "attention": {"targets": "attention", "r": 3, "dropout": 0.3},
    "everything": {"targets": "all", "r": 2, "use_rslora": True},
    "dora": {"targets": "all", "r": 4, "use_dora": True},
    "biases": {"targets": "text.0.*,vision.1.q", "r": 2, "bias": "all"},
    "pissa": {"targets": "mlp,projection", "r": 2, "init": "pissa"},
    "text": {"targets": "text.1.q+fc1", "r": 5},
    "vera": {"targets": "linear", "r": 6, "variant": "vera"},
}


def add(model: nn.Module, name: str, seed: int = 0) -> None:
    cg.apply_lora(model, **VARIANTS[name], name=name)
    randomise_active(model, seed)


@pytest.fixture
def clip(layout: str, tiny_openclip: nn.Module, tiny_openclip_4x: nn.Module) -> Clip:
    if layout == "not causal":
        return cg.Clip.over(as_clip(randomise(custom_text(TINY_OPENCLIP, no_causal_mask=True)).eval()))
    return cg.Clip.over(as_clip(in_every_layout(tiny_openclip, tiny_openclip_4x)[layout]))


def alone(clip: Clip, rows: Tensor, names: Sequence[str | None], tower: str) -> Tensor:
    """Each row by itself, with its adapter made the active one, by the model's own forward."""
    encode = clip.encode_text if tower == "text" else clip.encode_image
    features = []
    with torch.no_grad():
        for row, name in zip(rows, names, strict=True):
            cg.set_adapter(clip, name)
            features.append(encode(row[None])[0])
    return torch.stack(features)


def mixed(clip: Clip, rows: Tensor, names: object, tower: str) -> Tensor:
    return (clip.encode_text if tower == "text" else clip.encode_image)(rows, adapters=names)


def close(got: Tensor, wanted: Tensor, bound: float = 1e-5) -> bool:
    return (got - wanted).abs().max().item() <= bound * max(1.0, wanted.abs().max().item())


@layouts
@pytest.mark.parametrize("tower", ["text", "vision"])
def test_mixed_rows_equal_single_runs(clip: Clip, tower: str) -> None:
    """A row of a mixed batch gets the features of another row's adapter, or of none."""
    for seed, name in enumerate(VARIANTS):
        add(clip.model, name, seed)
    cg.set_adapter(clip, "text")
    names = [None, *VARIANTS, "dora", None, "biases"]
    pixels, ids = inputs(clip.model, batch=len(names))
    rows = ids if tower == "text" else pixels
    rows[-1] = rows[1]  # the same input for two adapters
    got = mixed(clip, rows, names, tower)
    assert require_lora(clip).active == "text"
    assert not got.requires_grad
    wanted = alone(clip, rows, names, tower)
    assert close(got, wanted)
    assert not close(got[1:2], got[-1:], 0.01)
    for name in (None, "dora"):
        assert close(
            mixed(clip, rows, [name] * len(rows), tower), alone(clip, rows, [name] * len(rows), tower)
        )
    assert torch.equal(mixed(clip, rows, "dora", tower), mixed(clip, rows, ["dora"] * len(rows), tower))


def detached_copies(clip: Clip, folder: Path) -> dict[str, Adapter]:
    """Every variant saved, read and built for the same base, which carries none of them."""
    found = {}
    for name in VARIANTS:
        cg.save_adapter(clip, folder / name, name=name)
        found[name] = detached(clip, read_for(clip, folder / name))
    return found


@layouts
@pytest.mark.parametrize("prepared", [False, True])
@pytest.mark.parametrize("tower", ["text", "vision"])
def test_adapters_need_not_be_attached(clip: Clip, tower: str, prepared: bool, tmp_path: Path) -> None:
    """A served adapter answers otherwise than the same one on the model, or changes the model."""
    for seed, name in enumerate(VARIANTS):
        add(clip.model, name, seed)
    names = [None, *VARIANTS, "attention", "dora"]
    pixels, ids = inputs(clip.model, batch=len(names))
    rows = ids if tower == "text" else pixels
    wanted = alone(clip, rows, names, tower)
    adapters = detached_copies(clip, tmp_path)
    cg.remove_lora(clip)
    before = clip.encode_text(ids)
    if prepared:
        for adapter in adapters.values():
            prepare_adapter(clip, adapter)
    groups = [
        (
            None if name is None else adapters[name],
            torch.tensor([n for n, other in enumerate(names) if other == name]),
        )
        for name in dict.fromkeys(names)
    ]
    for _ in range(2):
        assert close(encode_mixed(clip, tower, rows, groups), wanted)
    assert lora_state(clip) is None
    assert torch.equal(clip.encode_text(ids), before)


def test_a_prepared_adapter_takes_no_more_memory_and_may_train_again(
    tiny_openclip: nn.Module, tmp_path: Path
) -> None:
    """Serving holds every adapter twice, or training one that was served changes nothing any more."""
    clip = cg.Clip.over(as_clip(tiny_openclip))
    add(tiny_openclip, "attention")
    adapter = detached(clip, read_for(clip, cg.save_adapter(clip, tmp_path / "a", name="attention")))
    cg.remove_lora(clip)
    size = sum(parameter.nbytes for parameter in adapter.parameters())
    prepare_adapter(clip, adapter)
    storages = {p.untyped_storage().data_ptr(): p.untyped_storage().nbytes() for p in adapter.parameters()}
    assert sum(storages.values()) == size
    held = {p.a.untyped_storage().data_ptr() for p in adapter.prepared.values()}
    assert held <= set(storages)
    hang(clip, adapter, "it")
    _, ids = inputs(tiny_openclip)
    before = clip.encode_text(ids, adapters="it")
    randomise_active(tiny_openclip, 7)
    after = clip.encode_text(ids, adapters="it")
    assert not close(after, before, 0.01)
    assert close(after, alone(clip, ids, ["it"] * 3, "text"))


@pytest.mark.parametrize("tower", ["text", "vision"])
@pytest.mark.parametrize("carries", [False, True])
def test_towers_that_run_their_own_forward(tower: str, carries: bool, tmp_path: Path) -> None:
    """On a ResNet a served adapter is refused, left on the model, or takes the place of the active one."""
    clip = cg.Clip.over(as_clip(build_tower("ResNet")))
    variants = {"one": {"targets": "all", "r": 2}, "two": {"targets": "linear", "r": 3, "use_dora": True}}
    for seed, (name, options) in enumerate(variants.items()):
        cg.apply_lora(clip, **options, name=name)
        randomise_active(clip.model, seed)
    names = ["one", None, "two", "one"]
    pixels, ids = torch.randn(4, 3, SIZE, SIZE), tower_ids().repeat(4, 1)[:4]
    rows = ids if tower == "text" else pixels
    wanted = alone(clip, rows, names, tower)
    found = {n: detached(clip, read_for(clip, cg.save_adapter(clip, tmp_path / n, name=n))) for n in variants}
    cg.set_adapter(clip, "two")
    active = clip.encode_image(pixels)
    if not carries:
        cg.remove_lora(clip)
        active = clip.encode_image(pixels)
    parameters = {name for name, _ in clip.model.named_parameters()}
    groups = [
        (found["two"], torch.tensor([2])),
        (None, torch.tensor([1])),
        (found["one"], torch.tensor([0, 3])),
    ]
    assert close(encode_mixed(clip, tower, rows, groups), wanted)
    assert {name for name, _ in clip.model.named_parameters()} == parameters
    assert torch.equal(clip.encode_image(pixels), active)
    assert (lora_state(clip) is not None) == carries


@layouts
def test_training_mode_and_autocast_are_left_as_they_are(clip: Clip) -> None:
    """Encoding for a search index while a run trains switches dropout off, or mixes types under autocast."""
    add(clip.model, "attention")
    pixels, ids = inputs(clip.model)
    wanted = alone(clip, ids, ["attention"] * 3, "text")
    clip.train()
    assert close(clip.encode_text(ids, adapters="attention"), wanted)
    assert clip.model.training
    with torch.autocast("cpu", torch.bfloat16):
        rough = clip.encode_text(ids, adapters=["attention", None, "attention"])
    assert torch.nn.functional.cosine_similarity(rough[0].float(), wanted[0], dim=0) > 0.99
    assert clip.encode_image(pixels, normalize=True, adapters="attention").norm(dim=1).allclose(torch.ones(3))


@pytest.mark.parametrize("layout", ["CLIP", "CLIPModel"])
def test_bf16_bases(clip: Clip) -> None:
    """On a base stored in bf16, mixed rows fail, or are further off than bf16 itself."""
    add(clip.model, "everything")
    clip.model.to(torch.bfloat16)
    names = ["everything", None, "everything"]
    _, ids = inputs(clip.model)
    got, wanted = mixed(clip, ids, names, "text"), alone(clip, ids, names, "text")
    assert got.dtype == torch.bfloat16
    assert torch.nn.functional.cosine_similarity(got.float(), wanted.float(), dim=1).min() > 0.99


@pytest.mark.parametrize("layout", ["CLIP", "CLIPModel", "not causal"])
def test_what_is_refused(clip: Clip) -> None:
    """A misspelt name runs the base, and a short list of names shifts all rows."""
    _, ids = inputs(clip.model)
    with pytest.raises(cg.errors.AdapterError, match=r"no adapter 'vi' on this model: load it"):
        clip.encode_text(ids, adapters="vi")
    assert close(clip.encode_text(ids, adapters=[None] * 3), clip.encode_text(ids))
    add(clip.model, "text")
    with pytest.raises(cg.errors.AdapterError, match=r"no adapter 'vi' on this model: loaded are 'text'"):
        clip.encode_text(ids, adapters=["vi", None, "text"])
    with pytest.raises(cg.errors.AdapterError, match="2 names for 3 rows"):
        clip.encode_text(ids, adapters=["text", None])
    with pytest.raises(cg.errors.AdapterError, match="an empty batch"):
        clip.encode_text(ids[:0], adapters=[])
    cg.merge_lora(clip)
    with pytest.raises(cg.errors.AdapterError, match="'text' is merged"):
        clip.encode_text(ids, adapters="text")


@pytest.mark.parametrize("layout", ["CLIP", "CLIPModel"])
def test_a_copied_or_moved_model_encodes_its_own_weights(clip: Clip) -> None:
    """A deep copy, or a model whose weights were loaded anew, answers with the features of before."""
    add(clip.model, "everything")
    _, ids = inputs(clip.model)
    before = clip.encode_text(ids, adapters="everything")
    twin = cg.Clip.over(as_clip(copy.deepcopy(clip.model)))
    with torch.no_grad():
        for parameter in twin.model.parameters():
            parameter.mul_(1.1)
    assert close(clip.encode_text(ids, adapters="everything"), before)
    wanted = alone(twin, ids, ["everything"] * 3, "text")
    assert not close(wanted, before, 0.01)
    assert close(twin.encode_text(ids, adapters="everything"), wanted)


def test_no_second_base(tiny_openclip: nn.Module, tiny_hf: nn.Module) -> None:
    """Serving adapters takes the memory of the base twice."""
    for model in (tiny_openclip, tiny_hf):
        clip = cg.Clip.over(as_clip(model))
        add(model, "attention")
        storages = {p.untyped_storage().data_ptr() for p in model.parameters()}
        _, ids = inputs(model)
        clip.encode_text(ids, adapters="attention")
        encoder = vars(model)["_clipgraft_rows"].encoder
        kept = [piece for _, frozen in encoder._weights._kept.values() for piece in frozen._pieces]
        assert kept
        assert {piece.untyped_storage().data_ptr() for piece in kept} <= storages


@pytest.mark.parametrize("layout", ["CLIP", "CLIPModel", "not causal"])
def test_adapters_come_and_go_while_others_encode(
    clip: Clip, tmp_path_factory: pytest.TempPathFactory
) -> None:
    """Loading or unloading an adapter makes a request in another thread fail, or answer wrongly."""
    folders = {}
    for seed, name in enumerate(("attention", "everything", "dora", "biases")):
        add(clip.model, name, seed)
        folders[name] = cg.save_adapter(clip, tmp_path_factory.mktemp(name), name=name)
    pixels, ids = inputs(clip.model)
    names = ["attention", None, "attention"]
    texts, images = alone(clip, ids, names, "text"), alone(clip, pixels, names, "vision")
    cg.remove_lora(clip)
    cg.load_adapter(clip, folders["attention"], "attention")
    active = clip.encode_text(ids)
    faults: list[object] = []
    done = threading.Event()

    def encode() -> None:
        try:
            while not done.is_set():
                if not close(clip.encode_text(ids, adapters=names), texts):
                    faults.append("text")
                if not close(clip.encode_image(pixels, adapters=names), images):
                    faults.append("image")
                if not close(clip.encode_text(ids), active):
                    faults.append("active")
        except Exception as error:
            faults.append(error)

    threads = [threading.Thread(target=encode) for _ in range(2)]
    for thread in threads:
        thread.start()
    for _ in range(4):
        for name in ("everything", "dora", "biases"):
            cg.load_adapter(clip, folders[name], name, activate=False)
        for name in ("everything", "dora", "biases"):
            cg.remove_lora(clip, name)
    done.set()
    for thread in threads:
        thread.join()
    assert faults == []
    assert list(require_lora(clip).adapters) == ["attention"]


@pytest.mark.parametrize("order", [[0, 1, 2, 3, 4, 5], [4, 2, 0, 5, 3, 1]])
def test_bundled_adapters_equal_the_formula(order: list[int]) -> None:
    """In bf16 and on GPUs an adapter of a few rows changes another's rows, or has another's strength."""
    torch.manual_seed(0)
    counts, scales = [3, 1, 4, 4, 0, 90], [0.5, 2.0, 0.5, -1.0, 1.0, 1.0]
    x, base = torch.randn(sum(counts), 8).double(), torch.randn(sum(counts), 12).double()
    factors = [
        (torch.randn(5, 8).double(), torch.randn(4, 2).double(), torch.randn(4, 3).double()) for _ in counts
    ]
    products = [
        Product(
            a,
            (Factors(b[None], scale, 0, 0, slice(0, 2)), Factors(other[None], scale, 8, 0, slice(2, 5))),
            *(None, None),
        )
        for (a, b, other), scale in zip(factors, scales, strict=True)
    ]
    bounds = [0, *torch.tensor(counts).cumsum(0).tolist()]
    owners = torch.repeat_interleave(torch.arange(6), torch.tensor(counts))
    scattered = torch.randperm(len(x))
    for places in (None, scattered):
        rows = [slice(bounds[n], bounds[n + 1]) if places is None else places[owners == n] for n in range(6)]
        wanted = base.clone()
        for own, (a, b, other), scale in zip(rows, factors, scales, strict=True):
            wanted[own, 0:4] += scale * x[own] @ a[:2].T @ b.T
            wanted[own, 8:12] += scale * x[own] @ a[2:].T @ other.T
        got, chosen = base.clone(), [products[n] for n in order]
        found = bundles([product.shape for product in chosen], [rows[n] for n in order], x.device)
        assert {order[n] for bundle in found for n in bundle.shares} == {0, 2, 3}
        for bundle in found:
            bundle.add(got, x, [chosen[n] for n in bundle.shares])
        for n in (1, 4, 5):
            add_rows(products[n], got, x, rows[n])
        assert close(got, wanted, 1e-12)
