"""`clipgraft encode`, `index` and `search`, one after the other as in a terminal."""

from __future__ import annotations

import io
import json
import re
import subprocess
import sys
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

import clipgraft as cg
from clipgraft.models.load import load
from tiny_pictures import IMAGES

FAST = ["--workers", 0, "--batch-size", 4, "--shard-rows", 5]


@pytest.fixture
def make_adapter(tiny_config: Path, tmp_path: Path) -> Any:
    """Save an adapter of a name on some sites of the tiny base."""

    def make(name: str, targets: str) -> Path:
        clip = load(str(tiny_config), "none")
        cg.apply_lora(clip, r=2, targets=targets)
        for parameter_name, parameter in clip.model.named_parameters():
            if "lora_B" in parameter_name:
                torch.nn.init.normal_(parameter)
        return cg.save_adapter(clip, tmp_path / "adapters" / name)

    return make


@pytest.fixture
def out(cli: Any, base: list[str], table: Path, tmp_path: Path) -> Path:
    """The twelve pictures, encoded."""
    assert cli("encode", table, tmp_path / "out", *base, *FAST).code == 0
    return tmp_path / "out"


def found(outcome: Any) -> list[str]:
    """The file names of a JSON answer, best first."""
    assert (outcome.code, outcome.err.count("Traceback")) == (0, 0)
    return [Path(row["path"]).name for row in json.loads(outcome.out)]


def test_encode_index_search(cli: Any, out: Path, table: Path, tmp_path: Path) -> None:
    """The three commands of the manual must work one after the other, with the base alone said."""
    outcome = cli("index", out)
    assert (outcome.code, outcome.err) == (0, "")
    assert "exact" in outcome.out
    outcome = cli("search", out, "một con mèo", "--k", 5)
    assert (outcome.code, outcome.err) == (0, "")
    told, *lines = outcome.out.splitlines()
    assert told.startswith(f"base {rows_base(out)} with weights none (on this machine), as ")
    assert len(lines) == 5
    assert re.fullmatch(r" +1 +-?0\.\d{4}  \S.*/\d+\.png  .*number.*", lines[0])
    rows = json.loads(cli("search", out, "một con mèo", "--k", 5, "--format", "json").out)
    assert [row["rank"] for row in rows] == [1, 2, 3, 4, 5]
    clip = load(str(rows_base(out)), "none")
    hits = cg.search.query(out, "một con mèo", k=5, model=clip)
    assert [row["path"] for row in rows] == [hit.path for hit in hits]
    assert rows[0]["caption"] == hits[0].caption


def rows_base(out: Path) -> str:
    """The base that a folder names."""
    return str(json.loads((out / "manifest.json").read_text())["name"])


def test_by_image_and_both(cli: Any, out: Path, table: Path) -> None:
    """An image must find itself, whatever else is asked for with a small weight."""
    image = ["--image", table.parent / "7.png", "--format", "json"]
    assert found(cli("search", out, *image, "--k", 1)) == ["7.png"]
    assert found(cli("search", out, "a dog", *image, "--image-weight", 0.95, "--k", 1)) == ["7.png"]


def test_filters_and_gallery(cli: Any, out: Path, tmp_path: Path) -> None:
    """`--where` and `--html` would not reach the search."""
    page = tmp_path / "page.html"
    words = ["--where", 'caption~"number 11" and width>=40', "--html", page, "--format", "json"]
    assert found(cli("search", out, "a dog", *words)) == ["11.png"]
    assert page.read_text(encoding="utf-8").count("data:image/jpeg") == 1


def test_again_does_the_difference(cli: Any, out: Path, table: Path) -> None:
    """The second run needs no --model, and must say that there is nothing to do."""
    outcome = cli("encode", table, out, *FAST)
    assert (outcome.code, outcome.err) == (0, "")
    assert f"{IMAGES} images, {IMAGES} known, 0 to encode" in outcome.out


