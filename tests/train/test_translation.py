"""A language learnt from translations: the loss and its gradients beside stock transformers and PEFT."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor

import clipgraft as cg
from clipgraft.data.features import encode_captions, encode_images
from clipgraft.data.translations import Translations
from clipgraft.engine.encoder import Encoder
from clipgraft.errors import ConfigError, DataError
from clipgraft.models.clip import Clip, as_clip
from clipgraft.train.args import RunArgs, TrainArgs, TranslateArgs
from clipgraft.train.gradient_cache import contrastive_backward
from clipgraft.train.inputs import Inputs
from clipgraft.train.recipes.pair_losses import SoftmaxLoss
from clipgraft.train.recipes.translation import TranslationRecipe
from clipgraft.train.setup import Setup
from fitting import groups

pytestmark = pytest.mark.filterwarnings("ignore:.is_gradient_checkpointing.:FutureWarning")
MakeClip = Callable[[], Clip]
TEXTS = Translations(
    tuple(f"thing number {n}" for n in range(24)),
    tuple((f"vật thứ {n}", f"số {n} đây") if n % 3 else (f"vật thứ {n}",) for n in range(24)),
)
HELD_OUT = Translations(
    tuple(f"thing number {n}" for n in range(24, 32)), tuple((f"vật thứ {n}",) for n in range(24, 32))
)
QUICK: dict[str, Any] = {"batch_size": 8, "epochs": 6, "lr": 1e-2, "workers": 0, "progress": False}


def adapted(clip: Clip, targets: str = "text-matrices", started: bool = False, **options: Any) -> Clip:
    torch.manual_seed(0)
    cg.apply_lora(clip, r=4, targets=targets, **options)
    for name, parameter in clip.model.named_parameters():
        zero = "lora_B" if "token_embedding" not in name else "lora_A"
        if started and zero in name:
            torch.nn.init.normal_(parameter, std=0.1)
    return clip


def fit(clip: Clip, out: Path, val: Translations | None = None, **options: Any) -> cg.train.FitResult:
    mixed = {name: options.pop(name) for name in ("pairs", "val_pairs") if name in options}
    return cg.fit_translations(clip, TEXTS, val, **mixed, **groups(out=out, **{**QUICK, **options}))


def prepared(recipe: TranslationRecipe, clip: Clip) -> Inputs:
    setup = Setup(clip, TrainArgs(batch_size=16), RunArgs(out=Path("unused")), cg.FeatureArgs(workers=0))
    return recipe.prepare(setup, Encoder(clip))


@pytest.mark.parametrize("targets", ["text-matrices", "text.token_embedding"])
def test_loss_and_gradients_are_those_of_peft(
    targets: str, hf_clip: Clip, hf_folder: Path, tmp_path: Path
) -> None:
    """What is minimised would not be the distance to the base's features of the sources, or not all of it."""
    from peft import PeftModel
    from transformers import CLIPModel

    clip = adapted(hf_clip, targets, started=True)
    cg.save_adapter(clip, tmp_path / "adapter")
    recipe = TranslationRecipe(TEXTS)
    inputs = prepared(recipe, clip)
    objective, (batch, *_) = recipe.objective(inputs), list(inputs.feed.batches(0, 0))
    loss = contrastive_backward(objective.parts(batch), objective.loss(batch))

    def features(model: Any, texts: list[str]) -> Tensor:
        return F.normalize(model.get_text_features(clip.tokenize(texts)).pooler_output, dim=1)

    rows = [
        (TEXTS.sources[image], inputs.feed.captions[caption])
        for image, caption in zip(batch[0].image_ids, batch[0].caption_ids, strict=True)
    ]
    assert {source == text for source, text in rows} == {True, False}
    with torch.no_grad():
        wanted = features(CLIPModel.from_pretrained(hf_folder), [source for source, _ in rows])
    base = CLIPModel.from_pretrained(hf_folder)
    student = PeftModel.from_pretrained(base, str(tmp_path / "adapter"), is_trainable=True)
    own = 1 - (features(student.base_model.model, [text for _, text in rows]) * wanted).sum(1).mean()
    own.backward()
    assert loss.item() == pytest.approx(own.item(), abs=1e-5)
    theirs = {n: p.grad for n, p in student.named_parameters() if p.grad is not None}
    ours = [p.grad for p in clip.model.parameters() if p.grad is not None]
    assert len(theirs) == len(ours) > 0
    norms = [sorted(float(grad.norm()) for grad in grads) for grads in (theirs.values(), ours)]
    assert norms[0] == pytest.approx(norms[1], rel=1e-3, abs=1e-6)


def test_pairs_and_translations_by_hand(clip: Clip, pairs: cg.Pairs) -> None:
    """Pairs would be contrasted with source texts, or the two losses not be weighed by their rows."""
    clip = adapted(clip, started=True)
    recipe = TranslationRecipe(TEXTS, pictures=pairs, options=TranslateArgs(translation_weight=3.0))
    inputs = prepared(recipe, clip)
    (batch, *_) = inputs.feed.batches(0, 0)
    objective = recipe.objective(inputs)
    (images, texts), *_ = [encode() for encode in objective.parts(batch)]
    found = objective.loss(batch)(images, texts)
    ids, captions = batch[0].image_ids, batch[0].caption_ids
    of_pairs = ids < len(pairs)
    assert 2 <= int(of_pairs.sum()) < len(ids)
    with cg.lora_disabled(clip):
        gallery = encode_images(clip, pairs.images, workers=0)
        wanted = encode_captions(clip, [TEXTS.sources[n - len(pairs)] for n in ids[~of_pairs]])
    distance = 1 - F.cosine_similarity(texts[~of_pairs], wanted).mean()
    unit, scale = F.normalize(texts[of_pairs], dim=1), clip.logit_scale.exp()
    logits = scale * unit @ gallery.T
    owners = {
        caption: {image for image, group in enumerate(pairs.captions) if caption in group}
        for caption in {text for group in pairs.captions for text in group}
    }
    for row, (image, caption) in enumerate(
        zip(ids[of_pairs].tolist(), captions[of_pairs].tolist(), strict=True)
    ):
        for other in owners[inputs.feed.captions[caption]] - {image}:
            logits[row, other] = -torch.inf
    to_image = F.cross_entropy(logits, ids[of_pairs])
    in_batch = SoftmaxLoss(clip.logit_scale)
    both = in_batch(gallery[ids[of_pairs]], unit, ids[of_pairs], captions[of_pairs])
    back = in_batch_to_image(clip, gallery[ids[of_pairs]], unit, ids[of_pairs], captions[of_pairs])
    contrast = both - back / 2 + to_image / 2
    share = float(of_pairs.float().mean())
    by_hand = share * contrast + (1 - share) * 3 * distance
    assert found.item() == pytest.approx(by_hand.item(), rel=1e-4)


