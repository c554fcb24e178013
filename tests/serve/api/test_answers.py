"""`/classify`, `/rank` and `/search`, whose numbers are compared with the offline ones."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path
from typing import Any

import httpx
import numpy as np
import pytest
import torch
import torch.nn.functional as F
from PIL import Image

import clipgraft as cg
from clipgraft.models.clip import Clip
from clipgraft.pictures import open_image
from clipgraft.serve.api.examples import PIXEL


def cosines(clip: Clip, query: str, texts: list[str]) -> torch.Tensor:
    """Return the cosines of a text to others."""
    features = F.normalize(clip.encode_text([query, *texts]).detach().float(), dim=-1)
    return features[1:] @ features[0]


def test_classify(client: httpx.Client, offline: Clip) -> None:
    """The probabilities on the page would not be those of the model."""
    classes = ["cat", "dog", "car"]
    asked = {"input": ["a kitten", {"image": PIXEL}], "classes": classes, "templates": ["a {}"]}
    answer = client.post("/classify", json=asked)
    assert answer.status_code == 200, answer.text
    found = answer.json()
    assert found["classes"] == classes
    wanted = cosines(offline, "a kitten", [f"a {name}" for name in classes])
    first = found["data"][0]
    np.testing.assert_allclose(first["scores"], wanted, atol=1e-5)
    scale = offline.logit_scale.detach().exp()
    np.testing.assert_allclose(first["probs"], (scale * wanted).softmax(0), atol=1e-4)
    assert first["label"] == classes[int(wanted.argmax())]
    assert [row["index"] for row in found["data"]] == [0, 1]
    two = {**asked, "templates": ["a {}", "no {}"]}
    weighted = client.post("/classify", json={**two, "template_weights": [1, 0]}).json()
    np.testing.assert_allclose(weighted["data"][0]["scores"], wanted, atol=1e-5)
    alike = client.post("/classify", json=two).json()
    assert np.abs(np.array(alike["data"][0]["scores"]) - wanted.numpy()).max() > 1e-4
    assert sum(found["data"][1]["probs"]) == pytest.approx(1, abs=1e-5)


@pytest.mark.parametrize(
    ("changes", "param"),
    [
        ({"templates": ["no place"]}, "templates.0"),
        ({"templates": []}, "templates"),
        ({"template_weights": [1, 1]}, "template_weights"),
        ({"template_weights": [0]}, "template_weights"),
        ({"template_weights": [-1]}, "template_weights.0"),
        ({"classes": ["a", "a"]}, "classes"),
        ({"classes": ["a", ""]}, "classes.1"),
        ({"classes": [f"c{i}" for i in range(65)]}, "classes"),
        ({"input": []}, "input"),
        ({"input": [{"image": "aGVsbG8="}]}, "input.0"),
        ({"model": "nothing"}, "model"),
        ({"head": 1}, "head"),
    ],
)
def test_classify_refusals(client: httpx.Client, changes: dict[str, Any], param: str) -> None:
    """Somebody would not be told which field is wrong."""
    asked = {"input": "a kitten", "classes": ["cat", "dog"], **changes}
    answer = client.post("/classify", json=asked)
    assert answer.status_code in (400, 404), answer.text
    assert answer.json()["error"]["param"] == param


@pytest.mark.parametrize("path", ["/rank", "/v1/rerank"])
def test_rank(client: httpx.Client, adapter_folders: dict[str, Path], path: str) -> None:
    """A program written for Jina's or Cohere's rerank would sort documents wrongly."""
    clip = cg.load("emoji")
    cg.load_adapter(clip, adapter_folders["vi"])
    documents = ["a car", "a kitten", "a dog", "two cats"]
    wanted = cosines(clip, "a cat", documents)
    order = wanted.argsort(descending=True).tolist()
    asked = {"model": "vi", "query": "a cat", "documents": documents, "top_n": 3, "return_documents": True}
    answer = client.post(path, json=asked)
    assert answer.status_code == 200, answer.text
    results = answer.json()["results"]
    assert [row["index"] for row in results] == order[:3]
    np.testing.assert_allclose([row["relevance_score"] for row in results], wanted[order[:3]], atol=1e-5)
    assert [row["document"]["text"] for row in results] == [documents[index] for index in order[:3]]
    assert answer.json()["usage"]["total_tokens"] > 0


def test_rank_images(client: httpx.Client) -> None:
    """Images could not be sorted by a text, or a document of an image would be repeated as a megabyte."""
    asked = {"query": {"text": "red"}, "documents": [{"image": PIXEL}, "a"], "return_documents": True}
    results = client.post("/rank", json=asked).json()["results"]
    assert {row["index"]: row["document"] for row in results} == {0: None, 1: {"text": "a"}}


def test_rank_names_the_field(client: httpx.Client) -> None:
    """Somebody would look for the fault in another document."""
    bad = {"image": "aGVsbG8="}
    for asked, param in (
        ({"query": "a", "documents": ["b", {"image": "?"}]}, "documents.1"),
        ({"query": {"image": "?"}, "documents": ["b"]}, "query"),
        ({"query": "a", "documents": []}, "documents"),
        ({"query": "a", "documents": ["b", bad]}, "documents.1"),
        ({"query": bad, "documents": ["b", "c"]}, "query"),
        ({"query": ["a"], "documents": ["b"]}, "query"),
    ):
        error = client.post("/rank", json=asked).json()["error"]
        assert error["param"] == param, error


def test_search(client: httpx.Client, adapter_folders: dict[str, Path], encoded: Path) -> None:
    """The page would show other images than `clipgraft search`, or not find their thumbnails."""
    clip = cg.load("emoji")
    cg.load_adapter(clip, adapter_folders["vi"])
    wanted = cg.search.query(encoded, "a cat", k=3, model=clip)
    answer = client.post("/search", json={"text": "a cat", "k": 3, "model": "vi"})
    assert answer.status_code == 200, answer.text
    hits = answer.json()["hits"]
    assert answer.json()["folder"] == "photos"
    assert [hit["rank"] for hit in hits] == [1, 2, 3]
    assert [hit["path"] for hit in hits] == [hit.metadata["path"] for hit in wanted]
    np.testing.assert_allclose([hit["score"] for hit in hits], [hit.score for hit in wanted], atol=1e-5)
    for hit in hits:
        picture = client.get(hit["thumbnail"], params={"side": 64})
        assert picture.headers["content-type"] == "image/jpeg"
        assert max(open_image(picture.content).size) == 64


@pytest.mark.parametrize(
    ("asked", "status", "param"),
    [
        ({}, 400, "text"),
        ({"text": "a", "k": 0}, 400, "k"),
        ({"text": "a", "k": 10**9}, 400, "k"),
        ({"text": "a", "image_weight": 2}, 400, "image_weight"),
        ({"image": "aGVsbG8="}, 400, "image"),
        ({"image": "???"}, 400, "image"),
        ({"text": "a", "where": "nonsense"}, 400, None),
        ({"text": "a", "folder": "nothing"}, 404, None),
        ({"text": "a", "model": "nothing"}, 404, "model"),
        ({"text": "a", "model": "vi", "folder": "nothing"}, 404, None),
    ],
)
def test_search_refusals(client: httpx.Client, asked: dict[str, Any], status: int, param: str | None) -> None:
    """Somebody would not be told what is wrong, or be answered from another folder."""
    answer = client.post("/search", json=asked)
    assert answer.status_code == status, answer.text
    assert answer.json()["error"]["param"] == param


@pytest.mark.parametrize(
    ("path", "status"),
    [
        ("photos/99", 404),
        ("nothing/1", 404),
        ("photos/-1", 400),
        ("photos/a", 400),
        ("photos/1?side=99999", 400),
        ("photos/1?side=1", 400),
        ("..%2f..%2fetc/1", 404),
        (f"{'a' * 600}/1", 400),
    ],
)
def test_thumbnails_that_are_not_there(client: httpx.Client, path: str, status: int) -> None:
    """A wrong row would be a fault of ours, or another folder's image."""
    answer = client.get(f"/thumbnails/{path}")
    assert answer.status_code == status
    assert "error" in answer.json()


def test_describe(client: httpx.Client) -> None:
    """The page would not know what is served, nor how much a request may bring."""
    found = client.get("/describe").json()
    assert [adapter["name"] for adapter in found["adapters"]] == ["both", "vi"]
    assert found["limits"] == {
        "max_items": 64,
        "max_body_mb": 1.0,
        "addresses": False,
        "adapter_loading": False,
    }
    assert client.get("/statistics").json()["counts"]["batches_text"] > 0
    metrics = client.get("/metrics")
    assert metrics.headers["content-type"].startswith("text/plain")
    assert 'clipgraft_requests_total{method="GET",process="0",route="/describe",status="200"}' in metrics.text


def test_the_web_side_has_no_torch() -> None:
    """Each web process would need a gigabyte and seconds more, for nothing."""
    program = (
        "import sys, clipgraft.serve.api; print({'torch', 'transformers', 'open_clip'} & set(sys.modules))"
    )
    ran = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True, check=True)
    assert ran.stdout.strip() == "set()"


def test_an_example_image_is_one() -> None:
    """The examples of the reference would be refused."""
    import base64

    image = open_image(base64.b64decode(PIXEL.partition(",")[2]))
    assert image.size == (8, 8)
    assert isinstance(image, Image.Image)
