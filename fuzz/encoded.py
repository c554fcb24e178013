"""Readers of encoded folders: manifest, vectors, metadata and index, in a search and in a second `encode`."""

from __future__ import annotations

import hashlib
import io
import json
from collections.abc import Callable
from dataclasses import replace
from functools import partial
from pathlib import Path
from random import Random
from typing import Any

import numpy as np
import pyarrow as pa

from clipgraft.search.filters import parse_where
from clipgraft.search.folder import all_sets, read_folder
from clipgraft.search.index import build_index, open_index
from clipgraft.search.items import Item
from clipgraft.search.manifest import AdapterNote, Manifest, Origin, VectorSet
from clipgraft.search.plan import Kept
from clipgraft.search.searcher import find_hits
from clipgraft.search.store import NewShard, Store, metadata_table, open_folder
from fuzz.mutate import damaged, odd, odd_json
from fuzz.subject import Subject
from fuzz.tables import parquet_contents

DIM, ROWS = 6, 4
ITEMS = [Item(f"{number}.png", 100, number * 10**9, "a cat") for number in range(ROWS)]
SIZES = [(8, 8)] * ROWS
VECTORS, TABLE, ERRORS = "img_emb/img_emb_0.npy", "metadata/metadata_0.parquet", "errors/errors_0.parquet"
INDEX, RECORD = "index/image.index", "index/index.json"


def encode(folder: Path) -> None:
    """Write an encoded folder with two shards and one image that cannot be used."""
    made = Origin("images", "emoji", "", "0123456789abcdef", "0123", "float32", "float16")
    note = AdapterNote("vi", "adapters/vi", {"text": "0123456789abcdef"})
    manifest = Manifest(made, "/pictures", "/pictures", (VectorSet("", None, None),), (note,))
    store = Store(folder, replace(manifest, kernels={"a": "math"}))
    folder.mkdir()
    store.begin()
    vectors = np.random.default_rng(0).standard_normal((ROWS, DIM)).astype(np.float16)
    for errors in ([Item("x.png", 3, 4, reason="is damaged")], []):
        store.add(NewShard(ITEMS, SIZES, {"": vectors}, errors))
    store.finish()


def search(folder: Path) -> None:
    """Read what a search reads, without a model."""
    read_folder(folder)
    for encoded in all_sets(folder):
        query = np.ones((1, encoded.manifest.dim or 1), np.float32)
        for where in ((), parse_where("width>3 and caption~cat")):
            find_hits(encoded, open_index(encoded), query, 3, where)


def rerun(folder: Path) -> None:
    """Read, write and delete what a second `encode` does, without a model."""
    manifest = open_folder(folder)
    assert manifest is not None
    store = Store(folder, manifest)
    store.drop_damaged()
    for shard in store.manifest.shards:
        list(store.stored(shard))
    store.begin()
    for shard in store.manifest.shards[:1]:
        if shard.rows:
            store.compact(shard, Kept((0,), ("a dog",), frozenset(["x.png"] if shard.errors else [])))
    store.finish()


def _list(folder: Path, manifest: dict[str, Any], name: str, content: bytes) -> None:
    """Write a file and list it in the manifest, as a stranger can."""
    (folder / name).write_bytes(content)
    changed = json.loads(json.dumps(manifest))
    changed["shards"][0]["files"][name] = [len(content), hashlib.sha256(content).hexdigest()]
    (folder / "manifest.json").write_text(json.dumps(changed))


def manifests(read: Callable[[Path], None]) -> Callable[[Path], Subject]:
    """Damage manifests: values, names or bytes."""

    def make(folder: Path) -> Subject:
        encode(folder)
        manifest = json.loads((folder / "manifest.json").read_text())

        def change(rng: Random) -> None:
            (folder / "manifest.json").write_bytes(odd_json(manifest, rng))

        return Subject(folder, partial(read, folder), [change])

    return make


def vectors(folder: Path) -> Subject:
    """Damage `.npy` files: header or bytes, with and without a matching size in the manifest."""
    encode(folder)
    manifest = json.loads((folder / "manifest.json").read_text())
    whole = (folder / VECTORS).read_bytes()
    head = {"descr": "<f2", "fortran_order": False, "shape": [ROWS, DIM]}

    def change(rng: Random) -> None:
        content = _npy(odd(head, rng), rng) if rng.random() < 0.5 else whole
        content = damaged(content, rng) if rng.random() < 0.7 else content
        if rng.random() < 0.5:
            _list(folder, manifest, VECTORS, content)
        else:
            (folder / VECTORS).write_bytes(content)

    return Subject(folder, _both(folder), [change])


