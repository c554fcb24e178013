"""Encoded folders from elsewhere: nothing outside of them is touched, and every fault is one line."""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest

import clipgraft as cg
from clipgraft.models.clip import Clip
from clipgraft.search.encode import encode_folder
from clipgraft.search.index import build_index
from clipgraft.search.manifest import is_set_folder, read_manifest
from clipgraft.search.searcher import query
from clipgraft.search.store import plain_rows

SMALL: dict[str, Any] = {"batch_size": 4, "shard_rows": 9, "workers": 0, "autocast": False}


@pytest.fixture
def out(clip: Clip, pictures: Path, tmp_path: Path) -> Path:
    """The pictures, encoded by the base."""
    encode_folder(clip, pictures, tmp_path / "out", **SMALL)
    return tmp_path / "out"


@pytest.fixture
def home(tmp_path: Path) -> Path:
    """A folder beside the encoded one, with something in it that nobody may lose."""
    (tmp_path / "home" / "index").mkdir(parents=True)
    (tmp_path / "home" / "precious.txt").write_text("precious")
    (tmp_path / "home" / "index" / "precious.txt").write_text("precious")
    return tmp_path / "home"


def contents(folder: Path) -> dict[str, bytes]:
    return {str(path): path.read_bytes() for path in sorted(folder.rglob("*")) if path.is_file()}


def change(out: Path, how: Callable[[dict[str, Any]], object]) -> None:
    manifest = json.loads((out / "manifest.json").read_text())
    how(manifest)
    (out / "manifest.json").write_text(json.dumps(manifest))


def refused(do: Callable[[], object], names: str) -> str:
    with pytest.raises(cg.errors.DataError) as caught:
        do()
    message = str(caught.value)
    assert names in message
    assert message.isprintable()
    return message


def also(name: str, home: Path) -> Callable[[dict[str, Any]], object]:
    return lambda m: m["shards"][0]["files"].update({name.replace("HOME", str(home)): [1, "x"]})


@pytest.mark.parametrize(
    "name", ["../home/precious.txt", "HOME/precious.txt", "img_emb/../../home/precious.txt", "manifest.json"]
)
def test_no_other_file_is_deleted(name: str, clip: Clip, pictures: Path, out: Path, home: Path) -> None:
    """A manifest that lists files of the user's as a damaged shard's had them deleted by `encode`."""
    before = contents(home)
    change(out, also(name, home))
    refused(lambda: encode_folder(clip, pictures, out, **SMALL), "manifest.json: shards[0].files names")
    assert contents(home) == before


@pytest.mark.parametrize("folder", ["../home", "..", "/tmp", "a/b", "index", "metadata", ".work", "a\x00"])
def test_no_set_lies_elsewhere(folder: str, clip: Clip, pictures: Path, out: Path, home: Path) -> None:
    """`index` replaced a folder called index wherever the manifest said that a set was."""
    before = contents(home)

    def move(manifest: dict[str, Any]) -> None:
        manifest["sets"][0]["folder"] = folder
        for shard in manifest["shards"]:
            shard["files"] = {f"{folder}/{name}": known for name, known in shard["files"].items()}

    change(out, move)
    for do in (lambda: build_index(out), lambda: encode_folder(clip, pictures, out, **SMALL)):
        refused(do, "manifest.json: sets[0].folder is ")
    assert contents(home) == before
    assert not is_set_folder(folder)


@pytest.mark.parametrize("name", ["img_emb", "metadata", "errors", "index", ".work"])
def test_no_link_leads_elsewhere(name: str, clip: Clip, pictures: Path, out: Path, home: Path) -> None:
    """Files that killed runs left are swept by name: through a link they would be the user's."""
    if (out / name).exists():
        shutil.copytree(out / name, home / name)
        shutil.rmtree(out / name)
    (home / name).mkdir(exist_ok=True)
    (home / name / f"{name}_1000.npy").write_text("precious")
    (out / name).symlink_to(home / name)
    before = contents(home)
    (pictures / "00.png").unlink()
    do = (
        (lambda: build_index(out))
        if name == "index"
        else (lambda: encode_folder(clip, pictures, out, **SMALL))
    )
    refused(do, f"which is outside of {out}; nothing was touched")
    assert contents(home) == before


def test_what_is_not_ours_in_the_folder_stays(clip: Clip, pictures: Path, out: Path) -> None:
    """A user's own files inside an encoded folder were deleted for standing where ours stand."""
    mine = [out / "index" / "notes.txt", out / ".work" / "notes.txt", out / "img_emb" / "img_emb_1000.npy"]
    mine += [out / "img_emb" / "img_emb_0.txt", out / "metadata" / "metadata_01.parquet"]
    for path in mine:
        path.parent.mkdir(exist_ok=True)
        path.write_text("mine")
    encode_folder(clip, pictures, out, **SMALL)
    refused(lambda: build_index(out), "index: holds something else than an index of ours; move it away")
    assert [path.read_text() for path in mine] == ["mine"] * len(mine)
    mine[0].rename(out / "index" / "index.json")
    refused(lambda: build_index(out), "index: holds something else than an index of ours; move it away")
    (out / "index" / "index.json").unlink()
    build_index(out)
    build_index(out)


