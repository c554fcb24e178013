"""Readers of what users bring: tables, folders, tar files, texts, prompts, settings."""

from __future__ import annotations

import io
import json
import tarfile
from collections.abc import Callable, Sequence
from pathlib import Path
from random import Random
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq
import yaml
from PIL import Image

from clipgraft.cli.flags.groups import build_options, read_yaml
from clipgraft.data.prompts import read_prompts
from clipgraft.data.reader import read_labelled, read_pairs
from clipgraft.errors import ConfigError
from clipgraft.search.items import location
from clipgraft.search.searcher import Hit, write_page
from clipgraft.search.sources import open_images, open_texts
from clipgraft.train.args import TrainArgs
from fuzz.mutate import ESCAPES, NUMBERS, TEXTS, damaged, odd, odd_json, odd_lines
from fuzz.subject import Subject

NAMES = [f"{number}.png" for number in range(6)]
CAPTIONS = ["a cat", "con mèo đen", 'a "red" shoe', "two, dogs", "a dog", "phở bò"]
LABELS = ["cat", "cat", "shoe", "dog", "dog", "soup"]


def pictures(folder: Path) -> Path:
    """Write six small images."""
    folder.mkdir(parents=True)
    for number, name in enumerate(NAMES):
        Image.new("RGB", (4, 3), (number * 40, 100, 200)).save(folder / name)
    return folder


def _pairs(path: Path) -> Callable[[], object]:
    return lambda: read_pairs(path, max_bad_rows=None, verify="header", workers=1)


def _lines(separator: str) -> list[str]:
    quoted = [caption.replace('"', '""') for caption in CAPTIONS]
    rows = [f'{name}{separator}"{caption}"' for name, caption in zip(NAMES, quoted, strict=True)]
    return [f"filepath{separator}title", *rows]


def delimited(separator: str, name: str) -> Callable[[Path], Subject]:
    """Damage a CSV or TSV of captions."""

    def make(folder: Path) -> Subject:
        pictures(folder)
        lines = _lines(separator)
        (folder / name).write_text("\n".join(lines), encoding="utf-8")

        def change(rng: Random) -> None:
            (folder / name).write_bytes(odd_lines(lines, rng, separator + ",;\t|"))

        return Subject(folder, _pairs(folder / name), [change], (name,))

    return make


def jsonl(folder: Path) -> Subject:
    """Damage JSON Lines of captions."""
    path = pictures(folder) / "t.jsonl"
    rows: list[Any] = [{"filepath": n, "title": c} for n, c in zip(NAMES, CAPTIONS, strict=True)]
    rows[0]["title"] = ["a cat", "a black cat"]

    def text(values: Any) -> str:
        return "\n".join(json.dumps(value) for value in (values if isinstance(values, list) else [values]))

    path.write_text(text(rows), encoding="utf-8")
    return Subject(folder, _pairs(path), [lambda rng: _write(path, odd_json(rows, rng, text))], (path.name,))


def _write(path: Path, content: bytes) -> None:
    path.write_bytes(content)


def parquet_contents(columns: dict[str, list[str]]) -> list[bytes]:
    """Return Parquet files: first a valid one, then others with columns of every other type."""
    count = len(next(iter(columns.values())))
    binary = pa.array([b"\xff\xfe"] * count, pa.binary())
    bad = pa.StringArray.from_buffers(count, binary.buffers()[1], binary.buffers()[2])
    strange: list[Any] = [
        bad,
        pa.array([10**18] * count, pa.timestamp("us")),
        pa.array([2**50] * count, pa.timestamp("s", "UTC")),
        pa.array([2**31 - 1] * count, pa.date32()),
        pa.array([-(2**62)] * count, pa.duration("ns")),
        pa.array([float("nan")] * count),
        pa.array([True] * count),
        pa.array([None] * count, pa.null()),
        pa.array([None] * count, pa.string()),
        pa.array([["a", None]] * count),
        pa.array([[["a"]]] * count),
        pa.array([{"a": "b", "bytes": b"x"}] * count),
        pa.array([[("a", 1)]] * count, pa.map_(pa.string(), pa.int64())),
        pa.array(["a"] * count).dictionary_encode(),
        pa.array([b"a\xff"] * count),
        pa.array(["x" * 10_000] * count, pa.large_string()),
        pa.array([*TEXTS[:6], *ESCAPES][:count]),
    ]
    made = []
    for name, values in [("", None), *((name, values) for name in columns for values in strange)]:
        table = pa.table({**columns, **({name: values} if name else {})})
        made.append(_parquet(table))
    table = pa.table(columns)
    made += [_parquet(table, compression=c) for c in ("snappy", "zstd", "gzip")]
    made += [
        _parquet(table, data_page_version="2.0"),
        _parquet(table, row_group_size=2),
        _parquet(table.slice(0, 0)),
    ]
    doubled = pa.Table.from_arrays([table.column(0)] * 2, names=[table.column_names[0]] * 2)
    # Column names that are not UTF-8, which pyarrow itself does not write.
    renamed = pa.table({**columns, "zzzz": [1] * count})
    return [*made, _parquet(doubled), _parquet(renamed).replace(b"zzzz", b"\xff\xfe\xff\xfe")]


