"""`Service` against offline features, merged weights and formulas; and what wrong input costs others."""

from __future__ import annotations

import asyncio
import io
import random
import struct
import threading
import time
import zlib
from collections.abc import Iterator
from concurrent.futures import CancelledError, ThreadPoolExecutor
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image

import clipgraft as cg
from clipgraft.adapters.open import Clip
from clipgraft.errors import (
    AdapterError,
    ClipgraftError,
    ConfigError,
    DataError,
    ItemError,
    UnavailableError,
    UnknownNameError,
)
from clipgraft.evaluate.head import Head, save_head
from clipgraft.search.encode import encode_folder
from clipgraft.search.index import build_index
from clipgraft.search.searcher import query
from clipgraft.serve.args import ServiceArgs
from clipgraft.serve.messages import (
    Classify,
    Describe,
    Encode,
    Item,
    LoadAdapter,
    Picture,
    Rank,
    Search,
    Stats,
    Text,
    Thumbnail,
    UnloadAdapter,
    Vectors,
    With,
)
from clipgraft.serve.service import Service
from encoded_folders import write_picture
from served_adapters import KINDS, merged_features, picture_bytes, write_adapter, write_adapters

TEXTS = ["a red apple", "hai con mèo", "x", "a dog on a hill at night"]
PICTURE = picture_bytes(1)
STRENGTHS = (1.0, 0.5, 1.3)


@pytest.fixture(scope="module")
def offline() -> Clip:
    return cg.load("emoji")


