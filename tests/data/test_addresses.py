"""Tables at addresses of fsspec, and data sets on the hub: a local server that speaks its protocol."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path

import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from huggingface_hub import constants

import clipgraft as cg
from clipgraft.data.addresses import as_address
from clipgraft.errors import DataError
from hub_server import HubServer
from tiny_pictures import write_pictures


def parquet(path: Path, pictures: Path, numbers: range) -> Path:
    """Some of the pictures, inside a Parquet file."""
    path.parent.mkdir(parents=True, exist_ok=True)
    cells = [{"bytes": (pictures / f"{number}.png").read_bytes(), "path": None} for number in numbers]
    pq.write_table(pa.table({"image": cells, "caption": [f"thing {number}" for number in numbers]}), path)
    return path


@pytest.fixture
def pictures(tmp_path: Path) -> Path:
    """The folder of twelve pictures."""
    return write_pictures(tmp_path / "pictures").parent


@pytest.fixture
def hub(tmp_path: Path, pictures: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[HubServer]:
    """A hub with the data set `owner/photos` of two parts."""
    root = tmp_path / "hub"
    for name, numbers in (("train-00000-of-00002", range(3)), ("train-00001-of-00002", range(3, 5))):
        parquet(root / "owner/photos/data" / f"{name}.parquet", pictures, numbers)
    parquet(root / "owner/photos/data/test-00000-of-00001.parquet", pictures, range(5, 7))
    server = HubServer(root)
    template = constants.HUGGINGFACE_CO_URL_TEMPLATE.replace(constants.ENDPOINT, server.url)
    monkeypatch.setattr(constants, "ENDPOINT", server.url)
    monkeypatch.setattr(constants, "HUGGINGFACE_CO_URL_TEMPLATE", template)
    monkeypatch.setattr(constants, "HF_HUB_OFFLINE", False)
    monkeypatch.setattr(constants, "HF_HUB_CACHE", str(tmp_path / "cache"))
    yield server
    server.stop()


def test_a_data_set_of_the_hub(hub: HubServer) -> None:
    """A data set would have to be downloaded by hand, or all parts of it when one is wanted."""
    pairs = cg.read_pairs("hf://datasets/owner/photos", split="train")
    assert pairs.captions == tuple((f"thing {number}",) for number in range(5))
    assert not [asked for asked in hub.requests if "test-00000" in asked and "resolve" in asked]
    one = cg.read_pairs("hf://datasets/owner/photos@main/data/test-00000-of-00001.parquet")
    assert one.captions == (("thing 5",), ("thing 6",))
    with pytest.raises(DataError, match=r"train \(2 files\).*; name one with `split`"):
        cg.read_pairs("hf://datasets/owner/photos")
    for name, says in (
        ("owner/gone", "owner/gone: cannot be fetched"),
        ("gated/photos", "whether it needs a login"),
        ("owner/photos/no.parquet", "has no such file; it has data/test"),
    ):
        with pytest.raises(DataError, match=says) as error:
            cg.read_pairs(f"hf://datasets/{name}")
        assert "\n" not in str(error.value)
    hub.stop()
    assert cg.read_pairs("hf://datasets/owner/photos", split="train") == pairs, "from the cache"
    with pytest.raises(DataError, match=r"cannot be reached .*, and the cache has no whole copy"):
        cg.read_pairs("hf://datasets/owner/other")


def test_a_table_at_an_address(pictures: Path, tmp_path: Path) -> None:
    """A table in a bucket would have to be copied first, and an old copy be read after it changed."""
    import fsspec

    memory = fsspec.filesystem("memory")
    content = (pictures / "pairs.csv").read_bytes()
    memory.pipe_file("/bucket/pairs.csv", content)
    pairs = cg.read_pairs("memory://bucket/pairs.csv", image_root=pictures)
    assert pairs == cg.read_pairs(pictures / "pairs.csv")
    memory.pipe_file("/bucket/pairs.csv", content[: content.index(b"\n", 60)])
    assert len(cg.read_pairs("memory://bucket/pairs.csv", image_root=pictures)) < len(pairs)
    memory.pipe_file("/bucket/t.parquet", parquet(tmp_path / "t.parquet", pictures, range(2)).read_bytes())
    assert cg.read_pairs("memory://bucket/t.parquet").captions == (("thing 0",), ("thing 1",))
    with pytest.raises(
        DataError, match="its images are not fetched with the table; copy them here, and give"
    ):
        cg.read_pairs("memory://bucket/pairs.csv")
    for address, says in (
        ("memory://bucket/none.csv", "cannot be read"),
        ("memory://bucket", "is a folder; name a table in it"),
        ("nothing://bucket/x.csv", "nothing://bucket/x.csv: cannot be read"),
        ("hf://models/x", "is no data set; write hf://datasets/OWNER/NAME"),
    ):
        with pytest.raises(DataError, match=says) as error:
            cg.read_pairs(address)
        assert "\n" not in str(error.value)


def test_what_is_an_address(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """A Windows drive, or a file with a colon, would be looked for on the network."""
    assert as_address(Path("s3://bucket/t.csv")) == "s3://bucket/t.csv"
    assert as_address(Path("C:/t.csv")) is None
    monkeypatch.chdir(tmp_path)
    (tmp_path / "s3:").mkdir()
    (tmp_path / "s3:" / "t.csv").write_text("")
    assert as_address(Path("s3:/t.csv")) is None
