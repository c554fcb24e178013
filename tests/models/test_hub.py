"""Models fetched by name: every way a hub can answer, on a local server that speaks its protocol.

huggingface_hub reads its endpoint at import, so one child process loads everything here. A retry would be a
sleep inside huggingface_hub; the child raises at the first one.
"""

from __future__ import annotations

import copy
import json
import os
import shutil
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import open_clip
import pytest
import torch
from safetensors.torch import save_file
from torch import Tensor, nn

from clipgraft.models.clip import as_clip
from clipgraft.models.hub import KNOWN_HUB_IDS
from hub_server import HubServer

TAG = "some_tag"
SAFE_TAG, STRETCHED_TAG = "safe_tag", "stretched_tag"
MEAN = [0.1, 0.2, 0.3]
CHILD = f"""
import json, logging, sys, time, types
import huggingface_hub.utils._http as http
import open_clip, open_clip.pretrained
import torch
import clipgraft as cg
from clipgraft.models import mapped_weights

mapped_weights._SMALLEST = 1  # a tiny model's are mapped too, on whatever file system this runs
mapped_weights._filesystem = lambda path: "ext4"

def slept(seconds):
    raise AssertionError(f"huggingface_hub waits {{seconds}} s to try again")

http.time = types.SimpleNamespace(**{{**vars(time), "sleep": slept}})
open_clip.add_model_config(sys.argv[1])
tag = open_clip.pretrained._pcfg(hf_hub="owner/tiny-openclip/", mean={MEAN})
gone = open_clip.pretrained._pcfg(hf_hub="owner/gone/")
gated = open_clip.pretrained._pcfg(hf_hub="gated/tiny/")
safe = open_clip.pretrained._pcfg(hf_hub="owner/tiny-safe/", mean={MEAN})
stretched = open_clip.pretrained._pcfg(hf_hub="owner/tiny-stretched/weights.pth", mean={MEAN})
open_clip.pretrained._PRETRAINED["tiny-clip"] = {{
    "{TAG}": tag, "gone_tag": gone, "gated_tag": gated, "{SAFE_TAG}": safe, "{STRETCHED_TAG}": stretched
}}
said = logging.FileHandler(sys.argv[2])
logging.getLogger("clipgraft").addHandler(said)
logging.getLogger("clipgraft").setLevel(logging.INFO)
for line in sys.stdin:
    arguments, out = json.loads(line)
    try:
        clip = cg.load(*arguments)
        image, text = torch.load(out)
        with torch.no_grad():
            features = clip.encode_image(image), clip.encode_text(text), clip.tokenize(["the cat"])
        mapped = hasattr(clip.model, mapped_weights._FILES) and mapped_weights._lies_in_files(clip.model)
        torch.save((*features, repr(clip.preprocess), mapped), out)
        answer = [None, ""]
    except Exception as error:
        answer = [type(error).__name__, str(error)]
    print(json.dumps(answer), flush=True)
"""


class Remote:
    """A process whose hub is the local server."""

    def __init__(self, server: HubServer, config: Path, folder: Path) -> None:
        self.server = server
        self.folder = folder
        kept = {name: value for name, value in os.environ.items() if not name.lower().endswith("_proxy")}
        for name in ("HF_TOKEN", "HF_HUB_OFFLINE", "TRANSFORMERS_OFFLINE", "HF_HUB_CACHE"):
            kept.pop(name, None)
        (folder / "said.txt").touch()
        self.process = subprocess.Popen(
            [sys.executable, "-W", "ignore", "-c", CHILD, str(config), str(folder / "said.txt")],
            env={**kept, "HF_ENDPOINT": server.url, "HF_HOME": str(folder / "cache")},
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            text=True,
        )

    def ask(self, *arguments: str, inputs: tuple[Tensor, Tensor] | None = None) -> tuple[Any, Any]:
        """`cg.load` there: its features, or the name of its error with the message."""
        out = self.folder / "exchange.pt"
        torch.save(inputs or (torch.zeros(1, 3, 32, 32), torch.ones(1, 16, dtype=torch.long)), out)
        assert self.process.stdin is not None
        assert self.process.stdout is not None
        self.process.stdin.write(json.dumps([arguments, str(out)]) + "\n")
        self.process.stdin.flush()
        error, message = json.loads(self.process.stdout.readline())
        return (error, message) if error else (None, torch.load(out))

    def said(self) -> list[str]:
        """What was logged since it was last asked."""
        file = self.folder / "said.txt"
        lines = file.read_text(encoding="utf-8").splitlines()
        os.truncate(file, 0)
        return lines

    def forget(self, repository: str) -> None:
        """Take a repository out of the cache, and what was logged out of the log."""
        folder = f"models--{repository.replace('/', '--')}"
        shutil.rmtree(self.folder / "cache" / "hub" / folder, ignore_errors=True)
        self.said()

    def refusal(self, *arguments: str) -> str:
        """The message of the ModelError that `cg.load` ends with there."""
        error, message = self.ask(*arguments)
        assert error == "ModelError", message
        assert len(message.splitlines()) == 1
        return str(message)


