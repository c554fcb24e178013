"""Everything that computes on a GPU, against the same on the CPU. Without a GPU these tests are skipped."""

from __future__ import annotations

import copy
import json
from collections.abc import Callable, Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

import clipgraft as cg
from clipgraft.engine.encoder import Encoder
from clipgraft.lora.state import require_lora
from clipgraft.models.clip import Clip, as_clip
from clipgraft.models.load import load
from explicit_lora import explicit_run, features, inputs, largest, loss_of, randomise_active, randomise_lora
from fitting import groups
from tiny_pictures import write_pictures

pytestmark = [
    pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA GPU"),
    # PEFT reads an attribute that transformers is about to rename.
    pytest.mark.filterwarnings("ignore:.is_gradient_checkpointing.:FutureWarning"),
]
# The GPU adds in another order than the CPU; TF32 is off.
ROUNDING = 5e-5
LAYOUTS = ("tiny_openclip", "tiny_openclip_4x", "tiny_hf")
VARIANTS: dict[str, dict[str, Any]] = {
    "plain": {"targets": "all", "r": 3, "alpha": 5},
    "text attention": {"targets": "text-attention", "r": 4},
    "dora": {"targets": "all", "r": 4, "use_dora": True},
    "biases": {"targets": "text.*.q,v,fc1", "r": 2, "bias": "all"},
    "rslora": {"targets": "linear", "r": 4, "use_rslora": True},
}


@pytest.fixture(autouse=True)
def _full_precision() -> Iterator[None]:
    before = torch.backends.cuda.matmul.allow_tf32, torch.backends.cudnn.allow_tf32
    torch.backends.cuda.matmul.allow_tf32 = torch.backends.cudnn.allow_tf32 = False
    yield
    torch.backends.cuda.matmul.allow_tf32, torch.backends.cudnn.allow_tf32 = before


@pytest.fixture
def base(request: pytest.FixtureRequest) -> nn.Module:
    """The model of the layout that the test is parametrised with."""
    model: nn.Module = request.getfixturevalue(request.param)
    return model


@pytest.fixture(scope="session")
def pairs(tmp_path_factory: pytest.TempPathFactory) -> cg.Pairs:
    """12 images and 24 captions. Read only."""
    return cg.read_pairs(write_pictures(tmp_path_factory.mktemp("pictures")))


@pytest.fixture(scope="session")
def _loaded(tiny_config: Path) -> Clip:
    return load(str(tiny_config), "none")


@pytest.fixture
def make_clip(_loaded: Clip) -> Callable[[str], Clip]:
    """The same tiny base with tokenizer and transforms, a fresh copy a call, on a device."""
    return lambda device: replace(_loaded, model=copy.deepcopy(_loaded.model)).to(device)


def bound(wanted: tuple[Tensor, ...]) -> float:
    return ROUNDING * max(1.0, *(t.abs().max().item() for t in wanted))


def on_cpu(tensors: tuple[Tensor, ...]) -> tuple[Tensor, ...]:
    return tuple(tensor.detach().cpu() for tensor in tensors)


@pytest.mark.parametrize("base", LAYOUTS, indirect=True)
@pytest.mark.parametrize("targets", ["all", "text.*.q,v", "vision.1.*,vision.proj", "text.token_embedding"])
def test_features_and_gradients_are_those_of_the_explicit_model(base: nn.Module, targets: str) -> None:
    """Training on a GPU makes another adapter than the formula W + s·B·A does."""
    model = copy.deepcopy(base)
    cg.apply_lora(model, targets=targets, r=3, alpha=5)
    updates = randomise_lora(model)
    model.cuda()
    pixels, ids = inputs(base, batch=6)
    encoder = Encoder(as_clip(model))
    ours = encoder.encode_image(pixels.cuda()), encoder.encode_text(ids.cuda())
    leaves = {site: (a.requires_grad_(), b.requires_grad_(), s) for site, (a, b, s) in updates.items()}
    wanted = explicit_run(base, leaves, lambda m: features(m, pixels, ids))
    assert largest(on_cpu(ours), on_cpu(wanted)) <= bound(wanted)
    loss_of(tuple(t.cpu() for t in ours)).backward()
    loss_of(wanted).backward()
    for site, layer in require_lora(model).layers.items():
        a, b, _ = leaves[str(site)]
        got = (layer.lora_A.grad.cpu(), layer.lora_B.grad.cpu())
        assert largest(got, (a.grad, b.grad)) <= bound((a.grad, b.grad)), site


@pytest.mark.parametrize("base", LAYOUTS, indirect=True)
@pytest.mark.parametrize("variant", VARIANTS)
def test_the_models_own_forward_with_an_adapter(base: nn.Module, variant: str) -> None:
    """`model.encode_text` of an adapted model gives other features on a GPU than on the CPU."""
    model = copy.deepcopy(base)
    cg.apply_lora(model, **VARIANTS[variant])
    randomise_active(model)
    pixels, ids = inputs(base)
    with torch.no_grad():
        wanted = features(model, pixels, ids)
        got = features(model.cuda(), pixels.cuda(), ids.cuda())
    assert largest(on_cpu(got), wanted) <= bound(wanted)


