"""Adapters of towers of transformers, of the user's own, and of a tower alone learn, and are measured."""

from __future__ import annotations

import json
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import pytest
import torch
from PIL import Image
from torch import Tensor, nn

import clipgraft as cg
from clipgraft.errors import ConfigError, DataError, ModelError, TargetError
from clipgraft.models import DualEncoder, FeatureTable
from clipgraft.models.clip import as_clip
from fitting import groups
from tiny_dual import PAIRS, build, padding_of
from weight_places import CONTEXT, DIM, SIZE

COLOURS = ["red", "green", "blue", "white", "black", "yellow", "pink", "grey"]


class Words:
    """A tokenizer of a few words: each is an id, and the rest is padding."""

    def __init__(self, padding: int) -> None:
        self.padding = padding

    def __call__(self, texts: Sequence[str]) -> Tensor:
        ids = torch.full((len(texts), CONTEXT), self.padding)
        for row, text in enumerate(texts):
            words = [10 + COLOURS.index(word) if word in COLOURS else 5 for word in text.split()]
            ids[row, : len(words) + 1] = torch.tensor([*words, 99])
        return ids

    def count(self, texts: Sequence[str]) -> list[int]:
        return [len(text.split()) + 1 for text in texts]


def preprocess(image: Any) -> Tensor:
    values = torch.tensor(list(image.resize((SIZE, SIZE)).tobytes()), dtype=torch.float32)
    return values.view(SIZE, SIZE, 3).permute(2, 0, 1) / 128 - 1


@pytest.fixture
def pairs(tmp_path: Path) -> cg.Pairs:
    """One picture a colour."""
    folder = tmp_path / "images"
    folder.mkdir()
    for colour in COLOURS:
        Image.new("RGB", (40, 36), colour).save(folder / f"{colour}.png")
    return cg.Pairs(
        [folder / f"{colour}.png" for colour in COLOURS], [(f"a {colour} one",) for colour in COLOURS]
    )


def ready(model: nn.Module, name: str) -> cg.Clip:
    """A model with a tokenizer and preprocessing, as `load` or the user gives them."""
    clip = cg.Clip.over(as_clip(model))
    clip.tokenizer, clip.preprocess = Words(padding_of(name)), preprocess
    return clip


def fit(model: Any, pairs: cg.Pairs, out: Path, **options: Any) -> list[float]:
    """The training loss of every step."""
    settings: dict[str, Any] = {
        "batch_size": 8,
        "epochs": 12,
        "lr": 1e-2,
        "warmup": 0,
        "workers": 0,
        "progress": False,
        "strength": "none",
    }
    cg.fit(model, pairs, pairs, **groups(out=out, **{**settings, **options}))
    lines = [json.loads(line) for line in (out / "events.jsonl").read_text().splitlines()]
    return [line["loss"] for line in lines if line["kind"] == "train"]


@pytest.mark.parametrize("name", PAIRS)
def test_whole_models_learn_and_are_saved(name: str, pairs: cg.Pairs, tmp_path: Path) -> None:
    """Towers of the user's own are trained for hours, and saving them ends in a traceback."""
    model = build(name)
    losses = fit(ready(model, name), pairs, tmp_path / "run", epochs=2, lr=1e-4)
    assert len(losses) == 2
    saved = Path(json.loads((tmp_path / "run" / "results.json").read_text())["saved"])
    if saved.is_file():
        found = torch.load(saved, weights_only=True)["state_dict"]
        assert all(torch.equal(found[key], weight) for key, weight in model.state_dict().items())
    else:
        again = ready(type(model).from_pretrained(saved), name)  # type: ignore[attr-defined]
        assert cg.evaluate_retrieval(again, pairs) == cg.evaluate_retrieval(ready(model, name), pairs)