def _npy(head: Any, rng: Random) -> bytes:
    if isinstance(head, dict) and isinstance(head.get("shape"), list) and rng.random() < 0.9:
        head["shape"] = tuple(head["shape"])
    if isinstance(head, dict) and rng.random() < 0.3:
        descrs = (
            "|O",
            "<f4",
            ">f2",
            "<f8",
            "|V2",
            "<U9",
            [["a", "<f2"]],
            "<M8[us]",
            "x",
            "<c8",
            "|b1",
            "f2,O",
        )
        head["descr"] = rng.choice(descrs)
    try:
        text = repr(head)
    except (ValueError, RecursionError):
        text = "{}"
    line = text.encode("utf-8", "surrogatepass") + b"\n"
    version = rng.choice((b"\x01\x00", b"\x02\x00", b"\x03\x00", b"\x09\x09"))
    size = len(line).to_bytes(4, "little")[: 2 if version == b"\x01\x00" else 4]
    return b"\x93NUMPY" + version + size + line + b"\0" * (2 * ROWS * DIM)


def _both(folder: Path) -> Callable[[], None]:
    """Search, then encode again; the error of the search is the one reported."""

    def read() -> None:
        try:
            search(folder)
        finally:
            rerun(folder)

    return read


def metadata(folder: Path) -> Subject:
    """Damage Parquet tables of an encoded folder, mostly with a matching digest."""
    encode(folder)
    manifest = json.loads((folder / "manifest.json").read_text())
    table = metadata_table(ITEMS, SIZES, "images", None, "0123456789abcdef")
    made = [_table(table), *_other_types(table)]
    errors = (folder / ERRORS).read_bytes()

    def change(rng: Random) -> None:
        name = TABLE if rng.random() < 0.8 else ERRORS
        content = errors if name == ERRORS else rng.choice(made) if rng.random() < 0.5 else made[0]
        content = damaged(content, rng) if rng.random() < 0.9 else content
        if rng.random() < 0.8:
            _list(folder, manifest, name, content)
        else:
            (folder / name).write_bytes(content)

    return Subject(folder, _both(folder), [change])


def _table(table: Any) -> bytes:
    import pyarrow.parquet as pq

    sink = io.BytesIO()
    pq.write_table(table, sink, compression="none", use_dictionary=False)
    return sink.getvalue()


def _other_types(table: Any) -> list[bytes]:
    """Fill columns with values that Python cannot represent, or give them other types."""
    times = pa.array([10**18, -(10**18), None, 2**62], pa.timestamp("us", "UTC"))
    nulls = {name: pa.array([None] * ROWS, table.schema.field(name).type) for name in table.column_names}
    binary = pa.array([b"\xff\xfe"] * ROWS, pa.binary())
    bad = pa.StringArray.from_buffers(ROWS, binary.buffers()[1], binary.buffers()[2])
    changed = [table.set_column(2, "mtime", times), table.set_column(5, "caption", bad)]
    changed += [
        table.set_column(0, "path", nulls["path"]),
        pa.table(nulls),
        table.slice(1),
        table.drop(["path"]),
    ]
    texts = {name: [str(n) for n in range(ROWS)] for name in table.column_names}
    return [*(_table(one) for one in changed), *parquet_contents(texts)]


def indexes(folder: Path) -> Subject:
    """Damage FAISS indexes and their records, with a matching digest or without any."""
    encode(folder)
    whole = {}
    for factory in ("HNSW4", "IVF2,Flat", "SQ8", "Flat"):
        build_index(folder, factory)
        record = json.loads((folder / RECORD).read_text())
        whole[factory] = (record, (folder / INDEX).read_bytes())

    def change(rng: Random) -> None:
        record, content = whole[rng.choice(list(whole))]
        if rng.random() < 0.4:
            (folder / INDEX).write_bytes(content)
            (folder / RECORD).write_bytes(odd_json(record, rng))
            return
        content = damaged(content, rng)
        digest = None if rng.random() < 0.5 else hashlib.sha256(content).hexdigest()
        (folder / INDEX).write_bytes(content)
        (folder / RECORD).write_text(json.dumps({**record, "sha256": digest}))

    return Subject(folder, partial(search, folder), [change])


READERS: dict[str, Callable[[Path], Subject]] = {
    "encoded.manifest": manifests(search),
    "encoded.rerun": manifests(rerun),
    "encoded.npy": vectors,
    "encoded.parquet": metadata,
    "encoded.index": indexes,
}