def _parquet(table: Any, **options: Any) -> bytes:
    sink = io.BytesIO()
    pq.write_table(table, sink, **{"compression": "none", "use_dictionary": False, **options})
    return sink.getvalue()


def parquet(folder: Path) -> Subject:
    """Damage Parquet files of captions."""
    path = pictures(folder) / "t.parquet"
    made = parquet_contents({"filepath": NAMES, "title": CAPTIONS})
    path.write_bytes(made[0])

    def change(rng: Random) -> None:
        content = rng.choice(made) if rng.random() < 0.5 else made[0]
        path.write_bytes(damaged(content, rng) if rng.random() < 0.95 else content)

    return Subject(folder, _pairs(path), [change], (path.name,))


def labelled(folder: Path) -> Subject:
    """Damage tables of classes, of every kind."""
    pictures(folder)
    rows = [{"image": name, "label": label} for name, label in zip(NAMES, LABELS, strict=True)]
    lines = ["image,label", *(f"{row['image']},{row['label']}" for row in rows)]
    made = parquet_contents({"image": NAMES, "label": LABELS})
    current = [folder / "l.csv"]
    current[0].write_text("\n".join(lines), encoding="utf-8")

    def text(values: Any) -> str:
        return "\n".join(json.dumps(value) for value in (values if isinstance(values, list) else [values]))

    def write(name: str, content: bytes) -> None:
        current[0] = folder / name
        current[0].write_bytes(content)

    def read() -> object:
        path, current[0] = current[0], folder / "l.csv"
        return read_labelled(path, max_bad_rows=None, workers=1)

    breaks: list[Callable[[Random], None]] = [
        lambda rng: write("l.csv", odd_lines(lines, rng)),
        lambda rng: write("l.jsonl", odd_json(rows, rng, text)),
        lambda rng: write("l.parquet", damaged(rng.choice(made), rng)),
    ]
    return Subject(folder, read, breaks, ("l.csv", "l.jsonl", "l.parquet"))


def folders(folder: Path) -> Subject:
    """Damage a folder of images with a table, caption files, and names that are hard to read."""
    pictures(folder)
    (folder / "captions.csv").write_text("\n".join(_lines(",")), encoding="utf-8")
    lines = _lines(",")

    def sidecars(rng: Random) -> None:
        (folder / "captions.csv").unlink()
        for name in NAMES:
            text = rng.choice((*TEXTS, *CAPTIONS)).encode("utf-8", "surrogatepass")
            (folder / name).with_suffix(".txt").write_bytes(damaged(text, rng))

    def odd_name(rng: Random) -> None:
        plain = [text for text in (*TEXTS, "\udcff.png") if "\0" not in text and "\ud800" not in text]
        name = rng.choice([text for text in plain if 0 < len(text) < 200])
        (folder / f"{name}.csv").write_bytes(odd_lines(lines, rng))

    breaks: list[Callable[[Random], None]] = [
        lambda rng: _write(folder / "captions.csv", odd_lines(lines, rng)),
        lambda rng: _write(
            folder / "metadata.jsonl", odd_json({"file_name": NAMES[0], "text": "a cat"}, rng)
        ),
        sidecars,
        odd_name,
    ]
    return Subject(folder, _pairs(folder), breaks)