@pytest.fixture(scope="module")
def remote(
    tmp_path_factory: pytest.TempPathFactory, tiny_config: Path, hf_folder: Path, _openclip_master: nn.Module
) -> Iterator[Remote]:
    """A hub with one model of each library, and a process that loads from it."""
    root = tmp_path_factory.mktemp("hub")
    shutil.copytree(hf_folder, root / "owner" / "tiny-hf")
    (root / "owner" / "blip").mkdir()
    (root / "owner" / "blip" / "config.json").write_text('{"model_type": "blip"}', encoding="utf-8")
    repository = root / "owner" / "tiny-openclip"
    repository.mkdir()
    torch.save(_openclip_master.state_dict(), repository / "open_clip_pytorch_model.bin")
    _save_others(root / "owner", _openclip_master.state_dict())
    config = {
        "model_cfg": json.loads(tiny_config.read_text(encoding="utf-8")),
        "preprocess_cfg": {"mean": MEAN},
    }
    (repository / "open_clip_config.json").write_text(json.dumps(config), encoding="utf-8")
    server = HubServer(root)
    child = Remote(server, tiny_config, tmp_path_factory.mktemp("child"))
    yield child
    assert child.process.stdin is not None
    assert child.process.stdout is not None
    child.process.kill()
    child.process.stdin.close()
    child.process.stdout.close()
    child.process.wait()
    server.stop()


def _save_others(owner: Path, state: dict[str, Tensor]) -> None:
    """The same weights as safetensors, and with a table of text positions that open_clip stretches."""
    for name in ("tiny-safe", "tiny-stretched"):
        (owner / name).mkdir()
    save_file(dict(state), owner / "tiny-safe" / "open_clip_model.safetensors")
    short = {**state, "positional_embedding": state["positional_embedding"][:40].clone()}
    torch.save(short, owner / "tiny-stretched" / "weights.pth")


@pytest.fixture
def unplugged(remote: Remote) -> Iterator[Remote]:
    """The same process while nothing answers at the hub's address."""
    remote.server.stop()
    yield remote
    remote.server.start()


