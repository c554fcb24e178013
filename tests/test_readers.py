"""What libraries raise on damaged files: one line that names the file, whatever they raise."""

from __future__ import annotations

import io
import tarfile
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from clipgraft.cli.flags.groups import read_yaml
from clipgraft.data.doors import open_table
from clipgraft.data.prompts import read_prompts
from clipgraft.errors import AdapterError, ClipgraftError, ConfigError, DataError
from clipgraft.readers import Tar, map_array, read_parquet, reading


@pytest.mark.parametrize(
    ("cause", "told"),
    [
        (KeyError("x"), "KeyError 'x'"),
        (
            RecursionError("maximum recursion depth exceeded"),
            "RecursionError maximum recursion depth exceeded",
        ),
        (ValueError(""), "ValueError"),
        (OSError(2, "No such file or directory"), "No such file or directory"),
        (UnicodeDecodeError("utf-8", b"\xff", 0, 1, "invalid"), "'utf-8' codec can't decode byte 0xff"),
        (RuntimeError("two\nlines\x1b[2J" + "x" * 1000), "two lines\\u001b[2Jxxx"),
    ],
)
def test_any_error_of_a_library_names_the_file(cause: Exception, told: str) -> None:
    """A type that nobody has listed ends in a traceback without the file's name."""
    with pytest.raises(AdapterError) as caught, reading("a.bin", AdapterError, "save it again"):
        raise cause
    message = str(caught.value)
    assert message.startswith(f"a.bin: cannot be read ({told}")
    assert message.endswith("; save it again")
    assert message.isprintable()
    assert len(message) < 250


def test_an_error_of_ours_goes_through() -> None:
    """A message that says what to do must not be wrapped in another."""
    with pytest.raises(DataError, match=r"^mine$"), reading("a.bin", AdapterError):
        raise DataError("mine")


def test_arrays_of_objects_are_not_unpickled(tmp_path: Path) -> None:
    """An array of objects is a pickle, which runs code."""
    path = tmp_path / "a.npy"
    np.save(path, np.array([{}], object), allow_pickle=True)
    with pytest.raises(DataError, match=r"a\.npy: cannot be read"):
        map_array(path)
    np.savez(tmp_path / "a.npz", a=np.zeros(3))
    (tmp_path / "a.npz").rename(path)
    with pytest.raises(DataError, match=r"a\.npy: cannot be read"):
        map_array(path)


def not_utf8() -> pa.Array:
    binary = pa.array([b"\xff\xfe"] * 2, pa.binary())
    return pa.StringArray.from_buffers(2, binary.buffers()[1], binary.buffers()[2])


DATELESS = [pa.array([10**18] * 2, pa.timestamp("us")), pa.array([2**31 - 1] * 2, pa.date32())]


@pytest.mark.parametrize("captions", [not_utf8(), *DATELESS])
def test_values_that_python_cannot_hold(captions: pa.Array, tmp_path: Path) -> None:
    """Text that is not UTF-8, or a date in the year 33000, ended in UnicodeDecodeError or OverflowError."""
    path = tmp_path / "t.parquet"
    pq.write_table(pa.table({"filepath": ["a.png", "b.png"], "title": captions}), path)
    with pytest.raises(DataError, match=r"t\.parquet: damaged after row 0 \([^\n]+\); write it again"):
        list(open_table(path).rows())


def test_column_names_that_are_not_utf8(tmp_path: Path) -> None:
    """The schema alone ended in UnicodeDecodeError."""
    path = tmp_path / "t.parquet"
    table = pa.table({"filepath": ["a.png"], "title": ["x"], "zzzz": [1]})
    pq.write_table(table, path, compression="none", use_dictionary=False)
    path.write_bytes(path.read_bytes().replace(b"zzzz", b"\xff\xfe\xff\xfe"))
    with pytest.raises(DataError, match=r"t\.parquet: is not a whole Parquet file"):
        open_table(path)
    with pytest.raises(DataError, match=r"t\.parquet: cannot be read"):
        read_parquet(path, path, None, "write it again")


