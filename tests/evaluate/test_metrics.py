"""Names of metrics, and how metrics print."""

from __future__ import annotations

import copy
import json
import pickle

import torch

from clipgraft.evaluate.metrics import DECISIVE, HEADLINE, REPORTED, Metrics, headline
from clipgraft.evaluate.retrieval import retrieval_metrics


def test_metrics_print_on_two_lines() -> None:
    """A notebook would show a dict of sixteen numbers with sixteen digits each."""
    metrics = retrieval_metrics(torch.eye(4), torch.eye(4), torch.arange(4))
    assert repr(metrics).splitlines() == [
        "image_to_text: R@1 100.0 %, R@5 100.0 %, R@10 100.0 %, mean_rank 1, median_rank 1",
        "text_to_image: R@1 100.0 %, R@5 100.0 %, R@10 100.0 %, mean_rank 1, median_rank 1",
    ]
    assert repr(Metrics(acc1=0.5, ece=0.123456, loss=2.0)) == "acc1 50.0 %, ece 0.1235, loss 2"


def test_metrics_are_a_plain_mapping() -> None:
    """JSON files, copies and comparisons would differ from those of a dict."""
    plain = {"acc1": 0.5, "loss": 1.25, "mine": 3.0}
    metrics = Metrics(plain)
    assert metrics == plain
    assert json.dumps(metrics) == json.dumps(plain)
    assert pickle.loads(pickle.dumps(metrics)) == copy.deepcopy(metrics) == plain
    assert repr(Metrics(mine=1.0)) == "{'mine': 1.0}"
    assert repr(Metrics()) == "{}"


def test_names_are_shown_from_many_to_few() -> None:
    """A table would lack the number that the line above it tells."""
    for task, names in REPORTED.items():
        assert set(DECISIVE[task]) <= set(HEADLINE[task]) <= set(names)
    assert headline({"acc1": 0.5, "loss": 1.0}) == "acc1 50.0 %"
