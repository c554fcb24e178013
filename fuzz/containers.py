"""Readers of files with images or tables inside: tar files, Parquet, data sets, spreadsheets, databases."""

from __future__ import annotations

import json
import sqlite3
from collections.abc import Callable
from contextlib import closing
from pathlib import Path
from random import Random
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq

from clipgraft.data.reader import read_pairs
from clipgraft.pictures import ImageError, open_image
from fuzz.mutate import damaged, odd_json
from fuzz.subject import Subject
from fuzz.tables import CAPTIONS, NAMES, odd_members, pictures, tar

PARTS = ("train", "val", "test", "restval", "train", "train")


def _content(folder: Path) -> list[bytes]:
    """The bytes of the six pictures, of which no file is left."""
    source = pictures(folder.parent / "source")
    found = [(source / name).read_bytes() for name in NAMES]
    for name in NAMES:
        (source / name).unlink()
    source.rmdir()
    return found


def _pairs(path: Path, **options: Any) -> Callable[[], object]:
    """Read pairs, and open the first images again, as training does."""

    def read() -> object:
        pairs = read_pairs(path, max_bad_rows=None, verify="header", workers=1, **options)
        for image in pairs.images[:2]:
            try:
                open_image(image)
            except ImageError:  # whose header alone was whole
                continue
        return pairs

    return read


def training_tars(folder: Path) -> Subject:
    """Damage tar files that are trained on."""
    content = _content(folder)
    folder.mkdir()
    path = folder / "a.tar"
    members = [pair for n, data in enumerate(content) for pair in _sample(n, data)]
    path.write_bytes(tar(members))

    def change(rng: Random) -> None:
        made = tar(odd_members(members, rng), rng) if rng.random() < 0.5 else path.read_bytes()
        path.write_bytes(damaged(made, rng) if rng.random() < 0.6 else made)

    return Subject(folder, _pairs(path), [change], (path.name,))


def _sample(number: int, data: bytes) -> list[tuple[str, bytes]]:
    text = json.dumps({"captions": [CAPTIONS[number], "x"]}).encode()
    return [(f"{number}.png", data), (f"{number}.txt", CAPTIONS[number].encode()), (f"{number}.json", text)]


def images_in_parquet(folder: Path) -> Subject:
    """Damage Parquet files with images in them."""
    content = zip(NAMES, _content(folder), strict=True)
    cells: list[dict[str, object]] = [{"bytes": data, "path": name} for name, data in content]
    cells[1]["bytes"] = None
    folder.mkdir()
    path = folder / "t.parquet"
    table = pa.table({"image": cells, "caption": CAPTIONS})
    pq.write_table(table, path, row_group_size=2, compression="none", use_dictionary=False)
    whole = path.read_bytes()
    return Subject(folder, _pairs(path), [lambda rng: _write(path, damaged(whole, rng))], (path.name,))


def saved_data_set(folder: Path) -> Subject:
    """Damage what `save_to_disk` of `datasets` leaves."""
    cells = [{"bytes": data, "path": None} for data in _content(folder)]
    folder.mkdir()
    table = pa.table({"image": cells, "caption": CAPTIONS})
    name = "data-00000-of-00001.arrow"
    with pa.OSFile(str(folder / name), "wb") as sink, pa.ipc.new_stream(sink, table.schema) as writer:
        writer.write_table(table, max_chunksize=2)
    state = {"_data_files": [{"filename": name}], "_fingerprint": "x", "_split": None}
    (folder / "state.json").write_text(json.dumps(state))
    (folder / "dataset_info.json").write_text("{}")
    whole = (folder / name).read_bytes()
    breaks: list[Callable[[Random], None]] = [
        lambda rng: _write(folder / name, damaged(whole, rng)),
        lambda rng: _write(folder / "state.json", odd_json(state, rng)),
    ]
    return Subject(folder, _pairs(folder), breaks, (name, "state.json"))