def archive(bytes_of_size: bytes = b"", **headers: str) -> io.BytesIO:
    """A tar file of one member, its header as PAX or as these bytes of the size field say."""
    sink = io.BytesIO()
    with tarfile.open(fileobj=sink, mode="w", format=tarfile.PAX_FORMAT) as tar:
        info = tarfile.TarInfo("a.txt")
        info.size, info.pax_headers = 3, headers
        tar.addfile(info, io.BytesIO(b"cat"))
    content = bytearray(sink.getvalue())
    if bytes_of_size:
        content[124 : 124 + len(bytes_of_size)] = bytes_of_size
        content[148:156] = b" " * 8
        content[148:156] = f"{sum(content[:512]):06o}\0 ".encode()
    return io.BytesIO(bytes(content))


def members(file: io.BytesIO) -> list[str]:
    with Tar.open(fileobj=file, mode="r:") as tar:
        return [member.name for member in tar]


@pytest.mark.parametrize(
    "file",
    [
        archive(b"\x80" + b"\x7f" * 11),
        archive(b"\xff" * 12),
        archive(**{"GNU.sparse.map": "nan"}),
        archive(mtime="nan"),
        archive(mtime="inf"),
        archive(mtime="1e30"),
        archive(**{"GNU.sparse.map": "0,1,2"}),
        archive(**{"GNU.sparse.major": "1", "GNU.sparse.minor": "0", "GNU.sparse.realsize": "9"}),
    ],
)
def test_headers_of_tar_files_that_lie(file: io.BytesIO) -> None:
    """ValueError, OverflowError and times that no column holds came out of tarfile as they were."""
    with pytest.raises(tarfile.TarError):
        members(file)


def test_whole_tar_files_are_read() -> None:
    """The guard must not cost members that are in order."""
    assert members(archive()) == ["a.txt"]
    assert members(archive(mtime="1700000000.5", comment="x")) == ["a.txt"]


LAUGHS = "a: &a [x,x,x,x,x,x,x,x,x]\n" + "".join(
    f"{name}: &{name} [{','.join(['*' + before] * 9)}]\n"
    for before, name in zip("abcdefg", "bcdefgh", strict=True)
)
BAD = {
    "date": "name: 2024-13-45\n",
    "number": "lr: !!int foo\n",
    "truth": "lr: !!bool foo\n",
    "time": "lr: !!timestamp x\n",
    "fraction": "lr: !!float x\n",
    "digits": f"lr: {'9' * 5000}\n",
    "deep": f"lr: {'[' * 3000}{']' * 3000}\n",
    "laughs": LAUGHS,
    "itself": "lr: &a [*a]\n",
    "code": "lr: !!python/object/apply:os.system [true]\n",
    "undefined": "lr: *x\n",
    "bytes": "\x00",
    "key": "? [1, 2]\n: 3\n",
    "twice": "lr: 1\nlr: 2\n--lr: 3\n",
}


def outcome(read: Callable[[Path], object], path: Path) -> str | None:
    """What reading a file complains of, if it does."""
    try:
        read(path)
    except ClipgraftError as error:
        return str(error)
    return None


@pytest.mark.parametrize("text", BAD.values(), ids=BAD)
@pytest.mark.parametrize("read", [read_yaml, read_prompts])
def test_bad_yaml_is_one_short_line(read: Callable[[Path], object], text: str, tmp_path: Path) -> None:
    """A few lines of YAML can stand for gigabytes, or raise what no caller catches."""
    path = tmp_path / "x.yaml"
    path.write_text(text, encoding="utf-8")
    told = outcome(read, path)
    assert told is None or (str(path) in told and "\n" not in told and len(told) < 500 + len(str(path)))
    assert told is not None or read is read_prompts  # prompts are text: what is no date may be a sentence


def test_laughs_are_called_aliases(tmp_path: Path) -> None:
    """Whoever used anchors in good faith must learn what to do."""
    (tmp_path / "x.yaml").write_text(LAUGHS, encoding="utf-8")
    with pytest.raises(ConfigError, match=r"aliases \(\*name\) counted; write it out in plain lines"):
        read_yaml(tmp_path / "x.yaml")


def test_a_few_aliases_work(tmp_path: Path) -> None:
    """Anchors are ordinary YAML."""
    (tmp_path / "x.yaml").write_text("lr: &rate 1e-4\nfull-lr: *rate\n", encoding="utf-8")
    assert read_yaml(tmp_path / "x.yaml") == {"lr": "1e-4", "full_lr": "1e-4"}
