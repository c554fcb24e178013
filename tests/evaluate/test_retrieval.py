from __future__ import annotations

from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from hypothesis.extra.numpy import arrays
from numpy.typing import NDArray
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode

from clipgraft.errors import ConfigError, DataError, TrainingError
from clipgraft.evaluate.ranks import RetrievalRanks, retrieval_ranks
from clipgraft.evaluate.retrieval import rank_metrics, retrieval_metrics

Problem = tuple[Tensor, Tensor, Tensor]


def naive_ranks(
    images: NDArray[Any], texts: NDArray[Any], owner: NDArray[Any]
) -> tuple[list[int], list[int]]:
    """The definition, on the full matrix: 1 + others that score at least as high as the best true item."""
    scores = texts @ images.T
    text_to_image = []
    for t, row in enumerate(scores):
        others = np.delete(row, owner[t])
        text_to_image.append(1 + int((others >= row[owner[t]]).sum()))
    image_to_text = []
    for i, column in enumerate(scores.T):
        own = owner == i
        rank = 1 + int((column[~own] >= column[own].max()).sum()) if own.any() else 0
        image_to_text.append(rank)
    return image_to_text, text_to_image


@st.composite
def integer_problems(draw: st.DrawFn) -> Problem:
    """Small integers: ties are common and floating-point arithmetic makes no error."""
    n, m, d = draw(st.integers(1, 9)), draw(st.integers(1, 12)), draw(st.integers(1, 5))
    values = st.integers(-2, 2)
    images = draw(arrays(np.float32, (n, d), elements=values))
    texts = draw(arrays(np.float32, (m, d), elements=values))
    owner = draw(arrays(np.int64, m, elements=st.integers(0, n - 1)))
    return torch.from_numpy(images), torch.from_numpy(texts), torch.from_numpy(owner)


def close_calls(n: int = 15, captions: int = 3, d: int = 33) -> Problem:
    """Unit rows with many exact copies and many last-bit neighbours: what a matrix product cannot order."""
    g = torch.Generator().manual_seed(3)
    owner = torch.arange(n * captions) % n
    distinct = torch.nn.functional.normalize(torch.randn(5, d, generator=g), dim=1)
    images = distinct[torch.randint(5, (n,), generator=g)]
    texts = distinct[torch.randint(5, (len(owner),), generator=g)]
    shuffled = texts[:, torch.randperm(d, generator=g)]
    texts = torch.where(torch.rand(len(owner), 1, generator=g) < 0.5, texts, shuffled)
    neighbours = torch.nextafter(images, torch.zeros(()))
    return torch.where(torch.rand(n, 1, generator=g) < 0.5, images, neighbours), texts, owner


def lists(ranks: RetrievalRanks) -> tuple[list[int], list[int]]:
    return ranks.image_to_text.tolist(), ranks.text_to_image.tolist()


@settings(deadline=None, max_examples=50)
@given(integer_problems(), st.integers(8, 400))
def test_ranks_follow_the_definition_with_ties(problem: Problem, block_bytes: int) -> None:
    """Reported recall is not the recall: ties, several captions or block edges are counted wrongly."""
    images, texts, owner = problem
    expected = naive_ranks(images.double().numpy(), texts.double().numpy(), owner.numpy())
    assert lists(retrieval_ranks(images, texts, owner, block_bytes=block_bytes)) == expected


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, torch.float32, torch.float64])
def test_random_features_in_every_precision(dtype: torch.dtype) -> None:
    """Features saved in half precision give other numbers than the same values in double."""
    g = torch.Generator().manual_seed(0)
    owner = torch.randint(30, (70,), generator=g)
    images, texts = torch.randn(30, 16, generator=g).to(dtype), torch.randn(70, 16, generator=g).to(dtype)
    expected = naive_ranks(images.double().numpy(), texts.double().numpy(), owner.numpy())
    assert lists(retrieval_ranks(images, texts, owner, block_bytes=1000)) == expected


@pytest.mark.parametrize("block_bytes", [8, 100, 1016, 2**20])
def test_block_size_changes_nothing(block_bytes: int) -> None:
    """The same model scores differently on a machine with less memory."""
    problem = close_calls()
    assert lists(retrieval_ranks(*problem, block_bytes=block_bytes)) == lists(retrieval_ranks(*problem))


