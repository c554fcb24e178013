"""Products with a known error: the bound holds, and ranks do not depend on which product is taken."""

from __future__ import annotations

import threading
from collections.abc import Iterator
from fractions import Fraction

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from clipgraft.evaluate import ranks, scores
from clipgraft.evaluate.ranks import retrieval_ranks
from clipgraft.evaluate.scores import Exact, Int8Products, Products, identities, measured, usable_types

INT8, BF16, FP32, FP64 = torch.int8, torch.bfloat16, torch.float32, torch.float64
LADDERS = [[FP64], [FP32, FP64], [BF16, FP64], [INT8, BF16, FP32, FP64]]


def normal(*shape: int, seed: int) -> Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed))


def naive(images: Tensor, texts: Tensor, owner: Tensor) -> tuple[list[int], list[int]]:
    """The definition in exact fractions."""
    rows = [
        [[Fraction(value) for value in row] for row in side.double().tolist()] for side in (texts, images)
    ]
    table = [[sum(a * b for a, b in zip(t, i, strict=True)) for i in rows[1]] for t in rows[0]]
    owners = owner.tolist()
    to_image = [sum(score >= row[own] for score in row) for row, own in zip(table, owners, strict=True)]
    to_text = []
    for i in range(len(images)):
        best = max((row[i] for row, own in zip(table, owners, strict=True) if own == i), default=None)
        others = [row[i] for row, own in zip(table, owners, strict=True) if own != i]
        to_text.append(0 if best is None else 1 + sum(score >= best for score in others))
    return to_text, to_image


@pytest.mark.parametrize("dtype", [BF16, FP32, FP64])
@given(seed=st.integers(0, 2**31), columns=st.integers(1, 70), exponent=st.integers(-60, 60))
@settings(max_examples=25)
def test_no_score_is_off_by_more_than_the_bound(
    dtype: torch.dtype, seed: int, columns: int, exponent: int
) -> None:
    """A rival would be taken for settled that rounding has put on the wrong side."""
    left = measured(normal(5, columns, seed=seed) * 2.0**exponent, "text", 1000)
    right = measured(normal(4, columns, seed=seed + 1), "image", 1000)
    product = Products(left, right, dtype, 1000)
    got = product.block(slice(0, 5), slice(0, 4)).double().tolist()
    wide = [v.take(slice(None), FP64).tolist() for v in (left, right)]
    for a, row in enumerate(wide[0]):
        for b, column in enumerate(wide[1]):
            exact = sum(Fraction(x) * Fraction(y) for x, y in zip(row, column, strict=True))
            stored = abs(got[a][b]) / 128 if dtype == BF16 else 0
            assert abs(Fraction(got[a][b]) - exact) <= product.left_slack[a].item() + stored
            assert abs(Fraction(got[a][b]) - exact) <= product.right_slack[b].item() + stored
            if dtype != BF16:
                pair = product.pairs(torch.tensor([a]), torch.tensor([b])).item()
                assert abs(Fraction(pair) - exact) <= product.left_slack[a].item()


@given(seed=st.integers(0, 2**31), columns=st.integers(1, 300), outlier=st.sampled_from([1.0, 30.0]))
@settings(max_examples=25)
def test_no_int8_score_is_off_by_more_than_the_bound(seed: int, columns: int, outlier: float) -> None:
    """A rival would be taken for settled that rounding to int8 has put on the wrong side."""
    rows = normal(9, columns, seed=seed)
    rows[:, :1] *= outlier
    left, right = measured(rows[:5], "text", 1000), measured(rows[5:], "image", 1000)
    product = Int8Products(left, right, 1000)
    got = product.block(slice(0, 5), slice(0, 4)).double() * product.unit
    exact = left.take(slice(None), FP64) @ right.take(slice(None), FP64).T
    off = (got - exact).abs()
    assert bool((off <= product.left_slack[:, None] + 1e-12).all())
    assert bool((off <= product.right_slack + 1e-12).all())
    assert float(product.left_slack.max()) < 0.2 * float(left.norm.max() * right.norm.max())