def test_errors_are_told(cli: Any, base: list[str], table: Path, tmp_path: Path) -> None:
    """Who does not open errors.parquet would think that everything was encoded."""
    rows = tmp_path / "rows.csv"
    rows.write_text(f"image\n{table.parent / '0.png'}\n{tmp_path / 'gone.png'}\n", encoding="utf-8")
    outcome = cli("encode", rows, tmp_path / "out", *base, *FAST)
    assert (outcome.code, outcome.err) == (0, "")
    assert f"1 could not be used: {tmp_path / 'out' / 'errors.parquet'} says why" in outcome.out
    rows.write_text(f"image\n{tmp_path / 'gone.png'}\n")
    outcome = cli("encode", rows, tmp_path / "none", *base, *FAST)
    assert outcome.code == 2
    assert "none of its 1 images can be used" in outcome.err


def test_a_text_adapter_shares_the_images(cli: Any, out: Path, make_adapter: Any, tiny_config: Path) -> None:
    """A language adapter would need its own image vectors, or be ignored."""
    vi = make_adapter("vi", "text.*.*")
    before = found(cli("search", out, "a dog", "--format", "json", "--k", IMAGES))
    outcome = cli("search", out, "a dog", "--adapter", vi, "--k", IMAGES)
    assert outcome.code == 0
    assert "acts on the text tower alone: the base's image vectors are searched" in outcome.out
    after = found(cli("search", out, "a dog", "--adapter", vi, "--format", "json", "--k", IMAGES))
    assert sorted(after) == sorted(before)
    assert after != before


def test_an_image_adapter_is_refused_and_its_own_folder_found(
    cli: Any, out: Path, base: list[str], table: Path, make_adapter: Any, tmp_path: Path
) -> None:
    """Vectors of one tower would be compared with those of another."""
    eye = make_adapter("eye", "vision.*.*")
    outcome = cli("search", out, "a dog", "--adapter", eye)
    assert (outcome.code, outcome.out.count("png")) == (2, 0)
    assert len(outcome.err.splitlines()) == 1
    assert "the adapter changes the image tower" in outcome.err
    own = tmp_path / "own"
    assert cli("encode", table, own, "--adapter", eye, *FAST, "--precision", "fp32").code == 0
    assert np.load(own / "img_emb/img_emb_0.npy").shape == (5, 24)
    words = ["--image", table.parent / "3.png", "--k", 1, "--format", "json"]
    assert found(cli("search", own, *words)) == ["3.png"]
    assert found(cli("search", own, *words, "--adapter", "eye")) == ["3.png"]


def test_several_adapters(cli: Any, base: list[str], table: Path, make_adapter: Any, tmp_path: Path) -> None:
    """`--adapters` would decode every image for each of them, and `--adapter NAME` not know them."""
    paths = [make_adapter("vi", "text.*.*"), make_adapter("eye", "vision.*.*")]
    many = tmp_path / "many"
    outcome = cli("encode", table, many, *base, *FAST, "--adapters", ",".join(map(str, paths)))
    assert (outcome.code, outcome.err) == (0, "")
    assert "vi acts on the text tower alone: the base's image vectors are theirs" in outcome.out
    assert {path.name for path in many.iterdir() if path.is_dir()} == {"base", "eye"}
    for name in ("vi", "eye"):
        words = ["--image", table.parent / "5.png", "--adapter", name, "--k", 1, "--format", "json"]
        assert found(cli("search", many, *words)) == ["5.png"]
    outcome = cli("search", many, "a dog", "--adapter", "nobody")
    assert outcome.code == 2
    assert "names known here: vi, eye" in outcome.err


