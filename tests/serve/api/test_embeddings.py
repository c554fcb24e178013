"""OpenAI's `/v1/embeddings`, and its relatives: every vector is compared with the offline one."""

from __future__ import annotations

import httpx
import numpy as np

from clipgraft.models.clip import Clip

TEXTS = ["a cat on a sofa", "một con mèo", "two red cars"]


def vectors(answer: httpx.Response) -> np.ndarray:
    assert answer.status_code == 200, answer.text
    return np.array([row["embedding"] for row in answer.json()["data"]], np.float32)


def test_texts_of_the_base(client: httpx.Client, offline: Clip) -> None:
    """Vectors from the server would not be found by those that were indexed offline."""
    got = vectors(client.post("/v1/embeddings", json={"model": "emoji", "input": TEXTS}))
    wanted = offline.encode_text(TEXTS, normalize=True).detach().numpy()
    np.testing.assert_allclose(got, wanted, atol=1e-5)