@pytest.mark.parametrize("base", LAYOUTS, indirect=True)
def test_bf16_stays_close(base: nn.Module) -> None:
    """`--precision amp_bf16` on a GPU changes what the model says about a picture or a caption."""
    model = copy.deepcopy(base)
    cg.apply_lora(model, **VARIANTS["plain"])
    randomise_lora(model)
    model.cuda()
    pixels, ids = (t.cuda() for t in inputs(base, batch=6))
    with torch.no_grad():
        exact, fast = (
            (encoder.encode_image(pixels), encoder.encode_text(ids))
            for encoder in (Encoder(as_clip(model)), Encoder(as_clip(model), autocast=True))
        )
    assert min(F.cosine_similarity(a, b).min() for a, b in zip(fast, exact, strict=True)) > 0.995


@pytest.mark.parametrize("base", LAYOUTS, indirect=True)
@pytest.mark.parametrize("tower", ["text", "vision"])
def test_mixed_rows_equal_single_runs(base: nn.Module, tower: str) -> None:
    """A row of a mixed batch on a GPU gets the features of another row's adapter, or of none."""
    clip = cg.Clip.over(as_clip(copy.deepcopy(base).cuda()))
    for seed, (name, options) in enumerate(VARIANTS.items()):
        cg.apply_lora(clip.model, **options, name=name.replace(" ", "-"))
        randomise_active(clip.model.cpu(), seed)
        clip.model.cuda()
    names: list[str | None] = [None, *(name.replace(" ", "-") for name in VARIANTS), "dora", None]
    rows = inputs(base, batch=len(names))[tower == "text"].cuda()
    encode = clip.encode_text if tower == "text" else clip.encode_image
    mixed = encode(rows, adapters=names)
    alone = []
    with torch.no_grad():
        for row, name in zip(rows, names, strict=True):
            cg.set_adapter(clip, name)
            alone.append(encode(row[None])[0])
    assert mixed.device.type == "cuda"
    assert largest((mixed,), (torch.stack(alone),)) <= bound((torch.stack(alone),))


@pytest.mark.parametrize("base", LAYOUTS, indirect=True)
def test_merging_is_undone_to_the_bit(base: nn.Module) -> None:
    """Merging on a GPU spoils the base for good, or gives another model than the adapter."""
    model = copy.deepcopy(base)
    cg.apply_lora(model, **VARIANTS["plain"])
    randomise_lora(model)
    model.cuda()
    pixels, ids = (t.cuda() for t in inputs(base))
    with torch.no_grad():
        adapted = features(model, pixels, ids)
        cg.merge_lora(model)
        assert largest(features(model, pixels, ids), adapted) <= bound(adapted)
    cg.unmerge_lora(model)
    cg.remove_lora(model)
    assert all(torch.equal(model.state_dict()[name].cpu(), w) for name, w in base.state_dict().items())


def fit(clip: Clip, pairs: cg.Pairs, out: Path, **options: Any) -> list[float]:
    """Losses of a short training."""
    settings: dict[str, Any] = {"batch_size": 8, "epochs": 2, "lr": 1e-2, "workers": 0, "progress": False}
    cg.fit(clip, pairs, pairs, **groups(out=out, **{**settings, **options}))
    lines = [json.loads(line) for line in (out / "events.jsonl").read_text().splitlines()]
    return [line["loss"] for line in lines if line["kind"] == "train"]


TRAININGS: dict[str, dict[str, Any]] = {
    "frozen images": {"targets": "linear-text"},
    "frozen texts": {"targets": "linear-vision"},
    "upper image blocks": {"targets": "vision.1.*"},
    "both towers": {"targets": "linear"},
    "tables": {"targets": "all"},
    "dora": {"targets": "text-attention", "use_dora": True},
}


@pytest.mark.parametrize("kind", TRAININGS)
@pytest.mark.parametrize(
    "more", [{}, {"accum_freq": 2, "batch_size": 4}, {"grad_checkpointing": True}], ids=str
)
def test_training_follows_the_cpus(
    make_clip: Callable[[str], Clip], pairs: cg.Pairs, tmp_path: Path, kind: str, more: dict[str, Any]
) -> None:
    """A GPU trains another adapter than the CPU from the same seed, batches and settings."""
    losses = {}
    for device in ("cpu", "cuda"):
        clip = make_clip("cpu")
        torch.manual_seed(0)
        cg.apply_lora(clip, r=4, dropout=0.0, **TRAININGS[kind])
        clip.to(device)
        losses[device] = fit(clip, pairs, tmp_path / device, **more)
    assert losses["cuda"] == pytest.approx(losses["cpu"], rel=2e-3)
    assert len(losses["cuda"]) == 6
    assert losses["cuda"][-1] < losses["cuda"][0]


def test_full_fine_tuning_follows_the_cpus(
    make_clip: Callable[[str], Clip], pairs: cg.Pairs, tmp_path: Path
) -> None:
    """Without LoRA a GPU trains another model than the CPU."""
    losses = {d: fit(make_clip(d), pairs, tmp_path / d, lr=1e-4) for d in ("cpu", "cuda")}
    assert losses["cuda"] == pytest.approx(losses["cpu"], rel=2e-3)