@pytest.mark.parametrize(
    ("words", "says"),
    [
        (["search"], "OUT is missing"),
        (["search", "nowhere", "x"], "holds no encoded images"),
        (["search", "nowhere"], "nothing to search for"),
        (["index", "nowhere"], "holds no encoded images"),
        (["encode", "nowhere"], "OUT is missing"),
        (["encode", "a", "b", "--adapter", "x", "--adapters", "y,z"], "give one of them"),
        (["encode", "nowhere.csv", "OUT", "--model", "emoji"], "not found"),
    ],
)
def test_wrong_words(
    cli: Any, words: list[str], says: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A wrong argument must be one line that says what to do."""
    monkeypatch.chdir(tmp_path)
    outcome = cli(*words)
    assert outcome.code == 2
    assert says in outcome.err
    assert "Traceback" not in outcome.err


def test_another_base(cli: Any, out: Path, table: Path, hf_folder: Path) -> None:
    """Encoding or searching with another base must be refused in one line."""
    other = ["--model", f"hf:{hf_folder}"]
    for words in (["encode", table, out, *other, *FAST], ["search", out, "dog", *other]):
        outcome = cli(*words)
        assert outcome.code == 2
        assert re.search(r"by base .*tiny-clip.json.*, not by .*tiny-hf", outcome.err)
        assert len(outcome.err.splitlines()) == 1


def test_missing_packages(
    cli: Any, out: Path, table: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Who installed clipgraft alone must read what to install, not a traceback."""
    import sys

    monkeypatch.setitem(sys.modules, "faiss", None)
    outcome = cli("index", out)
    assert (outcome.code, "pip install 'clipgraft[search]'" in outcome.err) == (2, True)
    monkeypatch.setitem(sys.modules, "pyarrow", None)
    outcome = cli("encode", table, tmp_path / "new", *FAST)
    assert (outcome.code, "pip install 'clipgraft[search]'" in outcome.err) == (2, True)


def test_texts(cli: Any, base: list[str], table: Path, tmp_path: Path) -> None:
    """Captions could not be encoded from the command line, or not searched by image."""
    out = tmp_path / "texts"
    assert cli("encode", table, out, "--texts", *base, *FAST).code == 0
    outcome = cli("search", out, "--image", table.parent / "0.png", "--k", 3)
    assert (outcome.code, outcome.err, len(outcome.out.splitlines())) == (0, "", 1 + 3)
    assert "--texts" not in cli("encode", table, out, "--texts", *FAST).err


def test_interrupted(
    cli: Any, base: list[str], table: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Who stops a long run must know that it can go on."""

    def stop(*_: object, **__: object) -> None:
        raise KeyboardInterrupt

    monkeypatch.setattr("clipgraft.search.encode.encode_folder", stop)
    outcome = cli("encode", table, tmp_path / "out", *base, *FAST)
    assert outcome.code == 130
    assert "the same command goes on" in outcome.err


@pytest.mark.slow
def test_an_interrupt_to_all_processes_of_encode(base: list[str], table: Path, tmp_path: Path) -> None:
    """Ctrl-C reaches the workers too: that must make no noise, lose nothing, and end with 130."""
    script = (
        "import os, signal, sys\nfrom clipgraft.cli import main\n"
        "from clipgraft.search.store import Store\nadd = Store.add\n"
        "def once(self, rows):\n    add(self, rows)\n    os.killpg(0, signal.SIGINT)\n"
        "Store.add = once\nsys.exit(main(sys.argv[1:]))\n"
    )
    flags = ["--workers", "1", "--shard-rows", "4", "--batch-size", "2"]
    done = subprocess.run(
        [sys.executable, "-c", script, "encode", str(table), str(tmp_path / "out"), *base, *flags],
        start_new_session=True,
        capture_output=True,
        text=True,
        check=False,
    )
    assert done.returncode == 130, done.stderr
    told = "clipgraft: interrupted: finished shards are kept, and the same command goes on from there\n"
    assert done.stderr == told
    assert len(list((tmp_path / "out" / "img_emb").glob("*.npy"))) == 1


def test_lines_of_standard_input_are_answered(cli: Any, out: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """A query by command costs ten seconds of loading; a bad line must not end the others."""
    from clipgraft.search import searcher

    search = searcher.query

    def sometimes(folder: Any, text: str, **options: Any) -> Any:
        if text == "bad":
            raise cg.errors.DataError("no such thing")
        return search(folder, text, **options)

    monkeypatch.setattr(searcher, "query", sometimes)
    monkeypatch.setattr(sys, "stdin", io.StringIO("một con mèo\n\nbad\ncat\n"))
    outcome = cli("search", out, "-", "--k", 2, "--format", "json")
    answers = [json.loads(line) for line in outcome.out.splitlines()]
    assert (outcome.code, [answer["query"] for answer in answers]) == (0, ["một con mèo", "bad", "cat"])
    assert (len(answers[0]["hits"]), answers[1]["error"]) == (2, "no such thing")
    monkeypatch.setattr(sys, "stdin", io.StringIO("bad\ncat\n"))
    outcome = cli("search", out, "-", "--k", 1)
    assert "bad: no such thing\ncat\n   1  " in outcome.out


def test_near_misses_are_understood(cli: Any, out: Path, tmp_path: Path) -> None:
    """Arguments in the other order, a list of texts without --texts, a table as a model."""
    told = cli("search", "con mèo", out).err
    assert told == f"clipgraft: the encoded folder comes first: clipgraft search {out} 'con mèo'\n"
    (tmp_path / "notes.txt").write_text("một con mèo")
    assert "--texts is missing: add it" in cli("encode", tmp_path / "notes.txt", tmp_path / "o").err
    (tmp_path / "a.csv").write_text("filepath,title\n")
    told = cli("eval", "--model", tmp_path / "a.csv", "--val-data", tmp_path / "a.csv").err
    assert "is a table of data" in told
    (tmp_path / "a.png").write_text("")
    assert "is one picture; name a table" in cli("train", "--train-data", tmp_path / "a.png").err


def test_encode_and_index_to_parquet(cli: Any, base: list[str], table: Path, tmp_path: Path) -> None:
    """`--to` would leave no file, say nothing of what changed, or be found wrong after all is encoded."""
    out = tmp_path / "out"
    outcome = cli("encode", table, out, *base, *FAST, "--to", "parquet")
    assert (outcome.code, outcome.err) == (0, "")
    copy = out / "vectors.parquet"
    assert f"{copy}: {IMAGES} rows: {IMAGES} added, 0 updated, 0 unchanged; 0 removed; vectors" in outcome.out
    before = copy.read_bytes()
    outcome = cli("index", out, "--to", f"parquet:{copy}")
    assert (outcome.code, outcome.err) == (0, "")
    assert f"{IMAGES} rows: 0 added, 0 updated, {IMAGES} unchanged; 0 removed" in outcome.out
    assert copy.read_bytes() == before
    outcome = cli("encode", table, tmp_path / "not", *base, *FAST, "--to", "parket:x")
    assert outcome.code == 2
    assert "--to: got 'parket', allowed is parquet:FILE, lance:FOLDER/NAME.lance" in outcome.err
    assert not (tmp_path / "not").exists()
    theirs = tmp_path / "theirs.parquet"
    theirs.write_bytes(b"mine")
    outcome = cli("encode", table, out, *FAST, "--to", f"parquet:{theirs}")
    assert (outcome.code, theirs.read_bytes()) == (2, b"mine")
    assert f"{out} is complete: `clipgraft index {out} --to …` copies it" in outcome.err
    refused = cli("index", out, "--to", f"parquet:{theirs}").err
    assert "was not made by clipgraft, and is left as it is; name another, or say --overwrite" in refused
    assert cli("index", out, "--to", f"parquet:{theirs}", "--overwrite").code == 0
    outcome = cli("index", out, "--to", "parquet", "--factory", "HNSW32")
    assert (outcome.code, outcome.err.count("drop one of them")) == (2, 1)