def _inputs(vocabulary: int, length: int) -> tuple[Tensor, Tensor]:
    generator = torch.Generator().manual_seed(3)
    tokens = torch.randint(1, vocabulary - 2, (3, length), generator=generator)
    tokens[:, length // 2] = vocabulary - 1
    return torch.randn(3, 3, 32, 32, generator=generator), tokens


def test_hub_id_gives_the_stock_model(remote: Remote, tiny_hf: nn.Module) -> None:
    """`cg.load("hf:owner/name")` gives other embeddings than transformers gives for that repository."""
    image, text = _inputs(100, 16)
    remote.forget("owner/tiny-hf")
    error, result = remote.ask("hf:owner/tiny-hf", inputs=(image, text))
    assert error is None, result
    with torch.no_grad():
        expected = (
            tiny_hf.get_image_features(image).pooler_output,
            tiny_hf.get_text_features(text).pooler_output,
        )
    torch.testing.assert_close(result[0], expected[0], atol=1e-6, rtol=0)
    torch.testing.assert_close(result[1], expected[1], atol=1e-6, rtol=0)
    assert result[4] == (sys.platform == "linux"), "its weights are mapped"
    assert any("model.safetensors" in request for request in remote.server.requests)
    size = (remote.server.root / "owner" / "tiny-hf" / "model.safetensors").stat().st_size / 1e6
    assert remote.said() == [f"fetching owner/tiny-hf from the hub (model.safetensors, about {size:,.1f} MB)"]
    assert remote.ask("hf:owner/tiny-hf", inputs=(image, text))[0] is None
    assert remote.said() == [], "it is here now"


@pytest.mark.parametrize(
    ("arguments", "file"),
    [
        (("tiny-clip", TAG), "tiny-openclip from the hub (open_clip_pytorch_model.bin"),
        (("tiny-clip", SAFE_TAG), "tiny-safe from the hub (open_clip_model.safetensors"),
        (("hf-hub:owner/tiny-openclip",), "tiny-openclip from the hub (open_clip_pytorch_model.bin"),
    ],
)
def test_openclip_tag_gives_the_stock_model(
    remote: Remote, tiny_openclip: nn.Module, arguments: tuple[str, ...], file: str
) -> None:
    """An open_clip tag, or `hf-hub:` id, gives other embeddings or pixels than open_clip gives, or copies."""
    image, text = _inputs(49408, 77)
    remote.forget(f"owner/{file.partition(' ')[0]}")
    error, result = remote.ask(*arguments, inputs=(image, text))
    assert error is None, result
    with torch.no_grad():
        expected = tiny_openclip.encode_image(image), tiny_openclip.encode_text(text)
    torch.testing.assert_close(result[0], expected[0], atol=1e-6, rtol=0)
    torch.testing.assert_close(result[1], expected[1], atol=1e-6, rtol=0)
    assert result[2].equal(open_clip.SimpleTokenizer()(["the cat"]))
    assert "0.1, 0.2, 0.3" in result[3]
    assert result[4] == (sys.platform == "linux"), "its weights are mapped"
    (line,) = remote.said()
    assert line.startswith(f"fetching owner/{file}, about ")


def test_tag_that_open_clip_alone_can_read(remote: Remote, tiny_openclip: nn.Module) -> None:
    """A published tag whose file open_clip translates is refused, or gives other embeddings."""
    image, text = _inputs(49408, 77)
    error, result = remote.ask("tiny-clip", STRETCHED_TAG, inputs=(image, text))
    assert error is None, result
    stock = copy.deepcopy(tiny_openclip)
    open_clip.load_checkpoint(stock, str(remote.server.root / "owner" / "tiny-stretched" / "weights.pth"))
    with torch.no_grad():
        torch.testing.assert_close(result[1], stock.encode_text(text), atol=1e-5, rtol=0)


def test_unknown_repository(remote: Remote) -> None:
    """A mistyped hub id ends with a traceback, or without the id that was meant."""
    message = remote.refusal("hf:openai/clip-vit-base-patch23")
    assert "did you mean openai/clip-vit-base-patch32" in message
    assert "check the spelling" in message


def test_gated_repositories(remote: Remote) -> None:
    """Whoever has not accepted a model's terms is not told to."""
    for arguments in (("hf:gated/tiny",), ("tiny-clip", "gated_tag")):
        message = remote.refusal(*arguments)
        assert "gated" in message
        assert "hf auth login" in message


def test_tag_whose_repository_is_gone(remote: Remote) -> None:
    """A tag whose weights were taken off the hub ends with a traceback or with no way out."""
    message = remote.refusal("tiny-clip", "gone_tag")
    assert "'tiny-clip' with pretrained 'gone_tag'" in message
    assert "as `pretrained`" in message


def test_openclip_repository_as_hf(remote: Remote) -> None:
    """`hf:` and an open_clip-only repository do not lead to `hf-hub:`."""
    assert "hf-hub:owner/tiny-openclip" in remote.refusal("hf:owner/tiny-openclip")


def test_other_model_type_on_the_hub(remote: Remote) -> None:
    """A BLIP repository is loaded as CLIP, most weights drawn at random."""
    assert "'blip' model" in remote.refusal("hf:owner/blip")


@pytest.mark.parametrize("arguments", [("hf:owner/never-fetched",), ("tiny-clip", "gone_tag")])
def test_offline_is_said_at_once(unplugged: Remote, arguments: tuple[str, ...]) -> None:
    """Without a network the user waits a minute of retries, or is not told what is wrong."""
    message = unplugged.refusal(*arguments)
    assert f"{unplugged.server.url} cannot be reached" in message
    assert "check the network connection" in message


def test_exact_id_is_not_suggested(unplugged: Remote) -> None:
    """A right id that cannot be fetched asks whether the user meant that same id."""
    assert "did you mean" not in unplugged.refusal(f"hf:{KNOWN_HUB_IDS[0]}")


def test_offline_uses_the_cache(remote: Remote, tiny_hf: nn.Module) -> None:
    """A model that was fetched before cannot be loaded on a train."""
    image, text = _inputs(100, 16)
    assert remote.ask("hf:owner/tiny-hf")[0] is None
    assert remote.ask("tiny-clip", TAG)[0] is None
    remote.server.stop()
    try:
        error, result = remote.ask("hf:owner/tiny-hf", inputs=(image, text))
        assert error is None, result
        torch.testing.assert_close(result[1], as_clip(tiny_hf).encode_text(text), atol=1e-6, rtol=0)
        error, result = remote.ask("tiny-clip", TAG)
        assert error is None, result
    finally:
        remote.server.start()


def test_back_online(remote: Remote) -> None:
    """One failed attempt leaves the process offline for good."""
    remote.server.stop()
    remote.refusal("hf:owner/other")
    remote.server.start()
    shutil.copytree(remote.server.root / "owner" / "tiny-hf", remote.server.root / "owner" / "other")
    assert remote.ask("hf:owner/other")[0] is None
