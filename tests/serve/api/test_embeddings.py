"""OpenAI's `/v1/embeddings`, and its relatives: every vector is compared with the offline one."""

from __future__ import annotations

import asyncio
import base64
import copy
import io
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import httpx
import numpy as np
import pytest
import torch
import torch.nn.functional as F
from openai import AsyncOpenAI, BadRequestError, NotFoundError, OpenAI
from PIL import Image

import clipgraft as cg
from clipgraft.models.clip import Clip

TEXTS = ["a cat on a sofa", "một con mèo", "two red cars"]


def picture(seed: int) -> Image.Image:
    """Make a noise image."""
    pixels = np.random.default_rng(seed).integers(0, 255, (40, 50, 3), dtype=np.uint8)
    return Image.fromarray(pixels)


def data_uri(image: Image.Image) -> str:
    """Write an image as a data URI."""
    file = io.BytesIO()
    image.save(file, "PNG")
    return "data:image/png;base64," + base64.b64encode(file.getvalue()).decode()


def unit(features: torch.Tensor) -> np.ndarray:
    """Return features of unit norm."""
    return F.normalize(features.detach().float(), dim=-1).numpy()


def vectors(answer: httpx.Response) -> np.ndarray:
    """Read the vectors of an answer."""
    assert answer.status_code == 200, answer.text
    rows = answer.json()["data"]
    assert [row["index"] for row in rows] == list(range(len(rows)))
    return np.array([row["embedding"] for row in rows], np.float32)


def embed(client: httpx.Client, **asked: Any) -> httpx.Response:
    """Ask for embeddings of the base."""
    return client.post("/v1/embeddings", json={"model": "emoji", **asked})


@pytest.fixture
def openai(address: str) -> Iterator[OpenAI]:
    """Return OpenAI's own client."""
    with OpenAI(base_url=f"{address}/v1", api_key="none", max_retries=0) as made:
        yield made


@pytest.fixture(scope="module")
def adapted(adapter_folders: dict[str, Path]) -> dict[str, Clip]:
    """Return a base with each adapter alone."""
    made = {}
    for name, folder in adapter_folders.items():
        made[name] = cg.load("emoji")
        cg.load_adapter(made[name], folder)
    return made


@pytest.mark.parametrize("model", ["emoji", "vi", "emoji:both"])
def test_openai_client(openai: OpenAI, offline: Clip, adapted: dict[str, Clip], model: str) -> None:
    """A program written for OpenAI would get vectors that the offline index does not know."""
    wanted = unit(adapted.get(model.removeprefix("emoji:"), offline).encode_text(TEXTS))
    for options in ({}, {"encoding_format": "float"}, {"encoding_format": "base64"}):
        answer = openai.embeddings.create(model=model, input=TEXTS, **options)  # type: ignore[arg-type]
        got = [row.embedding for row in answer.data]
        if options.get("encoding_format") == "base64":  # the client leaves it as it is when asked for it
            got = [np.frombuffer(base64.b64decode(row), "<f4") for row in got]  # type: ignore[arg-type]
        np.testing.assert_allclose(np.array(got), wanted, atol=1e-5)
        assert answer.model == model
        assert answer.usage.prompt_tokens == sum(offline.count_tokens(TEXTS))


def test_openai_client_in_an_event_loop(address: str, offline: Clip) -> None:
    """Many requests at once would get each other's vectors."""

    async def ask_all() -> list[list[float]]:
        async with AsyncOpenAI(base_url=f"{address}/v1", api_key="none") as openai:
            made = [openai.embeddings.create(model="emoji", input=f"{number} cats") for number in range(40)]
            return [answer.data[0].embedding for answer in await asyncio.gather(*made)]

    wanted = unit(offline.encode_text([f"{number} cats" for number in range(40)]))
    np.testing.assert_allclose(np.array(asyncio.run(ask_all())), wanted, atol=1e-5)


