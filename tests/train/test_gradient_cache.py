"""Accumulated gradients are those of the whole batch, dropout included."""

from __future__ import annotations

from collections.abc import Callable, Sequence

import pytest
import torch
from torch import Tensor, nn

import clipgraft as cg
from clipgraft.data.features import encode_images
from clipgraft.engine.attention import AttentionKernels
from clipgraft.engine.encoder import Encoder
from clipgraft.models.clip import Clip
from clipgraft.train.feed import Feed, FixedImages, LiveImages, LiveTexts, MicroBatch, Tower
from clipgraft.train.gradient_cache import contrastive_backward
from clipgraft.train.recipes.pair_losses import SoftmaxLoss

MakeClip = Callable[[], Clip]
SITES = "text.*.*,vision.*.*,vision.proj,text.proj"


def grafted(make_clip: MakeClip, dropout: float, targets: str = SITES) -> Clip:
    """A training-mode model whose adapters already do something."""
    clip = make_clip()
    torch.manual_seed(1)
    cg.apply_lora(clip, r=4, dropout=dropout, targets=targets, train_logit_scale=True)
    for name, parameter in clip.model.named_parameters():
        if "lora_B" in name:
            nn.init.normal_(parameter, std=0.1)
    return clip.train()


def loss_of(clip: Clip, batch: Sequence[MicroBatch]) -> Callable[[Tensor, Tensor], Tensor]:
    images = torch.cat([part.image_ids for part in batch])
    captions = torch.cat([part.caption_ids for part in batch])
    return lambda a, b: SoftmaxLoss(clip.logit_scale)(a, b, images, captions)


def encoders(
    images: Tower, texts: Tower, batch: Sequence[MicroBatch]
) -> list[Callable[[], tuple[Tensor, Tensor]]]:
    return [lambda part=part: (images(part), texts(part)) for part in batch]


def gradients(clip: Clip) -> dict[str, Tensor]:
    return {n: p.grad.clone() for n, p in clip.model.named_parameters() if p.grad is not None}


def assert_same(found: dict[str, Tensor], wanted: dict[str, Tensor], relative: float = 1e-6) -> None:
    assert found.keys() == wanted.keys()
    for name, gradient in wanted.items():
        error = (found[name] - gradient).norm() / gradient.norm().clamp_min(1e-12)
        assert error <= relative, f"{name}: {error:.2e}"


def first_batch(
    clip: Clip, pairs: cg.Pairs, batch_size: int, accum_freq: int
) -> tuple[Feed, list[MicroBatch]]:
    feed = Feed(pairs, batch_size, accum_freq, 0, clip.preprocess, 0)
    return feed, next(feed.batches(0, 0))


def test_accumulation_equals_one_big_batch(make_clip: MakeClip, pairs: cg.Pairs) -> None:
    """`--accum-freq 4 --batch-size 6` would train something else than `--batch-size 24`."""
    found = []
    for batch_size, accum_freq in ((24, 1), (6, 4)):
        clip = grafted(make_clip, dropout=0.0)
        clip.model.double()
        clip.logit_scale.data = clip.logit_scale.data.double()
        feed, batch = first_batch(clip, pairs, batch_size, accum_freq)
        towers = LiveImages(Encoder(clip)), LiveTexts(Encoder(clip), feed.captions)
        loss = contrastive_backward(encoders(*towers, batch), loss_of(clip, batch))
        found.append((loss, gradients(clip)))
    torch.testing.assert_close(found[0][0], found[1][0], rtol=1e-6, atol=1e-6)
    assert_same(found[1][1], found[0][1])


@pytest.mark.parametrize(("dropout", "autocast"), [(0.0, False), (0.4, False), (0.4, True)])
def test_two_passes_equal_one_graph_over_all_micro_batches(
    make_clip: MakeClip, pairs: cg.Pairs, dropout: float, autocast: bool
) -> None:
    """With dropout the second pass must see the masks of the first, or gradients are of another loss."""
    found, kernels = [], AttentionKernels()
    for together in (True, False):
        clip = grafted(make_clip, dropout)
        encoder = Encoder(clip, autocast, kernels)
        feed, batch = first_batch(clip, pairs, 6, 4)
        parts = encoders(LiveImages(encoder), LiveTexts(encoder, feed.captions), batch)
        torch.manual_seed(3)
        if together:
            features = [encode() for encode in parts]
            loss = loss_of(clip, batch)(
                torch.cat([i for i, _ in features]), torch.cat([t for _, t in features])
            )
            loss.backward()
        else:
            loss = contrastive_backward(parts, loss_of(clip, batch))
        found.append((loss.detach(), gradients(clip), torch.rand(1)))
    assert torch.equal(found[0][0], found[1][0])
    assert_same(found[1][1], found[0][1], 1e-5)
    assert torch.equal(found[0][2], found[1][2]), "the random stream goes on as after one pass"


def test_a_cached_image_tower_changes_nothing(make_clip: MakeClip, pairs: cg.Pairs) -> None:
    """Encoding frozen images once is only allowed if loss and gradients stay what they were."""
    found = []
    for cached in (True, False):
        clip = grafted(make_clip, 0.0, "text.*.*").eval()
        feed, batch = first_batch(clip, pairs, 12, 1)
        images: Tower = LiveImages(Encoder(clip))
        if cached:
            images = FixedImages(encode_images(clip, pairs.images, workers=0, exact_preprocess=True))
        parts = encoders(images, LiveTexts(Encoder(clip), feed.captions), batch)
        found.append((contrastive_backward(parts, loss_of(clip, batch)), gradients(clip)))
    torch.testing.assert_close(found[0][0], found[1][0], rtol=1e-6, atol=1e-6)
    assert_same(found[0][1], found[1][1], 1e-5)


def test_no_padding_is_computed(clip: Clip, pairs: cg.Pairs) -> None:
    """Short captions would cost as much as 77 tokens, or leaving padding out would change the features."""
    feed, (batch,) = first_batch(clip, pairs, 6, 1)
    texts = LiveTexts(Encoder(clip), feed.captions)
    packed = texts.encoder.pack(texts.tokens[batch.caption_ids])
    with torch.no_grad():
        short = texts(batch)
        whole = clip.model.encode_text(clip.tokenize([feed.captions[i] for i in batch.caption_ids.tolist()]))
    words = sum(clip.count_tokens([feed.captions[i] for i in batch.caption_ids.tolist()]))
    assert packed is not None
    # The start token, which all captions share, is computed once.
    assert packed.count <= words - len(batch.caption_ids) + 1
    torch.testing.assert_close(short, whole, rtol=1e-5, atol=1e-5)
