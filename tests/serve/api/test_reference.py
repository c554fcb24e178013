"""The OpenAPI schema and its page: examples that run, and no answer that the schema does not have."""

from __future__ import annotations

import shutil
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import httpx
import pytest
import schemathesis
from hypothesis import HealthCheck, Phase, settings
from schemathesis.specs.openapi.checks import (
    content_type_conformance,
    response_schema_conformance,
    status_code_conformance,
)

from clipgraft.serve.api import create_app
from clipgraft.serve.args import WebArgs
from scripted_backend import ScriptedBackend
from served_app import running
from small_backend import SmallBackend


@pytest.fixture(scope="module")
def open_server(
    backend: SmallBackend, adapter_folders: dict[str, Path], tmp_path_factory: pytest.TempPathFactory
) -> Iterator[str]:
    """Serve with everything allowed that options can allow, but the fetching of addresses."""
    root = tmp_path_factory.mktemp("root")
    shutil.copytree(adapter_folders["vi"], root / "shoes")
    web = WebArgs(allow_adapter_loading=True, adapter_root=root, max_body_mb=1, max_items=16)
    with running(create_app(lambda: backend, web)) as url:
        yield url


def operations(schema: dict[str, Any]) -> Iterator[tuple[str, str, dict[str, Any]]]:
    """List paths, methods and operations of a schema."""
    for path, methods in schema["paths"].items():
        for method, operation in methods.items():
            yield path, method, operation


def test_every_example_runs(open_server: str) -> None:
    """Whoever copies an example from the reference would be refused."""
    with httpx.Client(base_url=open_server, timeout=60) as client:
        sent = 0
        for path, method, operation in operations(client.get("/openapi.json").json()):
            content = operation.get("requestBody", {}).get("content", {}).get("application/json")
            if content is None:
                filled = path.replace("{model}", "vi").replace("{folder}", "photos").replace("{row}", "1")
                assert client.request(method, filled).status_code == 200
                continue
            assert content["examples"], path
            for name, example in content["examples"].items():
                answer = client.request(method, path, json=example["value"])
                assert answer.status_code == 200, (path, name, answer.text)
                sent += 1
        assert sent >= 15


def test_examples_name_the_served_base() -> None:
    """The examples of another base would be refused, for naming `emoji`."""
    with running(create_app(ScriptedBackend)) as url:
        schema = httpx.get(f"{url}/openapi.json").json()
        examples = schema["paths"]["/v1/embeddings"]["post"]["requestBody"]["content"]["application/json"][
            "examples"
        ]
        assert {example["value"]["model"] for example in examples.values()} == {"base"}


def test_schema_without_a_model() -> None:
    """Programs that read the schema at their start would wait for the model, or fail."""
    backend = ScriptedBackend()
    backend.state = "starting"
    with running(create_app(lambda: backend)) as url:
        assert httpx.get(f"{url}/openapi.json").status_code == 200


def test_page_needs_nothing_from_elsewhere(open_server: str) -> None:
    """The reference would be blank without the internet, or tell a stranger who reads it."""
    page = httpx.get(f"{open_server}/docs")
    assert page.status_code == 200
    assert page.headers["content-security-policy"].startswith("default-src 'none'")
    for name in ("docs/reference.css", "docs/reference.js"):
        assert name in page.text
        answer = httpx.get(f"{open_server}/{name}")
        assert answer.status_code == 200
        assert "http://" not in answer.text
        assert "https://" not in answer.text
    assert "http" not in page.text.replace("https://", "http://").replace("<!doctype html>", "").replace(
        "http-", ""
    )


@pytest.mark.parametrize("examples", [15, pytest.param(400, marks=pytest.mark.slow)])
def test_no_request_is_a_fault_of_ours(open_server: str, examples: int) -> None:
    """Some request that the schema describes, or nearly, would be a 500, or an answer of an unknown shape."""
    schema = schemathesis.openapi.from_url(f"{open_server}/openapi.json")
    checks = [
        schemathesis.checks.not_a_server_error,
        status_code_conformance,
        content_type_conformance,
        response_schema_conformance,
    ]
    seen = set()
    for result in schema.get_all_operations():
        operation = result.ok()

        @settings(
            max_examples=examples,
            deadline=None,
            database=None,
            derandomize=True,
            phases=[Phase.explicit, Phase.generate],
            suppress_health_check=list(HealthCheck),
        )
        @schemathesis.hypothesis_given(operation)  # type: ignore[misc]
        def run(case: Any) -> None:
            answer = case.call(timeout=60)
            case.validate_response(answer, checks=checks)
            seen.add((operation.path, answer.status_code))

        run()
    assert {status for _, status in seen} <= {200, 400, 404, 409, 415}
    answered = {path for path, status in seen if status == 200}
    assert answered >= {"/v1/embeddings", "/classify", "/rank", "/search", "/v1/models"}
