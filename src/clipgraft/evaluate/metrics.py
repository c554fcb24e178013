"""Retrieval features to numbers, under the names of open_clip and of CLIP_benchmark.

| here, as in open_clip | here, as in CLIP_benchmark | query | gallery |
|---|---|---|---|
| `image_to_text_R@k` | `text_retrieval_recall@k` | an image | captions |
| `text_to_image_R@k` | `image_retrieval_recall@k` | a caption | images |

Both names of a row hold the same number: the share of queries with a true item among the first k. With
several captions an image, an image counts once and its best caption decides, as in CLIP_benchmark
(`recall > 0`); open_clip itself knows one caption an image. `…_mean_rank` and `…_median_rank` are 1-based and
follow open_clip, which rounds a median between two ranks down.

Ties: both libraries let the order of the table decide among equal scores (`argsort`, `topk`), so a model that
returns one constant vector may get anything from 0 to 100 % from them. Here every tie counts against the
query, and such a model gets the last rank (see `ranks.py`). Without ties the numbers are the same.
"""

from __future__ import annotations

from collections.abc import Sequence

from torch import Tensor

from clipgraft.errors import ConfigError, DataError
from clipgraft.evaluate.ranks import BLOCK_BYTES, RetrievalRanks, retrieval_ranks

DEFAULT_KS = (1, 5, 10)


def retrieval_metrics(
    image_features: Tensor,
    text_features: Tensor,
    image_of_text: Tensor,
    *,
    ks: Sequence[int] = DEFAULT_KS,
    block_bytes: int = BLOCK_BYTES,
) -> dict[str, float]:
    """Recall@k, mean and median rank in both directions.

    Args:
        image_features: floating (N, D); scores are dot products: pass unit-norm rows for cosine similarity.
        text_features: floating (M, D).
        image_of_text: integer (M,), each caption's image. An image without captions is no query (nothing
            could be right) but stays in the gallery as a distractor.
        ks: cut-offs; one beyond the size of the gallery gives 1.0.
        block_bytes: memory for one block of scores; does not change the result.

    Returns:
        Shares in [0, 1] and ranks from 1, under the names of the module's table.

    Raises:
        DataError: features, captions and image numbers do not fit together.
        TrainingError: a feature is NaN or infinite.
        ConfigError: a k below 1, or a block that cannot hold one score.
    """
    too_small = [k for k in ks if k < 1]
    if too_small:
        raise ConfigError(f"recall@{too_small[0]} does not exist: every k must be at least 1.")
    return metrics_of(
        retrieval_ranks(image_features, text_features, image_of_text, block_bytes=block_bytes), ks
    )


def metrics_of(ranks: RetrievalRanks, ks: Sequence[int] = DEFAULT_KS) -> dict[str, float]:
    """`retrieval_metrics` of ranks that are known already."""
    asked = ranks.image_to_text[ranks.image_to_text > 0]
    image_to_text = rank_metrics(asked, ks)
    text_to_image = rank_metrics(ranks.text_to_image, ks)
    return {
        **{f"image_to_text_{name}": value for name, value in image_to_text.items()},
        **{f"text_to_image_{name}": value for name, value in text_to_image.items()},
        **{f"image_retrieval_recall@{k}": text_to_image[f"R@{k}"] for k in ks},
        **{f"text_retrieval_recall@{k}": image_to_text[f"R@{k}"] for k in ks},
    }


def rank_metrics(ranks: Tensor, ks: Sequence[int] = DEFAULT_KS) -> dict[str, float]:
    """`mean_rank`, `median_rank` and `R@k` of 1-based ranks, int64 (n,).

    Raises:
        DataError: there are no ranks.
    """
    if not len(ranks):
        raise DataError("no query to average over: pass at least one rank.")
    ordered = ranks.sort().values
    low, high = ordered[(len(ranks) - 1) // 2], ordered[len(ranks) // 2]
    return {
        "mean_rank": int(ranks.sum()) / len(ranks),
        "median_rank": float((low + high) // 2),
        **{f"R@{k}": int((ranks <= k).sum()) / len(ranks) for k in ks},
    }