@pytest.mark.parametrize("kind", ["frozen images", "both towers", "tables"])
def test_a_resumed_run_goes_on_where_it_was(
    make_clip: Callable[[str], Clip],
    pairs: cg.Pairs,
    tmp_path: Path,
    kind: str,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """A run on a GPU that was stopped and resumed ends elsewhere than one that went through.

    Not to the same bits as on a CPU: kernels of a GPU add in an order of their own.
    """
    from clipgraft.train import loop

    def adapted() -> Clip:
        clip = make_clip("cuda")
        torch.manual_seed(0)
        cg.apply_lora(clip, r=4, dropout=0.2, **TRAININGS[kind])
        return clip

    whole, again = adapted(), adapted()
    wanted = fit(whole, pairs, tmp_path / "whole", epochs=3)
    step = loop.Loop.step

    def killed(self: Any, batch: Any, number: int) -> Any:
        if number == 6:
            raise RuntimeError("killed")
        return step(self, batch, number)

    with monkeypatch.context() as patch:
        patch.setattr(loop.Loop, "step", killed)
        with pytest.raises(RuntimeError, match="killed"):
            fit(again, pairs, tmp_path / "again", epochs=3, checkpoint_steps=2)
    resumed = adapted()
    got = fit(resumed, pairs, tmp_path / "again", epochs=3, checkpoint_steps=2, resume=True)
    assert len(got) == len(wanted) == 9
    assert got == pytest.approx(wanted, rel=2e-2)


def test_retrieval_and_features_are_the_cpus(make_clip: Callable[[str], Clip], pairs: cg.Pairs) -> None:
    """`eval` on a GPU reports another recall than on the CPU."""
    from clipgraft.data.features import encode_captions, encode_images

    captions = [caption for group in pairs.captions for caption in group]
    found = {}
    for device in ("cpu", "cuda"):
        clip = make_clip(device)
        found[device] = encode_images(clip, pairs.images, workers=0), encode_captions(clip, captions)
        metrics = cg.evaluate_retrieval(clip, pairs)
        assert 0 <= metrics["image_to_text_R@1"] <= 1
    assert largest(found["cuda"], found["cpu"]) <= ROUNDING


def test_an_encoded_folder_is_the_cpus(
    make_clip: Callable[[str], Clip], pairs: cg.Pairs, tmp_path: Path
) -> None:
    """Vectors that a GPU wrote do not fit the index that a CPU wrote."""
    import numpy as np

    vectors = []
    for device in ("cpu", "cuda"):
        cg.search.encode_folder(make_clip(device), pairs.images[0].parent, tmp_path / device, workers=0)
        vectors.append(np.load(tmp_path / device / "img_emb" / "img_emb_0.npy").astype(np.float32))
    assert vectors[0].shape == (12, 24)
    cosine = F.cosine_similarity(*(torch.from_numpy(rows) for rows in vectors))
    assert cosine.min() > 0.99999


def test_classes_are_learnt(tmp_path: Path) -> None:
    """`--task classification` fails on a GPU, or learns something else there."""
    from clipgraft.emoji.classes import write_classes

    data = cg.read_labelled(write_classes(tmp_path / "classes", "train", 2))
    prompts = [[f"a picture of a {name}"] for name in data.classes]
    losses = {}
    for device in ("cpu", "cuda"):
        clip = cg.load("emoji", device="cpu")
        torch.manual_seed(0)
        cg.apply_lora(clip, r=4, dropout=0.0, targets="linear")
        clip.to(device)
        out = tmp_path / device
        cg.fit_classifier(
            clip,
            data,
            **groups(
                prompts=prompts,
                out=out,
                batch_size=16,
                epochs=1,
                lr=1e-3,
                workers=0,
                progress=False,
                warmup=0,
            ),
        )
        lines = [json.loads(line) for line in (out / "events.jsonl").read_text().splitlines()]
        losses[device] = [line["loss"] for line in lines if line["kind"] == "train"]
    assert losses["cuda"] == pytest.approx(losses["cpu"], rel=5e-3)


def test_stock_peft_agrees(tiny_hf: nn.Module, tmp_path: Path) -> None:
    """An adapter that was trained on a GPU computes something else in PEFT."""
    import peft

    stock = copy.deepcopy(tiny_hf)
    cg.apply_lora(tiny_hf, targets="linear", r=4)
    randomise_lora(tiny_hf, size=0.2)
    tiny_hf.cuda()
    cg.save_adapter(tiny_hf, tmp_path / "adapter")
    theirs = peft.PeftModel.from_pretrained(stock, str(tmp_path / "adapter")).cuda().eval()
    pixels, ids = (t.cuda() for t in inputs(tiny_hf))
    with torch.no_grad():
        wanted = features(theirs.base_model.model, pixels, ids)
        got = features(tiny_hf, pixels, ids)
    assert largest(got, wanted) <= bound(wanted)