@settings(deadline=None, max_examples=50)
@given(st.integers(0, 2**31))
def test_row_order_changes_nothing(seed: int) -> None:
    """Shuffling the CSV changes the score."""
    images, texts, owner = close_calls()
    g = torch.Generator().manual_seed(seed)
    i, t = torch.randperm(len(images), generator=g), torch.randperm(len(texts), generator=g)
    place = torch.argsort(i)
    plain = retrieval_ranks(images, texts, owner)
    shuffled = retrieval_ranks(images[i], texts[t], place[owner[t]], block_bytes=4000)
    assert torch.equal(shuffled.image_to_text, plain.image_to_text[i])
    assert torch.equal(shuffled.text_to_image, plain.text_to_image[t])


def test_collapsed_model_gets_nothing() -> None:
    """A broken model that returns one vector for everything is reported as perfect."""
    vector = torch.nn.functional.normalize(torch.randn(1, 19, generator=torch.Generator().manual_seed(1)))
    owner = torch.arange(50) // 2
    metrics = retrieval_metrics(vector.repeat(25, 1), vector.repeat(50, 1), owner, ks=(1, 10))
    assert metrics["text_to_image_R@10"] == metrics["image_to_text_R@10"] == 0.0
    assert metrics["text_to_image_mean_rank"] == 25
    assert metrics["image_to_text_mean_rank"] == 49


def test_equal_caption_of_another_image_counts_against() -> None:
    """Templated captions shared by many images look solved although nobody could tell them apart."""
    images = torch.eye(3)
    texts = torch.tensor([[1.0, 0, 0], [1.0, 0, 0], [0, 0, 1.0]])
    ranks = retrieval_ranks(images, texts, torch.tensor([0, 1, 2]))
    assert ranks.image_to_text.tolist() == [2, 3, 1]
    assert ranks.text_to_image.tolist() == [1, 3, 1]


def test_best_of_several_captions_counts() -> None:
    """With five captions an image, one poor caption spoils an image that is found by another."""
    images = torch.eye(2)
    texts = torch.tensor([[0.1, 0.9], [0.8, 0.0], [0.8, 0.0], [0.3, 0.7]])
    ranks = retrieval_ranks(images, texts, torch.tensor([0, 0, 0, 1]))
    assert ranks.image_to_text.tolist() == [1, 2]


def test_image_without_caption_is_a_distractor_only() -> None:
    """Images without captions drag recall down, or vanish from the gallery and make it easier."""
    images = torch.tensor([[1.0, 0.0], [2.0, 0.0], [0.0, 1.0]])
    texts = torch.tensor([[1.0, 0.0], [0.0, 1.0]])
    owner = torch.tensor([0, 2])
    assert lists(retrieval_ranks(images, texts, owner)) == ([1, 0, 1], [2, 1])
    assert retrieval_metrics(images, texts, owner, ks=(1,))["image_to_text_R@1"] == 1.0


def test_numbers_are_open_clips_without_ties() -> None:
    """Runs logged by open_clip and by clipgraft cannot be compared."""
    rng = np.random.default_rng(5)
    images = rng.standard_normal((60, 12))
    texts = images + 1.5 * rng.standard_normal((60, 12))
    ours = retrieval_metrics(torch.from_numpy(images), torch.from_numpy(texts), torch.arange(60))
    for name, logits in (("image_to_text", images @ texts.T), ("text_to_image", texts @ images.T)):
        order = np.argsort(-logits, axis=1).tolist()
        position = np.array([row.index(query) for query, row in enumerate(order)])
        assert ours[f"{name}_mean_rank"] == pytest.approx(position.mean() + 1)
        assert ours[f"{name}_median_rank"] == np.floor(np.median(position)) + 1
        for k in (1, 5, 10):
            assert ours[f"{name}_R@{k}"] == np.mean(position < k)


@settings(deadline=None, max_examples=50)
@given(st.lists(st.integers(1, 30), min_size=1, max_size=30))
def test_rank_metrics_follow_open_clip(ranks: list[int]) -> None:
    """Mean or median rank is off by one or rounds the other way than open_clip's."""
    zero_based = np.array(ranks) - 1
    got = rank_metrics(torch.tensor(ranks), ks=(3,))
    assert got["mean_rank"] == pytest.approx(zero_based.mean() + 1)
    assert got["median_rank"] == np.floor(np.median(zero_based)) + 1
    assert got["R@3"] == np.mean(zero_based < 3)


