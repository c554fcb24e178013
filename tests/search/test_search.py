"""`build_index` and `query`: the rows that a plain comparison would choose, and no other model's."""

from __future__ import annotations

import dataclasses
import json
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest

import clipgraft as cg
from clipgraft.models.clip import Clip
from clipgraft.search.encode import encode_folder
from clipgraft.search.folder import fitting_set
from clipgraft.search.index import build_index
from clipgraft.search.nearest import nearest
from clipgraft.search.searcher import Hit, query, query_vector, write_page
from encoded_folders import GOOD, MakeAdapter, read_encoded, write_picture

SMALL = {"batch_size": 4, "shard_rows": 6, "workers": 0, "autocast": False}


@pytest.fixture
def out(clip: Clip, pictures: Path, tmp_path: Path) -> Path:
    """The pictures, encoded by the base."""
    encode_folder(clip, pictures, tmp_path / "out", **SMALL)
    return tmp_path / "out"


def naive(out: Path, query: Any, k: int) -> list[tuple[str, float]]:
    """All vectors sorted by their inner product with the query."""
    found = {key: float(vector.astype(np.float32) @ query) for key, vector in read_encoded(out).items()}
    return sorted(found.items(), key=lambda item: -item[1])[:k]


@pytest.mark.parametrize("indexed", [False, True])
@pytest.mark.parametrize("k", [1, 5, 100])
def test_equals_a_plain_comparison(clip: Clip, out: Path, k: int, indexed: bool) -> None:
    """A search would miss the best image, with or without an index, across shards."""
    if indexed:
        build_index(out)
    wanted = clip.encode_text("một con mèo", normalize=True)[0].detach().numpy()
    hits = query(out, "một con mèo", k=k, model=clip)
    expected = naive(out, wanted, k)
    assert [hit.path for hit in hits] == [str(Path(out.parent / "ảnh" / key)) for key, _ in expected]
    assert [hit.score for hit in hits] == pytest.approx([score for _, score in expected], abs=1e-5)
    assert [hit.rank for hit in hits] == list(range(1, min(k, GOOD) + 1))