@pytest.fixture(scope="module")
def adapters(offline: Clip, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """One adapter of each kind, and a run with a trained head."""
    folder = write_adapters(offline, tmp_path_factory.mktemp("adapters"))
    run = folder / "run"
    write_adapter(offline, run / "adapter", 9, targets="vision-attention", r=2)
    (run / "params.json").write_text('{"model": "emoji"}', encoding="utf-8")
    save_head(Head("linear", torch.randn(3, 192), 20.0), ("cat", "dog", "fox"), run / "head")
    return folder


@pytest.fixture(scope="module")
def encoded(offline: Clip, adapters: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Six pictures, encoded by the base; and by an adapter that changes the image tower."""
    folder = tmp_path_factory.mktemp("encoded")
    for number in range(6):
        write_picture(folder / "photos" / f"{number}.png", number)
    options = {"batch_size": 4, "workers": 0, "autocast": False}
    encode_folder(offline, folder / "photos", folder / "base", **options)
    build_index(folder / "base")
    cg.load_adapter(offline, adapters / "both")
    encode_folder(offline, folder / "photos", folder / "adapted", **options)
    cg.remove_lora(offline)
    return folder


@pytest.fixture(scope="module")
def service(adapters: Path, encoded: Path) -> Iterator[Service]:
    words = (str(encoded / "base"), f"own={encoded / 'adapted'}")
    with Service.load(args=ServiceArgs(adapters=(str(adapters),), folders=words)) as made:
        yield made


@pytest.fixture(scope="module")
def wanted(offline: Clip, adapters: Path) -> dict[With, Vectors]:
    """Features of the texts and the picture by merged weights."""
    found = {
        With(name, strength): merged_features(offline, adapters / name, strength, TEXTS, PICTURE)
        for name in KINDS
        for strength in STRENGTHS
    }
    with torch.no_grad():
        base = merged_features(offline, adapters / "text", 0, TEXTS, PICTURE)
    return {**found, With(): base}


def ask(service: Service, texts: list[str], using: With = With()) -> Vectors:  # noqa: B008
    return service.ask(Encode((*map(Text, texts), Picture(PICTURE)), using)).vectors


def test_vectors_are_those_of_merged_weights(service: Service, wanted: dict[With, Vectors]) -> None:
    """A served adapter, at some strength, gives other vectors than the same one offline."""
    for using, vectors in wanted.items():
        got = ask(service, TEXTS, using)
        assert got.dtype == np.float32
        assert np.abs(got - vectors).max() < 2e-6, using
    assert np.array_equal(ask(service, TEXTS, With("dora", 0)), ask(service, TEXTS))


def test_vectors_are_those_of_the_offline_functions(
    service: Service, offline: Clip, adapters: Path, tmp_path: Path
) -> None:
    """What was indexed offline is not found by what the server encodes."""
    (tmp_path / "it.png").write_bytes(PICTURE)
    for name in KINDS:
        cg.load_adapter(offline, adapters / name, name)
    try:
        for name in (None, *KINDS):
            got = ask(service, TEXTS, With(name))
            texts = offline.encode_text(TEXTS, normalize=True, adapters=[name] * 4).numpy()
            image = offline.encode_image(tmp_path / "it.png", normalize=True, adapters=[name]).numpy()
            assert np.abs(got[:4] - texts).max() < 2e-6
            assert (got[4] @ image[0]) > 0.9999, "the fast preprocessing differs by a grey level"
    finally:
        cg.remove_lora(offline)


def test_tokens_are_counted_and_cuts_are_told(service: Service, offline: Clip) -> None:
    """Usage is wrong on the bill, or the end of a long text is lost without a word."""
    texts = ["", "a cat", "word " * 100, "end " * 47 + "here", "b" * 100_000]
    found = service.ask(Encode((Text(texts[0]), Picture(PICTURE), *map(Text, texts[1:]))))
    counts = offline.count_tokens([text[: 64 * offline.context_length] for text in texts])
    assert [found.tokens[0], *found.tokens[2:]] == counts
    assert found.tokens[1] == 65
    assert found.cut == tuple(n if n == 0 else n + 1 for n, c in enumerate(counts) if c > 48)
    assert 3 in found.cut


def test_many_threads_get_their_own_vectors(
    service: Service, wanted: dict[With, Vectors], adapters: Path
) -> None:
    """Under load somebody gets the vector of another text or adapter, or an eviction breaks a request."""
    small = ServiceArgs(adapters=(str(adapters),), adapter_memory_mb=0.7)
    faults: list[object] = []
    with Service(service.clip, small) as crowded:

        def client(seed: int) -> None:
            rng = random.Random(seed)
            for _ in range(12):
                using = rng.choice(list(wanted))
                chosen = rng.sample(range(4), rng.randint(1, 4))
                items: tuple[Item, ...] = tuple(Text(TEXTS[n]) for n in chosen)
                if rng.random() < 0.3:
                    chosen, items = [*chosen, 4], (*items, Picture(PICTURE))
                try:
                    got = crowded.ask(Encode(items, using)).vectors
                    if np.abs(got - wanted[using][chosen]).max() > 5e-6:
                        faults.append((using, chosen))
                    if rng.random() < 0.1:
                        name = rng.choice(list(KINDS))
                        crowded.ask(LoadAdapter(name, str(adapters / name), replace=True))
                except Exception as error:
                    faults.append(error)

        threads = [threading.Thread(target=client, args=(seed,)) for seed in range(8)]
        for thread in threads:
            thread.start()
        for thread in threads:
            thread.join()
        told = crowded.ask(Stats())
    assert faults == []
    assert told.counts["adapter_evictions"] > 0
    assert told.gauges["adapter_bytes"] <= 700_000
    assert told.counts["items_text"] > told.counts["batches_text"], "rows were computed together"


def _png(width: int, height: int) -> bytes:
    """The head of a PNG that claims a size."""
    head = struct.pack(">IIBBBBB", width, height, 8, 2, 0, 0, 0)
    chunk = b"IHDR" + head
    return b"\x89PNG\r\n\x1a\n" + struct.pack(">I", 13) + chunk + struct.pack(">I", zlib.crc32(chunk))


def _frames(count: int) -> bytes:
    """A GIF of many frames: the second repeated."""
    file = io.BytesIO()
    frames = [Image.new("P", (40, 40), shade) for shade in (10, 200)]
    frames[0].save(file, "GIF", save_all=True, append_images=frames[1:], duration=20)
    content = file.getvalue()
    second = content.rindex(b"\x21\xf9")
    return content[:second] + content[second:-1] * (count - 1) + b"\x3b"


POISON = {
    "truncated": PICTURE[: len(PICTURE) // 2],
    "huge": _png(60_000, 60_000),
    "svg": b'<svg xmlns="http://www.w3.org/2000/svg" width="9" height="9"></svg>',
    "bomb": _png(9_000, 9_000) + b"\x00\x00\x00\x10IDAT" + zlib.compress(b"\0" * 9),
    "empty": b"",
    "postscript": b"%!PS-Adobe-3.0 EPSF-3.0\n%%BoundingBox: 0 0 9 9\nquit\n",
    "narrow": picture_bytes(size=(2, 3000)),
    "noise": bytes(range(256)) * 9,
}


@pytest.mark.parametrize("kind", POISON)
def test_a_poisonous_picture_fails_alone_and_quickly(
    service: Service, wanted: dict[With, Vectors], kind: str
) -> None:
    """One picture brings the server down, or fails those who are in the same batch."""
    started = time.thread_time()
    good = [service.submit(Encode((*map(Text, TEXTS), Picture(PICTURE)))) for _ in range(3)]
    with pytest.raises(ItemError, match=r"^item 1: ") as told:
        service.ask(Encode((Text("a"), Picture(POISON[kind]), Text("b"))))
    assert told.value.index == 1
    assert len(str(told.value)) < 300
    for future in good:
        assert np.abs(future.result(30).vectors - wanted[With()]).max() < 5e-6
    assert time.thread_time() - started < 2


def test_strange_pictures_that_can_be_read(service: Service) -> None:
    """A picture of one pixel, or an animation, is refused or takes a minute."""
    started = time.process_time()
    one = picture_bytes(size=(1, 1))
    many = service.ask(Encode((Picture(one), Picture(_frames(10_000)), Picture(_frames(2)))))
    assert np.isfinite(many.vectors).all()
    assert np.array_equal(many.vectors[1], many.vectors[2]), "its first frame is read"
    assert time.process_time() - started < 20


def test_classes_by_prompts_and_by_a_trained_head(service: Service, offline: Clip, adapters: Path) -> None:
    """Probabilities are at the base's temperature, or of other prompts, or a trained head is passed over."""
    classes, templates = ("cat", "apple {}", "dog"), ("a photo of {}", "{}")
    items = (Picture(PICTURE), Text("a cat"))
    for using in (With(), With("warm"), With("both", 0.5)):
        found = service.ask(Classify(items, classes, templates, using))
        prompts = tuple(Text(t.replace("{}", c)) for c in classes for t in templates)
        vectors = service.ask(Encode((*items, *prompts), using)).vectors
        means = vectors[2:].reshape(3, 2, -1).mean(1)
        cosines = vectors[:2] @ (means / np.linalg.norm(means, axis=1, keepdims=True)).T
        log_scale = 1.5 if using.adapter == "warm" else float(offline.logit_scale.detach())
        logits = np.exp(log_scale) * cosines
        expected = np.exp(logits) / np.exp(logits).sum(1, keepdims=True)
        assert np.abs(found.probabilities - expected).max() < 1e-4
        assert np.abs(found.scores - cosines).max() < 1e-6
        assert (found.kind, found.classes) == ("softmax", classes)
        again = service.ask(Classify(items, classes, templates, using))
        assert np.abs(again.probabilities - found.probabilities).max() < 1e-5
    weighted = service.ask(Classify(items, classes, templates, template_weights=(3.0, 1.0)))
    prompts = tuple(Text(t.replace("{}", c)) for c in classes for t in templates)
    vectors = service.ask(Encode((*items, *prompts))).vectors
    means = np.average(vectors[2:].reshape(3, 2, -1), axis=1, weights=(3, 1))
    cosines = vectors[:2] @ (means / np.linalg.norm(means, axis=1, keepdims=True)).T
    assert np.abs(weighted.scores - cosines).max() < 1e-6
    found = service.ask(Classify(items, using=With("run")))
    from clipgraft.evaluate.head import load_head

    head, names = load_head(adapters / "run" / "head")
    vectors = service.ask(Encode(items, With("run"))).vectors
    with torch.no_grad():
        assert np.abs(found.scores - head(torch.from_numpy(vectors)).numpy()).max() < 1e-4
    assert found.classes == names
    assert service.ask(Classify(items, ("a", "b"), using=With("run"))).classes == ("a", "b")
    for message, told in (
        (Classify(items), "`classes`: none given"),
        (Classify(items, ("a",), ("no place",)), "`templates`: write {} where the class goes"),
        (
            Classify(items, ("a",), ("{}",), template_weights=(1.0, 2.0)),
            "`template_weights`: got 2 for 1 templates",
        ),
        (Classify(items, ("a",), ("{}",), template_weights=(0.0,)), "`template_weights`: each must be 0"),
        (Classify(items, head=True), "`head`: the base has none"),
    ):
        with pytest.raises(ConfigError, match=told.replace("{}", r"\{\}")):
            service.ask(message)


def test_ranking(service: Service) -> None:
    """Documents come in another order than their cosines, or are mixed up."""
    documents = (Text("a dog"), Picture(PICTURE), Text("a cat"), Text("two cats"))
    for using in (With(), With("both")):
        found = service.ask(Rank(Text("a cat"), documents, using, top=3))
        vectors = service.ask(Encode((Text("a cat"), *documents), using)).vectors
        cosines = vectors[1:] @ vectors[0]
        assert list(found.order) == np.argsort(-cosines)[:3].tolist()
        assert found.order[0] == 2
        assert np.abs(np.array(found.scores) - np.sort(cosines)[::-1][:3]).max() < 1e-6
        assert len(found.tokens) == 5


def test_searching_is_that_of_the_command(
    service: Service, offline: Clip, adapters: Path, encoded: Path
) -> None:
    """The page shows other pictures than `clipgraft search`."""
    cg.load_adapter(offline, adapters / "text", "text")
    cg.load_adapter(offline, adapters / "both", "both", activate=False)
    (encoded / "query.png").write_bytes(PICTURE)
    try:
        for name, folder, active in (
            ("base", "base", None),
            ("base", "base", "text"),
            ("own", "adapted", "both"),
        ):
            cg.set_adapter(offline, active)
            for options, where in (
                ({"text": "a cat"}, None),
                ({"text": "a cat", "picture": Picture(PICTURE)}, "width > 0"),
            ):
                found = service.ask(Search(name, **options, k=4, where=where, using=With(active)))  # type: ignore[arg-type]
                image = encoded / "query.png" if "picture" in options else None
                hits = query(encoded / folder, "a cat", image=image, k=4, where=where, model=offline)
                assert [hit["path"] for hit in found.hits] == [hit.metadata["path"] for hit in hits]
                assert max(abs(a["score"] - b.score) for a, b in zip(found.hits, hits, strict=True)) < 1e-3
                assert found.folder == name
    finally:
        cg.remove_lora(offline)
    with pytest.raises(AdapterError, match="its vectors are those of the base"):
        service.ask(Search("base", "a cat", using=With("both")))
    with pytest.raises(AdapterError, match="its vectors are those of adapter"):
        service.ask(Search("own", "a cat", using=With("both", 0.5)))
    with pytest.raises(UnknownNameError, match="no folder 'bas' is served: did you mean base"):
        service.ask(Search("bas", "a cat"))


def test_thumbnails_are_of_listed_rows(service: Service) -> None:
    """A thumbnail is of another row, or of a file that the folder does not list."""
    hit = service.ask(Search("base", "a cat", k=1)).hits[0]
    image = Image.open(io.BytesIO(service.ask(Thumbnail("base", hit["row"], 32))))
    assert (image.format, max(image.size)) == ("JPEG", 32)
    for row in (-1, 6, 10**9):
        with pytest.raises(DataError, match="has no row"):
            service.ask(Thumbnail("base", row))
    with pytest.raises(ConfigError, match="`side`"):
        service.ask(Thumbnail("base", 0, 10**6))


def test_a_folder_that_grew_is_seen(service: Service, offline: Clip, tmp_path: Path) -> None:
    """New pictures are found only after the server was started again."""
    options = {"batch_size": 4, "workers": 0, "autocast": False}
    write_picture(tmp_path / "photos" / "0.png", 0)
    encode_folder(offline, tmp_path / "photos", tmp_path / "out", **options)
    with Service(service.clip, ServiceArgs(folders=(str(tmp_path / "out"),))) as growing:
        assert len(growing.ask(Search(text="a cat")).hits) == 1
        write_picture(tmp_path / "photos" / "1.png", 1)
        encode_folder(offline, tmp_path / "photos", tmp_path / "out", **options)
        assert len(growing.ask(Search(text="a cat")).hits) == 2
        assert growing.ask(Describe()).folders[0].rows == 2


def test_adapters_are_loaded_and_unloaded(service: Service, adapters: Path) -> None:
    """A loaded adapter is not the one that was asked for, or a wrong path costs the one there is."""
    assert service.ask(LoadAdapter("new", str(adapters / "both"))).rank == 3
    assert np.array_equal(ask(service, TEXTS, With("new")), ask(service, TEXTS, With("both")))
    assert "new" in [info.name for info in service.ask(Describe()).adapters]
    service.ask(UnloadAdapter("new"))
    with pytest.raises(UnknownNameError, match="no adapter 'new' is served"):
        ask(service, TEXTS, With("new"))
    for strength in (float("nan"), float("inf"), 1e9):
        with pytest.raises(ConfigError, match="`strength`"):
            ask(service, TEXTS, With("both", strength))


def test_coroutines_timeouts_and_cancelling(service: Service) -> None:
    """A client that goes away blocks the server's loop, or what it asked for is computed all the same."""

    async def run() -> None:
        answers = await asyncio.gather(*(service.answer(Encode((Text(text),))) for text in TEXTS))
        assert np.abs(np.concatenate([a.vectors for a in answers]) - ask(service, TEXTS)[:4]).max() < 5e-6
        with pytest.raises(UnavailableError, match=r"no answer within 0 s|not begun|are waiting"):
            await service.answer(Encode((Text("a"),)), timeout=0)
        many = asyncio.ensure_future(service.answer(Encode((Picture(PICTURE),) * 2000)))
        await asyncio.sleep(0.3)
        many.cancel()
        with pytest.raises(asyncio.CancelledError):
            await many
        await asyncio.wait_for(service.answer(Encode((Text("a"),))), 20)

    before = service.ask(Stats()).counts["items_image"]
    asyncio.run(run())
    assert service.ask(Stats()).counts["items_image"] - before < 1500


def test_an_adapter_that_is_read_slowly_blocks_nobody(
    service: Service, adapters: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """One adapter on a slow disk makes all requests wait."""
    from clipgraft.serve import registry

    release, read = threading.Event(), registry.read_source
    monkeypatch.setattr(registry, "read_source", lambda *a: (release.wait(30), read(*a))[1])
    with Service(service.clip, ServiceArgs(adapters=(str(adapters),))) as slow:
        waiting = slow.submit(Encode((Text("a"),), With("text")))
        withdrawn = slow.submit(Encode((Text("a"),), With("text")))
        for _ in range(5):
            slow.ask(Encode((Text("a"),)), timeout=20)
        withdrawn.cancel()
        with pytest.raises(CancelledError):
            withdrawn.result(5)
        assert not waiting.done()
        release.set()
        assert waiting.result(30).vectors.shape == (1, 192)


def test_the_end(service: Service) -> None:
    """A stop loses accepted requests, or later ones hang."""
    ending = Service(service.clip)
    assert ending.state == "ready"
    with ThreadPoolExecutor(8) as pool:
        futures = [pool.submit(ending.ask, Encode((Text(f"{n}"),))) for n in range(40)]
        futures[0].result(20)
        ending.shut_down()
        assert ending.state == "draining"
        errors = [future.exception(20) for future in futures]
    assert all(error is None or isinstance(error, UnavailableError) for error in errors)
    with pytest.raises(UnavailableError, match="stopping"):
        ending.ask(Encode((Text("a"),)))


def test_what_cannot_be_served_is_told_at_once(tmp_path: Path, encoded: Path, tiny_config: Path) -> None:
    """A server starts with a folder or adapter that is not there, and every request fails."""
    clip = cg.load("emoji")
    with pytest.raises(ClipgraftError, match="is not there"):
        Service(clip, ServiceArgs(adapters=(f"x={tmp_path / 'no'}",)))
    with pytest.raises(DataError, match="holds no encoded"):
        Service(clip, ServiceArgs(folders=(str(tmp_path),)))
    other = cg.load(str(tiny_config), "none")
    with pytest.raises(ClipgraftError, match="was encoded by base"):
        Service(other, ServiceArgs(folders=(str(encoded / "base"),)))