MISTAKES: list[tuple[str, Callable[[dict[str, Any]], object], str]] = [
    ("kind", lambda m: m.update(kind=5), "kind is 5, and should be 'images' or 'texts'"),
    ("no kind", lambda m: m.pop("kind"), "kind is missing"),
    ("name", lambda m: m.update(name=5), "name is 5, and should be text"),
    ("root", lambda m: m.update(root=None), "root is None, and should be text"),
    ("format", lambda m: m.update(clipgraft_encoded=2), "clipgraft_encoded is 2, and should be 1"),
    ("dtype", lambda m: m.update(dtype="object"), "dtype is 'object', and should be 'float16' or 'float32'"),
    ("no sets", lambda m: m.update(sets=[]), "sets has 0 folders of vectors"),
    ("sets twice", lambda m: m.update(sets=m["sets"] * 2), "sets has 2 folders of vectors, 1 of them"),
    ("dim", lambda m: m.update(dim=None), "dim is None, and there are 21 rows"),
    (
        "long",
        lambda m: m.update(dim=2**31),
        "dim is 2147483648, and no model gives vectors of more than 1,048,576",
    ),
    ("kernels", lambda m: m.update(kernels=5), "kernels is 5, and should be an object"),
    (
        "adapters",
        lambda m: m.update(adapters=[{"name": [1], "path": "x", "digests": {}}]),
        "adapters[0].name is a list, and should be text",
    ),
    ("rows", lambda m: m["shards"][0].update(rows="x"), "shards[0].rows is 'x', and should be a whole"),
    ("rows < 0", lambda m: m["shards"][0].update(rows=-1), "shards[0].rows is -1, and should be greater"),
    ("rows huge", lambda m: m["shards"][0].update(rows=1e300), "shards[0].rows is 1e+300"),
    ("rows inf", lambda m: m["shards"][0].update(rows=float("inf")), "shards[0].rows is inf"),
    ("number", lambda m: m["shards"][0].update(number="../x"), "shards[0].number is '../x'"),
    ("number twice", lambda m: m["shards"][1].update(number=0), "shards[1].number is 0, which is taken"),
    ("next", lambda m: m.update(next=0), "shards[0].number is 0, which is taken, or not below next"),
    ("files", lambda m: m["shards"][0].update(files={}), "shards[0].files has no 'img_emb/img_emb_0.npy'"),
]


@pytest.mark.parametrize(("how", "fault"), [m[1:] for m in MISTAKES], ids=[m[0] for m in MISTAKES])
def test_wrong_values_are_named(
    how: Callable[[dict[str, Any]], object], fault: str, clip: Clip, pictures: Path, out: Path
) -> None:
    """Whatever came first raised: a traceback that names neither the file nor the field."""
    change(out, how)
    before = contents(out)
    for do in (lambda: query(out, "cat", model=clip), lambda: encode_folder(clip, pictures, out, **SMALL)):
        assert refused(do, f"manifest.json: {fault}").endswith("; encode into another folder")
    assert contents(out) == before


@pytest.mark.parametrize("where", [None, "width>3"])
@pytest.mark.parametrize("place", [4, 500, -500, -4])
def test_a_damaged_table_is_named(place: int, where: str | None, clip: Clip, out: Path) -> None:
    """Bytes that pyarrow reads as other captions, or cannot read: found before they are shown."""
    path = out / "metadata" / "metadata_0.parquet"
    content = bytearray(path.read_bytes())
    content[place] ^= 0xFF
    path.write_bytes(content)
    message = refused(lambda: query(out, "cat", where=where, k=21, model=clip), str(path))
    assert message.endswith("delete it, and run `clipgraft encode` again")
    path.unlink()
    refused(lambda: query(out, "cat", where=where, k=21, model=clip), f"{path}: cannot be read (No such file")


def test_the_advice_for_a_damaged_table_works(clip: Clip, pictures: Path, out: Path) -> None:
    """Advice that does not help is worse than none."""
    before = contents(out / "metadata")
    path = out / "metadata" / "metadata_0.parquet"
    path.write_bytes(path.read_bytes()[:-1] + b"X")
    refused(lambda: encode_folder(clip, pictures, out, **SMALL), f"{path}: is damaged")
    path.unlink()
    assert encode_folder(clip, pictures, out, **SMALL).encoded > 0
    assert len(contents(out / "metadata")) == len(before)
    assert len(query(out, "cat", k=100, model=clip)) == 21