@pytest.mark.parametrize("strength", [0, 0.5, 1.3])
def test_strength(client: httpx.Client, offline: Clip, adapted: dict[str, Clip], strength: float) -> None:
    """The slider of the page would do nothing, or something else than it says."""
    got = vectors(client.post("/v1/embeddings", json={"model": "vi", "input": TEXTS, "strength": strength}))
    clip = cg.load("emoji")
    state, base = clip.model.state_dict(), offline.model.state_dict()
    cg.merge_lora(merged := copy.deepcopy(adapted["vi"]))
    own = {
        name.replace(".base_layer", "").replace(".base.", "."): t
        for name, t in merged.model.state_dict().items()
    }
    for name in state:
        state[name] = (
            base[name] + strength * (own[name] - base[name]) if base[name].is_floating_point() else base[name]
        )
    clip.model.load_state_dict(state)
    np.testing.assert_allclose(got, unit(clip.encode_text(TEXTS)), atol=1e-5)


def test_adapters_change_the_answer(client: httpx.Client, adapted: dict[str, Clip]) -> None:
    """The comparison above would pass with a server that ignores `model`, were the adapters nothing."""
    base, other = (
        vectors(client.post("/v1/embeddings", json={"model": m, "input": TEXTS})) for m in ("emoji", "vi")
    )
    assert np.abs(base - other).max() > 0.05


def test_one_text(client: httpx.Client, offline: Clip) -> None:
    """A lone text, which OpenAI allows, would be refused or read letter by letter."""
    got = vectors(embed(client, input="a cat"))
    np.testing.assert_allclose(got, unit(offline.encode_text(["a cat"])), atol=1e-5)


def test_images_in_every_dialect(client: httpx.Client, adapted: dict[str, Clip]) -> None:
    """A client of infinity, vLLM or Jina would get another image's vector, or the vector of its address."""
    one, two = picture(1), picture(2)
    wanted = unit(adapted["both"].encode_image([one, two]))
    uris = [data_uri(one), data_uri(two)]
    part = {"type": "image_url", "image_url": {"url": uris[0], "detail": "auto"}}
    plain = uris[0].partition(",")[2]
    forms: list[dict[str, Any]] = [
        {"input": uris, "modality": "image"},
        {"input": [{"image": uris[0]}, {"image": uris[1]}]},
        {"input": {"image": uris[0]}},
        {"input": [{"image": plain}]},
        {"messages": [{"role": "user", "content": [part]}]},
    ]
    for form in forms:
        got = vectors(client.post("/v1/embeddings", json={"model": "both", **form}))
        np.testing.assert_allclose(got, wanted[: len(got)], atol=1e-4)


def test_a_photograph_is_longer_than_a_text(client: httpx.Client, adapted: dict[str, Clip]) -> None:
    """infinity's clients, who send images as plain strings, would be refused for anything above 24 kB."""
    noise = np.random.default_rng(0).integers(0, 256, (200, 300, 3), dtype=np.uint8)
    image = Image.fromarray(noise)
    wanted = unit(adapted["both"].encode_image([image]))
    for given in (data_uri(image), [data_uri(image)]):
        answer = embed(client, model="both", input=given, modality="image")
        np.testing.assert_allclose(vectors(answer), wanted, atol=1e-4)


def test_mixed_items_keep_their_order(client: httpx.Client, offline: Clip) -> None:
    """Texts and images in one list would come back under each other's numbers."""
    image = picture(3)
    got = vectors(embed(client, input=["a cat", {"image": data_uri(image)}, {"text": "a dog"}]))
    texts = unit(offline.encode_text(["a cat", "a dog"]))
    np.testing.assert_allclose(got[[0, 2]], texts, atol=1e-5)
    np.testing.assert_allclose(got[1:2], unit(offline.encode_image([image])), atol=1e-4)


def test_text_message(client: httpx.Client, offline: Clip) -> None:
    """A chat client that sends one text, as a string or as a part, would be refused."""
    for content in ("a cat", [{"type": "text", "text": "a cat"}]):
        got = vectors(embed(client, messages=[{"role": "user", "content": content}]))
        np.testing.assert_allclose(got, unit(offline.encode_text(["a cat"])), atol=1e-5)


def test_text_and_image_in_one_message_are_refused(client: httpx.Client) -> None:
    """Half of the message would silently not be in the vector."""
    parts = [
        {"type": "text", "text": "a cat"},
        {"type": "image_url", "image_url": {"url": data_uri(picture(1))}},
    ]
    answer = embed(client, messages=[{"role": "user", "content": parts}])
    assert answer.status_code == 400
    assert "2 texts and images" in answer.json()["error"]["message"]