@pytest.mark.parametrize("name", PAIRS)
def test_adapters_learn(name: str, pairs: cg.Pairs, tmp_path: Path) -> None:
    """An adapter on such a model does not learn, or what is saved is not what was trained."""
    clip = ready(build(name), name)
    cg.apply_lora(clip, r=4, targets="text-linear,vision-linear,text.token_embedding")
    losses = fit(clip, pairs, tmp_path / "run")
    assert losses[-1] < 0.7 * losses[0]
    again = ready(build(name), name)
    cg.load_adapter(again, tmp_path / "run")
    assert cg.evaluate_retrieval(clip, pairs) == cg.evaluate_retrieval(again, pairs)


def table_of(model: nn.Module, name: str, pairs: cg.Pairs) -> Tensor:
    with torch.no_grad():
        return ready(model, name).encode_image(pairs.images)


@pytest.mark.parametrize("name", ["CLIPTextModel", "CLIPTextModelWithProjection"])
def test_a_text_tower_alone_learns_from_features(name: str, pairs: cg.Pairs, tmp_path: Path) -> None:
    """A text encoder alone cannot be trained against features of images that were computed elsewhere."""
    vision = "CLIPVisionModel" + name.removeprefix("CLIPTextModel")
    features = table_of(build(vision), vision, pairs)
    tower = build(name)
    model = DualEncoder(
        FeatureTable(pairs.images, features), tower, tokenizer=Words(padding_of(name)), preprocess=None
    )
    cg.apply_lora(model, r=4, targets="text-linear")
    losses = fit(model, pairs, tmp_path / "run", epochs=40)
    assert losses[-1] < 0.7 * losses[0]
    assert cg.evaluate_retrieval(model, pairs)["image_to_text_R@1"] > 0.5


def test_an_image_tower_alone_learns_from_features(pairs: cg.Pairs, tmp_path: Path) -> None:
    """An image encoder alone cannot be trained against features of captions."""
    captions = [texts[0] for texts in pairs.captions]
    table = FeatureTable(
        captions, torch.randn(len(captions), DIM, generator=torch.Generator().manual_seed(0))
    )
    model = DualEncoder(build("CLIPVisionModelWithProjection"), table, preprocess=preprocess)
    cg.apply_lora(model, r=4, targets="vision-linear")
    losses = fit(model, pairs, tmp_path / "run")
    assert losses[-1] < 0.7 * losses[0]


def test_a_table_lacks_what_it_was_not_given(pairs: cg.Pairs) -> None:
    """Images without features are given others', or the message names none."""
    table = FeatureTable(pairs.images[:-1], torch.ones(7, 4))
    assert table.look_up(pairs.images[:2]).shape == (2, 4)
    with pytest.raises(DataError, match=r"lacks 1 of 8 entries, first .*grey\.png"):
        table.look_up(pairs.images)
    with pytest.raises(DataError, match="8 keys, features"):
        FeatureTable(pairs.images, torch.ones(7, 4))
    with pytest.raises(ModelError, match="encodes nothing new"):
        table(torch.ones(1))


@pytest.mark.parametrize(("name", "other"), [("CLIPTextModel", "image"), ("CLIPVisionModel", "text")])
def test_a_tower_alone_says_what_it_lacks(name: str, other: str, pairs: cg.Pairs, tmp_path: Path) -> None:
    """What needs the other tower fails deep inside, or says nothing of what to do."""
    clip = ready(build(name), name)
    cg.apply_lora(clip, r=2, targets="attention")
    ask = {
        "image": lambda: clip.encode_image(torch.zeros(1, 3, SIZE, SIZE)),
        "text": lambda: clip.encode_text(torch.zeros(1, CONTEXT, dtype=torch.long)),
    }[other]
    doing = (ask, lambda: fit(clip, pairs, tmp_path / "run"), lambda: cg.evaluate_retrieval(clip, pairs))
    for action in doing:
        with pytest.raises(
            ModelError, match=f"tower alone and has no {other} tower: use the whole CLIPModel"
        ):
            action()
    with pytest.raises(ConfigError, match="no temperature"):
        cg.apply_lora(build(name), train_logit_scale=True)
    foreign = {"image": "vision", "text": "text"}[other]
    with pytest.raises(TargetError, match=f"'{foreign}-attention' matches no site .* in its .* tower"):
        cg.apply_lora(build(name), targets=f"{foreign}-attention")