def texts(folder: Path) -> Subject:
    """Damage a file with one text a line."""
    folder.mkdir()
    path = folder / "t.txt"
    path.write_text("\n".join(CAPTIONS), encoding="utf-8")

    def read() -> object:
        return list(open_texts(str(path)).items())

    return Subject(folder, read, [lambda rng: _write(path, odd_lines(CAPTIONS, rng))], (path.name,))


def prompts(folder: Path) -> Subject:
    """Damage YAML files of prompts."""
    folder.mkdir()
    path = folder / "p.yaml"
    value = {"cat": ["a photo of a cat", "a drawing of a cat"], "dog": "a dog", "no": ["x"]}
    path.write_text(yaml.safe_dump(value), encoding="utf-8")
    return Subject(folder, lambda: read_prompts(path), [_odd_yaml(path, value)], (path.name,))


def settings(folder: Path) -> Subject:
    """Damage YAML files of flags."""
    folder.mkdir()
    path = folder / "c.yaml"
    value: dict[str, Any] = {"epochs": 3, "lr": 1e-3, "batch-size": 16, "wd": 0.1, "accum-freq": 2}
    path.write_text(yaml.safe_dump(value), encoding="utf-8")

    def read() -> object:
        values = read_yaml(path)
        try:
            return build_options([TrainArgs], values)
        except ConfigError as error:  # one line for each flag, which it names
            raise ConfigError(str(error).splitlines()[0]) from error

    return Subject(folder, read, [_odd_yaml(path, value)], (path.name, "--", "there is no such flag"))


def _odd_yaml(path: Path, value: Any) -> Callable[[Random], None]:
    bombs = (
        b"a: &a [x,x,x,x,x,x,x,x,x]\n"
        + b"".join(
            f"{b}: &{b} [{','.join(['*' + a] * 9)}]\n".encode()
            for a, b in zip("abcdefgh", "bcdefghi", strict=True)
        ),
        b"a: &a {b: *a}\n",
        b"a: &a [*a]\n",
        b"? [a]\n: b\n",
        b"? {a: b}\n: b\n",
        b"!!python/object/apply:os.system ['true']\n",
        b"a: !!python/name:os.system\n",
        b"<<: [a, b]\n",
        b"<<: {a: 1}\na: 2\n",
        b"a: !!binary '===='\n",
        b"a: !!timestamp '2024-99-99'\n",
        b"a: !!int 'x'\n",
        b"a: !!float 'x'\n",
        b"a: 0x\n",
        b"a: 1:99:99\n",
        b"a: 2024-13-45\n",
        b"a: 190:20:30.15_\n",
        b"--- a\n--- b\n",
        b"[" * 5000,
        b"- " * 5000,
        b"{a: " * 3000,
        b"\xff\xfea\0:\0",
        b"a: \x07\n",
        b"a: !<tag:yaml.org,2002:map> x\n",
        b"%YAML 9.9\n---\na: 1\n",
        b"a: " + b"9" * 5000 + b"\n",
    )

    def change(rng: Random) -> None:
        if rng.random() < 0.25:
            bomb = rng.choice(bombs)
            path.write_bytes(damaged(bomb, rng) if rng.random() < 0.5 else bomb)
        elif rng.random() < 0.4:
            path.write_bytes(damaged(yaml.safe_dump(value).encode(), rng))
        else:
            path.write_bytes(_dumped(odd(value, rng)))

    return change


def _dumped(value: Any) -> bytes:
    try:
        return yaml.safe_dump(value, allow_unicode=True).encode("utf-8", "surrogatepass")
    except (yaml.YAMLError, RecursionError, ValueError):
        return b"a: [\n"