def test_cut_texts_are_told(client: httpx.Client, offline: Clip) -> None:
    """Somebody would compare documents of which the model read the first words alone, without knowing it."""
    long = "cat " * 200
    answer = embed(client, input=["a cat", long])
    assert answer.json()["truncated"] == [1]
    assert answer.json()["usage"]["prompt_tokens"] == sum(offline.count_tokens(["a cat", long]))
    refused = embed(client, input=["a cat", long], truncate=False)
    assert refused.status_code == 400
    assert refused.json()["error"]["param"] == "input.1"


def test_unknown_model(openai: OpenAI) -> None:
    """A mistyped adapter would be answered with the base's vectors, and spoil an index without a word."""
    for name, near in (("v", "vi"), ("emoij", "emoji"), ("emoji:bth", "both"), ("nothing-like-it", None)):
        with pytest.raises(NotFoundError) as caught:
            openai.embeddings.create(model=name, input="a cat")
        assert caught.value.code == "model_not_found"
        assert caught.value.param == "model"
        assert (f"did you mean '{near}'" in caught.value.message) == (near is not None)


@pytest.mark.parametrize(
    ("asked", "param", "words"),
    [
        ({}, "input", "`input` is missing"),
        ({"input": []}, "input", "at least 1 item"),
        ({"input": ["a", 7]}, "input.1", "a text, {"),
        ({"input": ["a", None]}, "input.1", "a text, {"),
        ({"input": ["a"] * 65}, "input", "65 are too many for one request, which takes 64"),
        ({"input": "a" * 40_000}, "input", "32768"),
        ({"input": "a", "dimensions": 7}, "dimensions", "not trained so that their first numbers"),
        ({"input": "a", "encoding_format": "int8"}, "encoding_format", "'float' or 'base64'"),
        ({"input": "a", "strength": 0.5}, "strength", "the base has no adapter"),
        ({"input": "a", "strength": 1e9}, "strength", "less than or equal to 100"),
        ({"input": "a", "unheard": 1}, "unheard", "there is no such field"),
        ({"input": [{"image": "!!!"}]}, "input.0", "neither a data URI"),
        ({"input": ["a", {"image": "data:image/png,abc"}]}, "input.1", "not base64"),
        ({"input": ["a", {"image": "aGVsbG8="}]}, "input.1", "input.1"),
        ({"input": [{"image": "http://127.0.0.1/a.png"}]}, "input.0", "fetches no addresses"),
        ({"input": [{"image": 7}]}, "input.0.image", "valid string"),
        ({"input": [{"text": "a", "image": "b"}]}, "input.0.text", "no such field"),
        ({"input": "a", "messages": [{"role": "user", "content": "a"}]}, "messages", "not both"),
        ({"messages": []}, "messages", "at least 1 item"),
        ({"messages": [{"role": "a", "content": [{"type": "b"}]}]}, "messages.0.content.0", '"text" or'),
        ({"input": [1, 2, 3]}, "input", "token ids"),
        ({"input": [[1, 2], [3]]}, "input", "token ids"),
    ],
)  # fmt: skip
def test_refusals(client: httpx.Client, asked: dict[str, Any], param: str, words: str) -> None:
    """Somebody would not be told which field is wrong, or what it may be."""
    answer = embed(client, **asked)
    assert answer.status_code == 400, answer.text
    error = answer.json()["error"]
    assert error["param"] == param, error
    assert words in error["message"], error
    assert error["type"] == "invalid_request_error"


def test_width_that_fits(client: httpx.Client) -> None:
    """A client that names the width it expects would be refused for nothing."""
    width = client.get("/describe").json()["dim"]
    assert vectors(embed(client, input="a", dimensions=width)).shape == (1, width)


def test_errors_do_not_repeat_texts(client: httpx.Client) -> None:
    """A log of errors would hold what users wrote."""
    answer = embed(client, input="a secret of mine", encoding_format=5, unheard="another secret")
    assert answer.status_code == 400
    assert "secret" not in answer.text


def test_bad_request_of_openai(openai: OpenAI) -> None:
    """OpenAI's client would raise something else than its own error for a wrong request."""
    with pytest.raises(BadRequestError, match="input"):
        openai.embeddings.create(model="emoji", input=[])