def near_ties(kind: str) -> tuple[Tensor, Tensor]:
    """12 images and 30 captions whose scores a coarse product cannot order."""
    images, texts = normal(12, 21, seed=0), normal(30, 21, seed=1)
    if kind == "collapsed":
        images, texts = images[:1] + 1e-7 * images, images[:1] + 1e-7 * texts
    elif kind == "copies":
        images, texts = images[torch.arange(12) % 3], texts[torch.arange(30) % 2]
    elif kind == "signs":
        images, texts = images.sign(), texts.sign()
    elif kind == "one outlier":
        images[3] *= 1e6
    elif kind == "tiny":
        images, texts = images * 1e-25, texts * 1e-25
    elif kind == "huge":
        images, texts = images.double() * 1e120, texts.double() * 1e120
    elif kind == "half":
        images, texts = images.half(), texts.half()
    return images, texts


@pytest.mark.parametrize("ladder", LADDERS, ids=str)
@pytest.mark.parametrize(
    "kind", ["plain", "collapsed", "copies", "signs", "one outlier", "tiny", "huge", "half"]
)
@pytest.mark.parametrize("block_bytes", [8, 800, 2**20])
def test_ranks_are_exact_with_every_product(
    ladder: list[torch.dtype], kind: str, block_bytes: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Recall would differ between two machines, or drop when features are nearly equal."""
    monkeypatch.setattr(ranks, "usable_types", lambda device: ladder)
    monkeypatch.setattr(ranks, "_WORTH_INT8", 0)
    images, texts = near_ties(kind)
    owner = torch.arange(30) % 11
    got = retrieval_ranks(images, texts, owner, block_bytes=block_bytes)
    assert (got.image_to_text.tolist(), got.text_to_image.tolist()) == naive(images, texts, owner)


@pytest.fixture
def three_threads() -> Iterator[None]:
    before = torch.get_num_threads()
    torch.set_num_threads(3)
    yield
    torch.set_num_threads(before)


@pytest.mark.parametrize("ladder", LADDERS, ids=str)
@pytest.mark.parametrize("kind", ["plain", "copies"])
@pytest.mark.usefixtures("three_threads")
def test_threads_share_the_blocks(
    ladder: list[torch.dtype], kind: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Recall would differ with the number of cores, or fail in the middle of a training step."""
    monkeypatch.setattr(ranks, "usable_types", lambda device: ladder)
    monkeypatch.setattr(ranks, "_WORTH_INT8", 0)
    monkeypatch.setattr(ranks, "_MANY", 0)
    workers = set()
    count = ranks._Ladder.count
    monkeypatch.setattr(
        ranks._Ladder, "count", lambda *args: (workers.add(threading.get_ident()), count(*args))
    )
    images, texts = near_ties(kind)
    owner = torch.arange(30) % 11
    with torch.inference_mode(), torch.autocast("cpu", torch.bfloat16):
        got = retrieval_ranks(images.clone(), texts.clone(), owner, block_bytes=100)
    assert (got.image_to_text.tolist(), got.text_to_image.tolist()) == naive(images, texts, owner)
    assert threading.get_ident() not in workers
    assert torch.get_num_threads() == 3


@pytest.mark.parametrize("ladder", LADDERS, ids=str)
@pytest.mark.parametrize("apart", [0, 1e-8, 1e-6, 1e-4])
def test_ranks_are_exact_where_few_items_are_rivals(
    ladder: list[torch.dtype], apart: float, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A good model's recall would be wrong where images are nearly copies of each other."""
    monkeypatch.setattr(ranks, "usable_types", lambda device: ladder)
    monkeypatch.setattr(ranks, "_WORTH_INT8", 0)
    half = normal(80, 12, seed=6)
    images = torch.cat([half, half + apart * normal(80, 12, seed=7)])
    owner = torch.arange(160)
    texts = images + 0.1 * normal(160, 12, seed=8)
    texts[150:] = images[150:]
    got = retrieval_ranks(images, texts, owner)
    assert (got.image_to_text.tolist(), got.text_to_image.tolist()) == naive(images, texts, owner)
    assert sum(got.text_to_image.tolist()) < 160 * 160 / 64


@pytest.mark.parametrize("shapes", [(1, 40), (40, 1)])
def test_one_against_many(shapes: tuple[int, int]) -> None:
    """A gallery of one image, or one caption for many images, would crash or miscount."""
    images, texts = normal(shapes[0], 6, seed=2), normal(shapes[1], 6, seed=3)
    owner = torch.arange(shapes[1]) % shapes[0]
    got = retrieval_ranks(images, texts, owner, block_bytes=200)
    assert (got.image_to_text.tolist(), got.text_to_image.tolist()) == naive(images, texts, owner)


class Counting(Exact):
    """Counts the pairs that were scored one by one."""

    pairs_scored = 0

    def pairs(self, left_row: Tensor, right_row: Tensor) -> Tensor:
        Counting.pairs_scored += len(left_row)
        return super().pairs(left_row, right_row)


@pytest.mark.parametrize("kind", ["plain", "collapsed", "copies"])
def test_few_pairs_are_scored_one_by_one(kind: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """A collapsed model, or templated captions, would keep the evaluation of 100,000 images busy for days."""
    monkeypatch.setattr(ranks, "Exact", Counting)
    monkeypatch.setattr(Counting, "pairs_scored", 0)
    monkeypatch.setattr(ranks, "usable_types", lambda device: [BF16, FP32, FP64])
    images, texts = normal(300, 64, seed=4), normal(300, 64, seed=5)
    if kind == "collapsed":
        images, texts = images[:1] + 1e-7 * images, images[:1] + 1e-7 * texts
    elif kind == "copies":
        images, texts = images[torch.arange(300) % 3], texts[torch.arange(300) % 3]
    retrieval_ranks(images, texts, torch.arange(300))
    assert Counting.pairs_scored < 300 * 300 / 16


def test_the_same_vectors_give_the_same_bits() -> None:
    """Equal captions would get different scores, and ties be lost."""
    left, right = normal(3, 37, seed=6).repeat(50, 1), normal(3, 37, seed=7).repeat(50, 1)
    exact = Exact(measured(left, "text", 1000), measured(right, "image", 1000), block_bytes=3000)
    got = exact.pairs(torch.arange(150), torch.arange(150))
    assert len(got.unique()) == 3
    assert got[:3].tolist() == pytest.approx((left.double() * right.double()).sum(1)[:3].tolist(), abs=1e-14)


@given(st.lists(st.integers(0, 4), min_size=1, max_size=40))
def test_only_equal_rows_share_an_identity(which: list[int]) -> None:
    """Two captions that differ would be counted as a tie."""
    rows = normal(5, 9, seed=8)
    rows[1] = rows[0].flip(0)
    numbers = identities(measured(rows[which], "text", 100), block_bytes=100).tolist()
    for a, one in zip(which, numbers, strict=True):
        for b, other in zip(which, numbers, strict=True):
            assert (one == other) == (a == b)


def test_a_collision_of_hashes_joins_nothing(monkeypatch: pytest.MonkeyPatch) -> None:
    """An unlucky hash would declare two different captions equal."""
    monkeypatch.setattr(torch, "randint", lambda *_, **__: torch.ones(9, dtype=torch.long))
    rows = normal(2, 9, seed=9)
    rows[1] = rows[0].flip(0)
    assert len(identities(measured(rows, "text", 1000), block_bytes=1000).unique()) == 2


@pytest.mark.parametrize("setting", ["highest", "high", "medium"])
@given(value=st.floats(1, 2, width=32))
@settings(max_examples=20)
def test_reduced_float32_is_noticed(setting: str, value: float) -> None:
    """With `set_float32_matmul_precision("medium")` the bound of float32 would not hold: wrong ranks."""
    before = torch.get_float32_matmul_precision()
    torch.set_float32_matmul_precision(setting)
    try:
        rows, one = torch.zeros(2, 64, 64)
        rows[:, 0], one[:, 0] = value, 1
        whole = bool((rows @ one.T == value).all())
        assert whole or FP32 not in usable_types(torch.device("cpu"))
    finally:
        torch.set_float32_matmul_precision(before)


@pytest.mark.parametrize("fast", [True, False])
def test_bfloat16_only_where_it_is_fast(fast: bool, monkeypatch: pytest.MonkeyPatch) -> None:
    """A processor that emulates bfloat16 would evaluate many times slower than with float32."""
    monkeypatch.setattr(scores, "bf16_is_fast", lambda device: fast)
    assert (BF16 in usable_types(torch.device("cpu"))) is fast
    assert usable_types(torch.device("cpu"))[-1] == FP64