def archives(folder: Path) -> Subject:
    """Damage tar files in WebDataset's layout, list them and read an image of one."""
    source = pictures(folder.parent / "source")
    folder.mkdir()
    path = folder / "a.tar"
    members = [
        pair
        for place, name in enumerate(NAMES)
        for pair in (
            (f"{place}.png", (source / name).read_bytes()),
            (f"{place}.txt", CAPTIONS[place].encode()),
        )
    ]
    for name in NAMES:
        (source / name).unlink()
    source.rmdir()
    path.write_bytes(tar(members))

    def read() -> object:
        listed = open_images(str(path))
        items = list(listed.items())
        places = [location(listed.root, item.key) for item in items if item.reason is None]
        hits = [Hit(1, 0.5, place, "a", {}) for place in places[:2]]
        write_page(folder / "out.html", "t", hits)
        return items

    def change(rng: Random) -> None:
        content = tar(odd_members(members, rng), rng) if rng.random() < 0.5 else path.read_bytes()
        path.write_bytes(damaged(content, rng) if rng.random() < 0.6 else content)

    return Subject(folder, read, [change], (path.name,))


def odd_members(members: Sequence[tuple[str, bytes]], rng: Random) -> list[tuple[str, bytes]]:
    changed = list(members)
    for _ in range(rng.choice((1, 2, 5))):
        at = rng.randrange(len(changed))
        name, content = changed[at]
        what = rng.randrange(4)
        if what == 0:
            changed[at] = (
                rng.choice((*ESCAPES, *TEXTS, "a/../../x.png", "x" * 300 + ".png", "\udcff.png")),
                content,
            )
        elif what == 1:
            changed.insert(rng.randrange(len(changed)), changed[at])
        elif what == 2:
            changed[at] = (name, damaged(content, rng))
        else:
            rng.shuffle(changed)
    return changed


def tar(members: Sequence[tuple[str, bytes]], rng: Random | None = None) -> bytes:
    """Write a tar file; with `rng` in any format and with wrong headers whose checksums match."""
    sink = io.BytesIO()
    form = tarfile.USTAR_FORMAT if rng is None else rng.choice((tarfile.PAX_FORMAT, tarfile.GNU_FORMAT))
    with tarfile.open(fileobj=sink, mode="w", format=form, errors="surrogateescape") as tar:
        for name, content in members:
            info = tarfile.TarInfo(name.replace("\ud800", "?"))
            info.size = len(content)
            if rng is not None and rng.random() < 0.1:
                info.type = rng.choice(
                    (b"1", b"2", b"3", b"5", b"6", b"7", b"S", b"g", b"x", b"L", b"K", b"V", b"\0")
                )
                info.linkname = rng.choice(ESCAPES)
            if rng is not None and form == tarfile.PAX_FORMAT and rng.random() < 0.2:
                keys = (
                    "size",
                    "mtime",
                    "path",
                    "GNU.sparse.map",
                    "GNU.sparse.major",
                    "hdrcharset",
                    "uid",
                    "a",
                )
                values = (*map(str, NUMBERS[:-1]), "nan", "inf", "1e999", "x", "", "1,2,3")
                info.pax_headers = {rng.choice(keys): rng.choice(values)}
            tar.addfile(info, io.BytesIO(content))
    return sink.getvalue() if rng is None or rng.random() < 0.6 else _lying(sink.getvalue(), rng)


def _lying(content: bytes, rng: Random) -> bytes:
    """Change size, time or type in one header, and its checksum with it."""
    changed = bytearray(content)
    at = 512 * rng.randrange(max(1, len(changed) // 512))
    start, length = rng.choice(((124, 12), (136, 12), (100, 8), (156, 1), (345, 155), (482, 1), (386, 24)))
    values = (
        b"-1",
        b"77777777777",
        b"\x80" + b"\xff" * 11,
        b"\xff" * 12,
        b"x",
        b"\0",
        b"\x80" + b"\0" * 10 + b"\x05",
    )
    changed[at + start : at + start + length] = rng.choice(values)[:length].ljust(length, b"\0")
    changed[at + 148 : at + 156] = b" " * 8
    changed[at + 148 : at + 156] = f"{sum(changed[at : at + 512]):06o}\0 ".encode()
    return bytes(changed)


READERS: dict[str, Callable[[Path], Subject]] = {
    "tables.csv": delimited(",", "t.csv"),
    "tables.tsv": delimited("\t", "t.tsv"),
    "tables.jsonl": jsonl,
    "tables.parquet": parquet,
    "tables.labelled": labelled,
    "tables.folder": folders,
    "texts": texts,
    "prompts": prompts,
    "settings.yaml": settings,
    "archives.tar": archives,
}