class LargestTensor(TorchDispatchMode):
    """Remembers the bytes of the largest tensor any operation returned."""

    def __init__(self) -> None:
        super().__init__()
        self.bytes = 0

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        result = func(*args, **(kwargs or {}))
        for value in result if isinstance(result, tuple | list) else [result]:
            if isinstance(value, Tensor):
                self.bytes = max(self.bytes, value.untyped_storage().nbytes())
        return result


@pytest.mark.parametrize("collapsed", [False, True])
def test_memory_does_not_grow_with_the_square(collapsed: bool) -> None:
    """Evaluating 100,000 images needs 80 GB."""
    block, largest = 16384, []
    for n in (200, 400):
        features = torch.randn(n, 8, generator=torch.Generator().manual_seed(n))
        features = features[:1].repeat(n, 1) if collapsed else features
        with LargestTensor() as mode:
            retrieval_ranks(features, features, torch.arange(n), block_bytes=block)
        largest.append(mode.bytes)
    assert max(largest) <= 4 * block < 200 * 200 * 8


def test_result_is_the_same_under_autocast_and_grad() -> None:
    """Evaluating inside a bf16 training step rounds the scores or keeps a graph."""
    images, texts, owner = close_calls()
    with torch.autocast("cpu", dtype=torch.bfloat16):
        inside = retrieval_ranks(images.requires_grad_(), texts.requires_grad_(), owner)
    assert lists(inside) == lists(retrieval_ranks(images, texts, owner))
    assert not inside.text_to_image.requires_grad


@pytest.mark.parametrize("value", [float("nan"), float("inf")])
@pytest.mark.parametrize("kind", ["image", "text"])
def test_broken_features_are_named(kind: str, value: float) -> None:
    """A model that diverged to NaN is reported with recall 100 %."""
    features = {"image": torch.ones(4, 3), "text": torch.ones(4, 3)}
    features[kind][2, 1] = value
    with pytest.raises(
        TrainingError, match=rf"{kind} features hold NaN or infinity in 1 of 4 rows .*row 2\)"
    ):
        retrieval_ranks(features["image"], features["text"], torch.arange(4))


@pytest.mark.parametrize(
    ("images", "texts", "owner", "message"),
    [
        (torch.ones(2, 3), torch.ones(2, 4), torch.arange(2), "3 columns and text features 4"),
        (torch.ones(2, 3), torch.ones(2, 3), torch.arange(3), r"shape \(3,\) for 2 captions"),
        (torch.ones(2, 3), torch.ones(2, 3), torch.ones(2), "float32"),
        (torch.ones(2, 3), torch.ones(2, 3), torch.tensor([0, 2]), r"image_of_text\[1\] is 2.*0 to 1"),
        (torch.ones(2, 3), torch.ones(2, 3), torch.tensor([-1, 0]), r"image_of_text\[0\] is -1"),
        (torch.ones(0, 3), torch.ones(2, 3), torch.arange(2), r"image features .* shape \(0, 3\)"),
        (
            torch.ones(2, 3),
            torch.ones(2, 3, dtype=torch.long),
            torch.arange(2),
            "text features are torch.int64",
        ),
    ],
)
def test_inputs_that_do_not_fit(images: Tensor, texts: Tensor, owner: Tensor, message: str) -> None:
    """A mistake in the caller's indices surfaces as a crash deep inside, or as a wrong number."""
    with pytest.raises(DataError, match=message):
        retrieval_metrics(images, texts, owner)


def test_impossible_settings_are_refused() -> None:
    """`--recall-k 0` or a zero block size hangs or returns nonsense."""
    features = torch.eye(2)
    with pytest.raises(ConfigError, match="recall@0"):
        retrieval_metrics(features, features, torch.arange(2), ks=(1, 0))
    with pytest.raises(ConfigError, match="at least 8"):
        retrieval_metrics(features, features, torch.arange(2), block_bytes=7)
    with pytest.raises(DataError, match="no query"):
        rank_metrics(torch.empty(0, dtype=torch.long))