def json_data_sets(folder: Path) -> Subject:
    """Damage JSON in the forms of data sets: Karpathy's, COCO's, LLaVA's, Label Studio's."""
    path = pictures(folder) / "t.json"
    rows = list(zip(NAMES, CAPTIONS, PARTS, strict=True))
    forms: list[Any] = [
        {"images": [{"filename": n, "split": p, "sentences": [{"raw": c}]} for n, c, p in rows]},
        {
            "images": [{"id": i, "file_name": n} for i, (n, _, _) in enumerate(rows)],
            "annotations": [{"image_id": i, "caption": c} for i, (_, c, _) in enumerate(rows)],
        },
        [{"image": n, "conversations": [{"from": "gpt", "value": c}]} for n, c, _ in rows],
        [
            {"data": {"image": n}, "annotations": [{"result": [{"from_name": "t", "value": {"text": [c]}}]}]}
            for n, c, _ in rows
        ],
    ]
    path.write_text(json.dumps(forms[1]))
    part: list[str | None] = [None]

    def read() -> object:
        return _pairs(path, split=part[0])()

    def change(rng: Random) -> None:
        part[0] = rng.choice((None, "train", "x"))
        _write(path, odd_json(rng.choice(forms), rng))

    return Subject(folder, read, [change], (path.name,))


def spreadsheet(folder: Path) -> Subject:
    """Damage spreadsheets, packed and unpacked."""
    import openpyxl

    path = pictures(folder) / "t.xlsx"
    book = openpyxl.Workbook()
    for row in (("image", "caption"), *zip(NAMES, CAPTIONS, strict=True)):
        book.active.append(row)
    book.active.merge_cells("B2:B3")
    book.save(path)
    whole = path.read_bytes()

    def change(rng: Random) -> None:
        _write(path, damaged(whole, rng) if rng.random() < 0.3 else _repacked(whole, rng))

    return Subject(folder, _pairs(path), [change], (path.name,))


def _repacked(whole: bytes, rng: Random) -> bytes:
    """Damage one part of a workbook before it is packed."""
    import io
    import zipfile

    sink = io.BytesIO()
    with zipfile.ZipFile(io.BytesIO(whole)) as parts, zipfile.ZipFile(sink, "w") as made:
        chosen = rng.choice(parts.namelist())
        for name in parts.namelist():
            content = parts.read(name)
            made.writestr(name, damaged(content, rng) if name == chosen else content)
    return sink.getvalue()


def sqlite(folder: Path) -> Subject:
    """Damage SQLite files."""
    path = pictures(folder) / "t.sqlite"
    with closing(sqlite3.connect(path)) as connection:
        connection.execute("CREATE TABLE t (image TEXT, caption TEXT)")
        connection.executemany("INSERT INTO t VALUES (?, ?)", zip(NAMES, CAPTIONS, strict=True))
        connection.commit()
    whole = path.read_bytes()
    return Subject(folder, _pairs(path), [lambda rng: _write(path, damaged(whole, rng))], (path.name,))


def duckdb(folder: Path) -> Subject:
    """Damage DuckDB files."""
    from duckdb import connect

    path = pictures(folder) / "t.duckdb"
    with closing(connect(str(path))) as connection:
        connection.execute("CREATE TABLE t (image VARCHAR, caption VARCHAR)")
        connection.executemany("INSERT INTO t VALUES (?, ?)", list(zip(NAMES, CAPTIONS, strict=True)))
    whole = path.read_bytes()
    return Subject(folder, _pairs(path), [lambda rng: _write(path, damaged(whole, rng))], (path.name,))


def _write(path: Path, content: bytes) -> None:
    path.write_bytes(content)


READERS: dict[str, Callable[[Path], Subject]] = {
    "containers.tars": training_tars,
    "containers.parquet": images_in_parquet,
    "containers.saved": saved_data_set,
    "containers.json": json_data_sets,
    "containers.xlsx": spreadsheet,
    "containers.sqlite": sqlite,
    "containers.duckdb": duckdb,
}
