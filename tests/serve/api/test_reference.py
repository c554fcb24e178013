"""The OpenAPI schema and its page: examples that run, and no answer that the schema does not have."""

from __future__ import annotations

import json
import logging
import shutil
import time
from collections import Counter
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import httpx
import pytest
import schemathesis
from hypothesis import HealthCheck, Phase, given, settings, strategies
from playwright.sync_api import sync_playwright
from schemathesis import GenerationMode
from schemathesis.checks import not_a_server_error
from schemathesis.specs.openapi.checks import (
    content_type_conformance,
    response_schema_conformance,
    status_code_conformance,
)

from clipgraft.serve.api import create_app
from clipgraft.serve.api.examples import PIXEL
from clipgraft.serve.args import WebArgs
from lent_backend import LentBackend
from scripted_backend import ScriptedBackend
from served_app import running


@pytest.fixture(scope="module")
def open_server(
    backend: LentBackend, adapter_folders: dict[str, Path], tmp_path_factory: pytest.TempPathFactory
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
        assert "://" not in answer.text
    assert "://" not in page.text


def test_page_sends_its_examples(open_server: str) -> None:
    """The page would be blank, or its policy would keep its own script from running."""
    found = next(filter(None, map(shutil.which, ("chromium", "chromium-browser", "google-chrome"))), None)
    if found is None:
        pytest.skip("no chromium to open the page in: apt-get install chromium")
    with sync_playwright() as playwright:
        browser = playwright.chromium.launch(executable_path=found, args=["--no-sandbox"])
        page = browser.new_page()
        page.set_default_timeout(120_000)
        errors: list[str] = []
        asked: list[str] = []
        page.on("console", lambda message: errors.append(message.text) if message.type == "error" else None)
        page.on("pageerror", lambda error: errors.append(str(error)))
        page.on("request", lambda request: asked.append(request.url))
        page.goto(f"{open_server}/docs")
        first = page.locator("section").first
        first.get_by_role("button", name="Send").click()
        first.locator(".good").wait_for()
        answer = json.loads(first.locator("pre").inner_text().partition("\n…")[0])
        assert len(answer["data"]) == 2
        assert errors == []
        assert all(url.startswith(f"{open_server}/") for url in asked)
        browser.close()


def test_log_and_metrics_of_a_request(open_server: str, caplog: pytest.LogCaptureFixture) -> None:
    """A log would hold what users wrote, or not tell which route was slow."""
    headers = {"X-Request-ID": "id-of-mine", "Authorization": "Bearer a-secret-key"}
    asked = {"model": "vi", "input": ["a secret text", {"image": PIXEL}]}
    with caplog.at_level(logging.INFO, "clipgraft.serve.requests"):
        answer = httpx.post(
            f"{open_server}/v1/embeddings?token=secret", json=asked, headers=headers, timeout=60
        )
        httpx.get(f"{open_server}/docs")
        httpx.get(f"{open_server}/v1/models/secret-name", timeout=60)
        ending = time.monotonic() + 60
        while len(caplog.records) < 3 and time.monotonic() < ending:  # a line is written after its answer
            time.sleep(0.01)
    assert answer.headers["x-request-id"] == "id-of-mine"
    lines = [record.getMessage() for record in caplog.records]
    assert "200 POST /v1/embeddings" in lines[0]
    assert "items=2" in lines[0]
    assert "adapter=vi" in lines[0]
    assert "id=id-of-mine" in lines[0]
    assert "200 GET /docs" in lines[1]
    assert "404 GET /v1/models/{model:path}" in lines[2]
    assert "error=model_not_found" in lines[2]
    assert "secret" not in caplog.text


def test_without_the_page() -> None:
    """A server that should show no page would."""
    for page, status in ((True, 200), (False, 404)):
        with running(create_app(ScriptedBackend, WebArgs(page=page))) as url:
            assert httpx.get(f"{url}/").status_code == status
            assert httpx.get(f"{url}/docs").status_code == 200


CHECKS = [
    not_a_server_error,
    status_code_conformance,
    content_type_conformance,
    response_schema_conformance,
]
EXPECTED = {200, 400, 404, 409, 413, 415}


@pytest.mark.parametrize("examples", [6, pytest.param(300, marks=pytest.mark.slow)])
def test_no_request_is_a_fault_of_ours(open_server: str, examples: int) -> None:
    """Some request that the schema describes, or nearly, would be a 500, or an answer of an unknown shape."""
    schema = schemathesis.openapi.from_url(f"{open_server}/openapi.json")
    seen = Counter[tuple[str, int]]()
    for result in schema.get_all_operations():
        _send_many(result.ok(), examples, seen)
    assert {status for _, status in seen} <= EXPECTED
    answered = {path for path, status in seen if status == 200}
    wanted = {"/v1/embeddings", "/classify", "/rank", "/search", "/v1/models", "/metrics"}
    assert answered >= (wanted if examples > 100 else {"/v1/models", "/metrics"})


def _send_many(operation: Any, examples: int, seen: Counter[tuple[str, int]]) -> None:
    """Send what fits the schema of a route, and what does not quite."""
    forms = [operation.as_strategy(generation_mode=mode) for mode in GenerationMode]

    @settings(
        max_examples=examples,
        deadline=None,
        database=None,
        derandomize=True,
        phases=[Phase.generate],
        suppress_health_check=list(HealthCheck),
    )
    @given(case=strategies.one_of(*forms), known=strategies.booleans())
    def send(case: Any, known: bool) -> None:
        if known and isinstance(case.body, dict):
            # Of what is generated, next to no name would be one that is served, and no image could be read.
            case.body = {**_readable(case.body), **({"model": "vi"} if "model" in case.body else {})}
        answer = case.call(timeout=120)
        case.validate_response(answer, checks=CHECKS)
        seen[operation.path, answer.status_code] += 1

    send()


def _readable(value: Any) -> Any:
    """Put an image in place of each that is generated."""
    if isinstance(value, list):
        return [_readable(item) for item in value]
    if not isinstance(value, dict):
        return value
    return {key: PIXEL if key in ("image", "url") else _readable(item) for key, item in value.items()}