def in_batch_to_image(
    clip: Clip, images: Tensor, texts: Tensor, image_ids: Tensor, caption_ids: Tensor
) -> Tensor:
    """Cross-entropy of captions among the images of the batch, which the gallery replaces."""
    logits = clip.logit_scale.exp() * texts @ images.T
    same = (image_ids[:, None] == image_ids) | (caption_ids[:, None] == caption_ids)
    return F.cross_entropy(
        logits.masked_fill(same.fill_diagonal_(False), -torch.inf), torch.arange(len(texts))
    )


def test_the_adapter_opens_in_peft_and_the_text_tower_alone_learns_the_same(
    hf_clip: Clip, hf_folder: Path, tmp_path: Path
) -> None:
    """An embedding-only adapter could not be used elsewhere, or learning would need an image tower."""
    from peft import PeftModel
    from transformers import CLIPModel, CLIPTextModelWithProjection

    result = fit(adapted(hf_clip, "text.token_embedding"), tmp_path / "whole", HELD_OUT)
    assert result.metrics["teacher_cosine"] > (result.base or {})["teacher_cosine"]
    assert {"source_to_target_R@1", "target_to_source_R@1"} <= set(result.metrics)
    assert result.verdict is not None
    assert "8 sentences" in str(result.verdict)
    texts = [text for group in HELD_OUT.targets for text in group]
    stock = PeftModel.from_pretrained(CLIPModel.from_pretrained(hf_folder), str(result.saved)).eval()
    with torch.no_grad():
        theirs = F.normalize(
            stock.base_model.model.get_text_features(hf_clip.tokenize(texts)).pooler_output, dim=1
        )
    assert torch.allclose(theirs, encode_captions(hf_clip, texts), atol=1e-5)
    model = CLIPTextModelWithProjection.from_pretrained(hf_folder, projection_dim=24)
    tower = replace(as_clip(model), tokenizer=hf_clip.tokenizer)
    fit(adapted(tower, "text.token_embedding"), tmp_path / "alone", HELD_OUT, strength="none")
    now, whole = encode_captions(tower, texts), encode_captions(hf_clip, texts)
    # The same but for rounding, which Adam at this rate makes larger.
    assert F.cosine_similarity(now, whole).min() > 0.999


def test_a_resumed_run_ends_with_the_same_bits(make_clip: MakeClip, pairs: cg.Pairs, tmp_path: Path) -> None:
    """What the translations are taught would be what an adapter of the broken run gave, or rows be others."""
    constant = {"lr_scheduler": "const", "warmup": 0, "pairs": pairs, "epochs": 4}
    whole, broken, again = (adapted(make_clip(), dropout=0.1) for _ in range(3))
    fit(whole, tmp_path / "whole", **constant)
    fit(broken, tmp_path / "broken", **{**constant, "epochs": 2})
    fit(again, tmp_path / "broken", **constant, resume=True)
    left, right = (cg.adapters.lora_state_dict(clip) for clip in (whole, again))
    assert all(torch.equal(left[name], right[name]) for name in left)


def test_pictures_are_what_a_run_is_judged_by(clip: Clip, pairs: cg.Pairs, tmp_path: Path) -> None:
    """With pictures to validate on, the best epoch would be chosen by sentences."""
    result = fit(adapted(clip), tmp_path / "run", HELD_OUT, val_pairs=pairs, pairs=pairs, epochs=2)
    assert {"text_to_image_R@1", "target_to_source_R@1", "teacher_cosine"} <= set(result.metrics)
    assert result.verdict is not None
    assert set(result.verdict.by_metric) == {"image_to_text_R@1", "text_to_image_R@1"}


@pytest.mark.parametrize(
    ("targets", "said"), [("vision-attention", "it is frozen"), ("attention", "the image tower is to train")]
)
def test_other_towers_are_refused(targets: str, said: str, clip: Clip, tmp_path: Path) -> None:
    """The image tower would be changed by texts alone, or nothing learn anything."""
    with pytest.raises(ConfigError, match=said):
        fit(adapted(clip, targets), tmp_path / "run")


def test_what_would_do_nothing_is_refused(clip: Clip, pairs: cg.Pairs, tmp_path: Path) -> None:
    """Crops that are asked for would not be made, or pairs that tell nothing apart count for nothing."""
    with pytest.raises(ConfigError, match="drop `augment`"):
        fit(adapted(clip), tmp_path / "run", pairs=pairs, augment=True)
    same = cg.Pairs(pairs.images, tuple(("a picture",) for _ in pairs.images))
    with pytest.raises(DataError, match="captions are the same"):
        fit(clip, tmp_path / "other", pairs=same)
