"""`/v1/models`, and adapters that requests load and unload."""

from __future__ import annotations

import shutil
from collections.abc import Iterator
from pathlib import Path

import httpx
import pytest
from openai import OpenAI

from clipgraft.serve.api import create_app
from clipgraft.serve.args import WebArgs
from lent_backend import LentBackend
from served_app import running


@pytest.fixture(scope="module")
def root(tmp_path_factory: pytest.TempPathFactory, adapter_folders: dict[str, Path]) -> Path:
    """Return a folder that holds an adapter, a damaged one, and a link that leads out of it."""
    folder = tmp_path_factory.mktemp("root")
    shutil.copytree(adapter_folders["vi"], folder / "shoes")
    (folder / "empty").mkdir()
    (folder / "out").symlink_to(adapter_folders["vi"])
    (folder / "circle").symlink_to(folder / "circle")
    return folder


@pytest.fixture(scope="module")
def loading(backend: LentBackend, root: Path) -> Iterator[str]:
    """Serve with the loading of adapters allowed."""
    with running(create_app(lambda: backend, WebArgs(allow_adapter_loading=True, adapter_root=root))) as url:
        yield url


def test_list(address: str) -> None:
    """A client that lists the models would not find the adapters, or what they belong to."""
    with OpenAI(base_url=f"{address}/v1", api_key="none") as openai:
        models = {model.id: model for model in openai.models.list()}
        assert set(models) == {"emoji", "vi", "both"}
        assert models["emoji"].parent is None  # type: ignore[attr-defined]
        assert models["vi"].parent == "emoji"  # type: ignore[attr-defined]
        assert openai.models.retrieve("vi").id == "vi"
        assert openai.models.retrieve("emoji:vi").id == "vi"


def test_unknown_one(client: httpx.Client) -> None:
    """Somebody would not see what they misspelt."""
    answer = client.get("/v1/models/bth")
    assert answer.status_code == 404
    assert "did you mean 'both'?" in answer.json()["error"]["message"]
    assert client.get("/v1/models/hf:a/b").status_code == 404


def test_loading_is_off(client: httpx.Client, root: Path) -> None:
    """Anybody who reaches a server could make it read folders."""
    for path in ("load", "unload"):
        asked = {"lora_name": "shoes", **({"lora_path": "shoes"} if path == "load" else {})}
        answer = client.post(f"/v1/{path}_lora_adapter", json=asked)
        assert answer.status_code == 403
        assert answer.json()["error"]["type"] == "permission_error"


def test_loading_needs_a_folder(backend: LentBackend) -> None:
    """Without a folder to stay in, requests could make the server read any."""
    with running(create_app(lambda: backend, WebArgs(allow_adapter_loading=True))) as url:
        asked = {"lora_name": "a", "lora_path": "/"}
        assert httpx.post(f"{url}/v1/load_lora_adapter", json=asked).status_code == 403


def test_loading_needs_one_process(backend: LentBackend, root: Path) -> None:
    """One of several processes would know the adapter, and the next request would meet another."""
    web = WebArgs(allow_adapter_loading=True, adapter_root=root, workers=2)
    with running(create_app(lambda: backend, web)) as url:
        asked = {"lora_name": "a", "lora_path": "shoes"}
        answer = httpx.post(f"{url}/v1/load_lora_adapter", json=asked)
        assert answer.status_code == 403
        assert "give all at the start" in answer.json()["error"]["message"]
        assert not httpx.get(f"{url}/describe", timeout=60).json()["limits"]["adapter_loading"]


def test_load_use_unload(loading: str, root: Path) -> None:
    """A program written for vLLM could not bring its adapter, or be rid of it."""
    with httpx.Client(base_url=loading, timeout=60) as client:
        asked = {"lora_name": "shoes", "lora_path": str(root / "shoes")}
        answer = client.post("/v1/load_lora_adapter", json=asked)
        assert (answer.status_code, answer.text) == (200, "Success: LoRA adapter 'shoes' added successfully.")
        again = client.post("/v1/load_lora_adapter", json=asked)
        assert again.status_code == 400
        assert "unload it first" in again.json()["error"]["message"]
        one, other = (
            client.post("/v1/embeddings", json={"model": name, "input": "a"}).json()["data"]
            for name in ("shoes", "vi")
        )
        assert one == other
        assert client.post("/v1/unload_lora_adapter", json={"lora_name": "shos"}).status_code == 404
        gone = client.post("/v1/unload_lora_adapter", json={"lora_name": "shoes", "lora_int_id": 1})
        assert (gone.status_code, gone.text) == (200, "Success: LoRA adapter 'shoes' removed successfully.")
        assert client.post("/v1/embeddings", json={"model": "shoes", "input": "a"}).status_code == 404
        relative = client.post("/v1/load_lora_adapter", json={**asked, "lora_path": "shoes"})
        assert relative.status_code == 200
        client.post("/v1/unload_lora_adapter", json={"lora_name": "shoes"})


@pytest.mark.parametrize(
    "path",
    [
        "..",
        "../..",
        "/",
        "/etc",
        "out",
        "shoes/../..",
        "nothing",
        "circle",
        "a\0b",
        "x" * 4000,
        "hf:a/b",
        "~",
    ],
)
def test_paths_outside(loading: str, path: str) -> None:
    """A request could make the server read folders that were not meant, or tell whether they exist."""
    answer = httpx.post(f"{loading}/v1/load_lora_adapter", json={"lora_name": "a", "lora_path": path})
    assert answer.status_code == 400
    assert (
        answer.json()["error"]["message"]
        == "`lora_path`: there is no such folder in the server's `adapter_root`"
    )


@pytest.mark.parametrize("name", ["emoji", "", "-a", "../a", "a:b", "a/b", "a\nb", "a" * 300])
def test_names_that_cannot_be(loading: str, name: str) -> None:
    """An adapter could take the name of the base, or one that breaks a log or a path."""
    answer = httpx.post(f"{loading}/v1/load_lora_adapter", json={"lora_name": name, "lora_path": "shoes"})
    assert answer.status_code == 400
    assert answer.json()["error"]["param"] == "lora_name"


def test_no_adapter_in_the_folder(loading: str) -> None:
    """Somebody would not be told that it is what they brought that is at fault."""
    answer = httpx.post(f"{loading}/v1/load_lora_adapter", json={"lora_name": "a", "lora_path": "empty"})
    assert answer.status_code == 400
    assert answer.json()["error"]["param"] == "lora_path"