def test_many_queries_in_blocks(clip: Clip, out: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Results would change where one block of a large shard ends and the next begins."""
    monkeypatch.setattr("clipgraft.search.nearest._BLOCK_BYTES", 4 * 4 * 24)
    queries = np.random.default_rng(0).standard_normal((7, 24)).astype(np.float32)
    encoded = fitting_set(out, clip)
    scores, rows = nearest(encoded, queries, 5)
    vectors = np.concatenate([block for _, block in encoded.blocks()])
    every = queries @ vectors.T
    order = np.argsort(-every, axis=1, kind="stable")[:, :5]
    assert np.array_equal(rows, order)
    assert scores == pytest.approx(np.take_along_axis(every, order, 1), abs=1e-5)


def test_an_image_finds_itself(clip: Clip, out: Path, pictures: Path) -> None:
    """Search by image would use another preprocessing than the folder was encoded with."""
    hits = query(out, image=pictures / "a" / "04.png", k=3, model=clip)
    assert hits[0].path == str(pictures / "a" / "04.png")
    assert hits[0].score == pytest.approx(1, abs=2e-3)


def test_text_and_image_together(clip: Clip, pictures: Path) -> None:
    """The weight would pull to the wrong side, or a longer vector drown the other."""
    text = clip.encode_text("a dog", normalize=True)[0].detach()
    image = query_vector(clip, None, pictures / "00.png")
    both = query_vector(clip, "a dog", pictures / "00.png", 0.25)
    expected = 0.75 * text + 0.25 * image
    assert both.numpy() == pytest.approx((expected / expected.norm()).numpy(), abs=1e-6)


def test_texts_are_searched_by_image(clip: Clip, pictures: Path, tmp_path: Path) -> None:
    """Captions for a photo could not be looked up."""
    (tmp_path / "words.txt").write_text("a dog\na cat\nzebra\n")
    encode_folder(clip, tmp_path / "words.txt", tmp_path / "texts", texts=True, **SMALL)
    hits = query(tmp_path / "texts", image=pictures / "00.png", k=2, model=clip)
    wanted = query_vector(clip, None, pictures / "00.png").numpy()
    found = read_encoded(tmp_path / "texts", "text_emb", "caption")
    best = sorted(found, key=lambda text: -float(found[text].astype(np.float32) @ wanted))[:2]
    assert [(hit.caption, hit.path) for hit in hits] == [(text, None) for text in best]


@pytest.mark.parametrize("factory", ["IVF4,Flat", "HNSW8", "SQ8"])
def test_a_faster_index_says_what_it_finds(clip: Clip, out: Path, factory: str) -> None:
    """An index that loses half of the results would be used without anybody knowing."""
    ((place, record),) = build_index(out, factory)
    assert record.recall is not None
    assert record.recall > 0.9
    assert record.rows == GOOD
    assert (place / "image.index").is_file()
    exact_paths = {key for key, _ in naive(out, query_vector(clip, "a dog", None).numpy(), 5)}
    hits = query(out, "a dog", k=5, model=clip)
    assert len({hit.metadata["path"] for hit in hits} & exact_paths) >= 3


@pytest.mark.parametrize(
    ("factory", "says"), [("nonsense", "FAISS cannot make it"), ("IVF400,Flat", "cannot be trained on 21")]
)
def test_wrong_factories(out: Path, factory: str, says: str) -> None:
    """FAISS's own messages name lines of its source."""
    with pytest.raises(cg.errors.ConfigError, match=says) as wrong:
        build_index(out, factory)
    assert "\n" not in str(wrong.value)
    assert ".cpp" not in str(wrong.value)


def test_a_stale_index_is_not_used(
    clip: Clip, out: Path, pictures: Path, caplog: pytest.LogCaptureFixture
) -> None:
    """Deleted images would be found, and new ones not, until somebody remembers to index again."""
    build_index(out)
    (pictures / "00.png").unlink()
    write_picture(pictures / "new.png", 99)
    encode_folder(clip, pictures, out, **SMALL)
    hits = query(out, image=pictures / "new.png", k=1, model=clip)
    assert hits[0].path == str(pictures / "new.png")
    assert any("is older than the vectors" in line for line in caplog.messages)


def test_an_index_of_another_base(clip: Clip, out: Path) -> None:
    """An index copied from elsewhere would give random images."""
    ((place, _),) = build_index(out)
    record = json.loads((place / "index.json").read_text())
    (place / "index.json").write_text(json.dumps({**record, "fingerprint": "0123456789abcdef"}))
    with pytest.raises(cg.errors.DataError, match="is of base 0123456789abcdef"):
        query(out, "x", model=clip)


def test_a_damaged_index(clip: Clip, out: Path) -> None:
    """A cut copy would end in a traceback of FAISS."""
    ((place, _),) = build_index(out)
    (place / "image.index").write_bytes(b"IxFI")
    with pytest.raises(cg.errors.DataError, match="run `clipgraft index` again"):
        query(out, "x", model=clip)


def test_another_base_is_refused(clip: Clip, out: Path, tiny_openclip: Any) -> None:
    """Vectors of two models compare to noise, and nothing would say so."""
    other = Clip(tiny_openclip, clip.family, clip.tokenizer, clip.preprocess)
    with pytest.raises(cg.errors.ModelError, match=f"{clip.fingerprint}.*not by.*{other.fingerprint}"):
        query(out, "x", model=other)


def test_which_adapters_fit(
    clip: Clip, out: Path, pictures: Path, tmp_path: Path, make_adapter: MakeAdapter
) -> None:
    """Text adapters share the base's images; one on the image tower finds nothing there, and must be told."""
    base = [hit.path for hit in query(out, "a dog", k=GOOD, model=clip)]
    for name, targets in (("vi", "text.*.*"), ("eye", "vision.*.*")):
        cg.load_adapter(clip, make_adapter(name, targets), name=name, activate=False)
    cg.set_adapter(clip, "vi")
    wanted = clip.encode_text("a dog", normalize=True)[0].detach().numpy()
    hits = query(out, "a dog", k=GOOD, model=clip)
    assert [hit.metadata["path"] for hit in hits] == [key for key, _ in naive(out, wanted, GOOD)]
    assert [hit.path for hit in hits] != base
    cg.set_adapter(clip, "eye")
    with pytest.raises(
        cg.errors.AdapterError, match="those of the base, but the adapter changes the image tower"
    ):
        query(out, "a dog", model=clip)
    encode_folder(clip, pictures, tmp_path / "eye", **SMALL)
    assert query(tmp_path / "eye", image=pictures / "00.png", k=1, model=clip)[0].path == str(
        pictures / "00.png"
    )
    cg.set_adapter(clip, None)
    with pytest.raises(cg.errors.AdapterError, match="those of adapter eye"):
        query(tmp_path / "eye", "a dog", model=clip)


def test_the_set_that_fits_is_chosen(
    clip: Clip, pictures: Path, tmp_path: Path, make_adapter: MakeAdapter
) -> None:
    """With vectors of several adapters side by side, those of another one would be searched."""
    for name, targets in (("vi", "text.*.*"), ("eye", "vision.*.*")):
        cg.load_adapter(clip, make_adapter(name, targets), name=name, activate=False)
    many = tmp_path / "many"
    encode_folder(clip, pictures, many, adapters=["vi", "eye"], **SMALL)
    assert {place.parent.name for place, _ in build_index(many)} == {"base", "eye"}
    for active, folder in (("vi", "base"), ("eye", "eye"), (None, "base")):
        cg.set_adapter(clip, active)
        wanted = clip.encode_text("a dog", normalize=True)[0].detach().numpy()
        expected = [key for key, _ in naive(many / folder, wanted, 5)]
        assert [hit.metadata["path"] for hit in query(many, "a dog", k=5, model=clip)] == expected
        assert [hit.metadata["path"] for hit in query(many / folder, "a dog", k=5, model=clip)] == expected


def test_conditions(clip: Clip, out: Path) -> None:
    """`--where` would be checked after the k best were chosen, and leave fewer than there are."""
    build_index(out)
    rows = query(out, "a dog", k=GOOD, model=clip)
    wanted = [
        hit.path for hit in rows if hit.metadata["width"] > 38 and ".JPG".lower() in str(hit.metadata["path"])
    ]
    hits = query(out, "a dog", k=4, where="width>38 and path~.JPG", model=clip)
    assert [hit.path for hit in hits] == wanted[:4]
    assert query(out, "a dog", where="width>1000", model=clip) == []


@pytest.mark.parametrize(
    ("words", "says"),
    [
        ({}, "nothing to search for"),
        ({"text": ["a dog", "a cat"]}, "`text`: got a list, allowed is one text"),
        ({"text": "x", "k": 0}, "`k`"),
        ({"text": "x", "image_weight": 1.5}, "`image_weight`"),
        ({"text": "x", "where": "nothing=1"}, "there is no column 'nothing'; there are path, bytes"),
    ],
)
def test_wrong_arguments(clip: Clip, out: Path, words: dict[str, Any], says: str) -> None:
    """A typing error would give an empty result, or a traceback."""
    with pytest.raises(cg.errors.ConfigError, match=says):
        query(out, **words, model=clip)


def test_where_nothing_is_encoded(clip: Clip, tmp_path: Path) -> None:
    """A wrong folder must be told as one."""
    with pytest.raises(cg.errors.DataError, match="clipgraft encode"):
        query(tmp_path, "x", model=clip)


def test_a_gallery_needs_no_other_file(clip: Clip, out: Path, pictures: Path, tmp_path: Path) -> None:
    """A page sent by mail would show nothing, or run what a caption says."""
    hits = query(out, "a dog", k=3, model=clip)
    Path(str(hits[1].path)).unlink()
    hits[0] = dataclasses.replace(hits[0], caption="<script>alert(1)</script>")
    page = write_page(tmp_path / "page.html", "a dog", hits, pictures / "a" / "04.png").read_text("utf-8")
    assert page.count("data:image/jpeg;base64,") == 3
    assert "not found" in page
    assert "<script>" not in page
    assert 'src="data:' in page
    assert "http" not in page


def test_a_gallery_of_an_archive(clip: Clip, tmp_path: Path) -> None:
    """Images in tar files would have no thumbnails."""
    import tarfile

    picture = write_picture(tmp_path / "x.png", 1)
    with tarfile.open(tmp_path / "d.tar", "w") as tar:
        tar.add(picture, "0001.png")
    encode_folder(clip, str(tmp_path / "d.tar"), tmp_path / "tars", **SMALL)
    hits = query(tmp_path / "tars", "x", model=clip)
    assert hits[0].path == str(tmp_path / "d.tar::0001.png")
    assert "data:image/jpeg" in write_page(tmp_path / "p.html", "x", hits).read_text("utf-8")


def test_without_results(tmp_path: Path) -> None:
    """An empty page would look like a broken one."""
    assert "Nothing was found" in write_page(tmp_path / "p.html", "x", list[Hit]()).read_text("utf-8")


def test_building_an_index_tells_how_far_it_is(out: Path) -> None:
    """Millions of vectors go in for minutes, without a word."""
    told: list[tuple[int, int]] = []
    ((_, record),) = build_index(out, progress=lambda *now: told.append(now))
    assert told[-1] == (record.rows, record.rows)


def test_hits_depend_on_the_vectors_alone(monkeypatch: pytest.MonkeyPatch) -> None:
    """Of equal pictures another would be first when a folder grows or several queries are asked at once."""
    random = np.random.default_rng(0)
    base = random.standard_normal((40, 33)).astype(np.float32)
    vectors = (base / np.linalg.norm(base, axis=1, keepdims=True))[random.integers(0, 40, 500)]
    stored = vectors.astype(np.float16)
    stored.flags.writeable = False
    queries = random.standard_normal((5, 33)).astype(np.float32)
    every = (queries.astype(np.float64)[:, None] * stored.astype(np.float64)).sum(2)
    order = np.lexsort((np.broadcast_to(np.arange(500), every.shape), -every))[:, :20]
    shards = [SimpleNamespace(rows=300, of=stored[:300]), SimpleNamespace(rows=200, of=stored[300:])]
    encoded: Any = SimpleNamespace(shards=shards, vectors=lambda shard: shard.of)
    monkeypatch.setattr("torch.get_num_threads", lambda: 3)
    monkeypatch.setattr("torch.set_num_threads", lambda number: None)
    for block_bytes, held, many in ((1 << 20, 1 << 20, 501), (924, 1 << 20, 501), (924, 0, 501), (924, 0, 0)):
        monkeypatch.setattr("clipgraft.search.nearest._MANY", many)
        monkeypatch.setattr("clipgraft.search.nearest._BLOCK_BYTES", block_bytes)
        monkeypatch.setattr("clipgraft.search.nearest._HELD", held)
        together = nearest(encoded, queries, 20)
        assert np.array_equal(together[1], order)
        assert np.array_equal(together[0], np.take_along_axis(every, order, 1).astype(np.float32))
        for number, asked in enumerate(queries):
            scores, rows = nearest(encoded, asked[None], 20)
            assert np.array_equal(rows[0], order[number])
            assert np.array_equal(scores[0], together[0][number])