def rewritten(out: Path, name: str, content: bytes) -> None:
    """A file of another content whose digest the manifest lists, as a stranger can make it."""
    import hashlib

    (out / name).write_bytes(content)
    known = [len(content), hashlib.sha256(content).hexdigest()]
    change(out, lambda m: m["shards"][0]["files"].update({name: known}))


def test_tables_of_other_columns_are_refused(clip: Clip, out: Path, tmp_path: Path) -> None:
    """A table with its digest in order may still lack a column, or hold numbers for captions."""
    name = "metadata/metadata_0.parquet"
    whole = pq.read_table(out / name)
    captions = pa.array([1] * whole.num_rows)
    place = whole.column_names.index("caption")
    for table in (whole.drop(["caption"]), whole.slice(1), whole.set_column(place, "caption", captions)):
        pq.write_table(table, tmp_path / "t.parquet")
        rewritten(out, name, (tmp_path / "t.parquet").read_bytes())
        refused(lambda: query(out, "cat", k=21, model=clip), f"{name}: ")


def test_vectors_of_another_kind_are_refused(clip: Clip, out: Path) -> None:
    """An array of objects runs code when it is unpickled; one of integers compares to noise."""
    path = out / "img_emb" / "img_emb_0.npy"
    rows = np.load(path)
    for content in (rows.astype(object), rows.astype(np.int16), rows[1:], rows[:, 1:], rows.T):
        np.save(path, content, allow_pickle=True)
        refused(lambda: query(out, "cat", model=clip), str(path))
    for junk in (b"", b"PK\x03\x04", b"\x93NUMPY\x01\x00\xff\xff", path.read_bytes()[:-1]):
        path.write_bytes(junk)
        refused(lambda: query(out, "cat", model=clip), str(path))


def test_a_changed_index_is_not_given_to_faiss(clip: Clip, out: Path) -> None:
    """FAISS ends the whole process on some bytes."""
    ((place, record),) = build_index(out)
    path = place / "image.index"
    content = bytearray(path.read_bytes())
    content[-1] ^= 1
    path.write_bytes(content)
    assert record.sha256 is not None
    message = refused(lambda: query(out, "cat", model=clip), f"{path}: is damaged")
    assert message.endswith("run `clipgraft index` again")
    build_index(out)
    assert query(out, "cat", model=clip)


def test_an_index_of_other_vectors_is_refused(clip: Clip, out: Path, tmp_path: Path) -> None:
    """A record whose digest is in order beside an index of fewer rows finds images that are not there."""
    import faiss

    ((place, _),) = build_index(out)
    index = faiss.IndexFlatIP(24)
    index.add(np.ones((5, 24), np.float32))
    faiss.write_index(index, str(place / "image.index"))
    record = json.loads((place / "index.json").read_text())
    (place / "index.json").write_text(json.dumps({**record, "sha256": None}))
    refused(lambda: query(out, "cat", model=clip), "holds 5 vectors of 24, not those of its folder")
    (place / "index.json").write_text(json.dumps({**record, "rows": "x"}))
    refused(lambda: query(out, "cat", model=clip), "index.json: rows is 'x', and should be a whole number")


@pytest.mark.parametrize(
    "factory",
    ["IDMap,Flat", "IDMap2,Flat", "IVF0,Flat", "IVF-1,Flat", "HNSW0", "IVF4_HNSW1,Flat", "NSG3", "PQ7"],
)
def test_factories_that_cannot_hold_the_vectors(factory: str, out: Path) -> None:
    """FAISS raises at whatever call comes first, or makes an index that finds nothing."""
    with pytest.raises(cg.errors.ConfigError, match=f"`factory='{factory}'`") as caught:
        build_index(out, factory)
    assert str(caught.value).isprintable()
    assert not (out / "index").exists()


def test_times_without_a_date_are_left_out() -> None:
    """One file whose clock stood at the year 33000 made every search that found it fail."""
    times = pa.array([10**18, 0, -(10**18), None], pa.timestamp("us", "UTC"))
    rows = plain_rows(pa.table({"mtime": times, "caption": ["a", "b", "c", "d"]}), [3, 2, 1, 0])
    assert [row["mtime"] and row["mtime"].year for row in rows] == [None, None, 1970, None]
    assert [row["caption"] for row in rows] == ["d", "c", "b", "a"]


def test_an_older_index_without_a_digest_is_used(clip: Clip, out: Path) -> None:
    """Indexes that were built before the digest was kept must stay of use."""
    ((place, _),) = build_index(out)
    record = json.loads((place / "index.json").read_text())
    del record["sha256"]
    (place / "index.json").write_text(json.dumps(record))
    assert query(out, "cat", model=clip)
    assert read_manifest(out) is not None
