"""Answer messages of `clipgraft.serve` in this process, one after another: for tests of the web side."""

from __future__ import annotations

import asyncio
import io
from pathlib import Path
from typing import Any

import numpy as np
import torch
import torch.nn.functional as F
from PIL import Image
from torch import Tensor

import clipgraft as cg
from clipgraft.engine.encoder import encode_rows
from clipgraft.errors import AdapterError, ConfigError, DataError, ItemError, UnknownNameError
from clipgraft.models.clip import Clip
from clipgraft.pictures import ImageError, open_image
from clipgraft.serve import messages as m


class SmallBackend:
    """A base and adapters that are attached to it; searches a made-up folder `photos` of six rows."""

    def __init__(self, clip: Clip, adapters: dict[str, Path]) -> None:
        self.clip = clip
        self.adapters = dict(adapters)
        for name, path in adapters.items():
            cg.load_adapter(clip, path, name=name)
        self.state: m.State = "ready"
        self.closed = False

    async def answer(self, message: m.Message[Any], *, timeout: float | None = None) -> Any:
        return await asyncio.to_thread(getattr(self, f"_{type(message).__name__.lower()}"), message)

    async def close(self) -> None:
        self.closed = True

    def _encode(self, message: m.Encode) -> m.Encoded:
        rows = self._features(message.items, message.using)
        tokens, cut = [], []
        for index, item in enumerate(message.items):
            if isinstance(item, m.Text):
                tokens.append(self.clip.count_tokens([item.text])[0])
                if tokens[-1] > self.clip.context_length:
                    cut.append(index)
            else:
                tokens.append(196)
        return m.Encoded(rows.numpy(), tuple(tokens), tuple(cut))

    def _features(self, items: tuple[m.Item, ...], using: m.With) -> Tensor:
        if using.adapter is not None and using.adapter not in self.adapters:
            raise UnknownNameError(f"no adapter '{using.adapter}'")
        return torch.cat([self._feature(i, item, using) for i, item in enumerate(items)])

    def _feature(self, index: int, item: m.Item, using: m.With) -> Tensor:
        if isinstance(item, m.Text):
            features = encode_rows(self.clip, "text", self.clip.tokenize([item.text]), [using.adapter])
        else:
            try:
                pixels = self.clip.pixels([open_image(item.content)])
            except ImageError as error:
                raise ItemError(index, error.reason) from None
            features = encode_rows(self.clip, "vision", pixels, [using.adapter])
        return F.normalize(features.float(), dim=-1)

    def _classify(self, message: m.Classify) -> m.Classified:
        if not message.classes:
            raise ConfigError("`classes` is empty and the base has no head: give names of classes")
        names = tuple(m.Text(message.templates[0].replace("{}", name)) for name in message.classes)
        scores = self._features(message.items, message.using) @ self._features(names, message.using).T
        probabilities = (scores * 100).softmax(-1)
        return m.Classified(message.classes, probabilities.numpy(), scores.numpy())

    def _rank(self, message: m.Rank) -> m.Ranked:
        rows = self._features((message.query, *message.documents), message.using)
        scores = (rows[1:] @ rows[0]).numpy()
        order = np.argsort(-scores, kind="stable")[: message.top]
        tokens = (3,) * (1 + len(message.documents))
        return m.Ranked(tuple(order.tolist()), tuple(scores[order].tolist()), tokens)

    def _search(self, message: m.Search) -> m.Found:
        if message.folder not in ("", "photos"):
            raise UnknownNameError(f"no folder '{message.folder}' (did you mean 'photos'?)")
        if message.where is not None and "=" not in message.where:
            raise ConfigError("`where`: cannot be read; write COLUMN OPERATOR VALUE")
        if message.text is not None:
            self._features((m.Text(message.text),), message.using)
        if message.picture is not None:
            self._features((message.picture,), message.using)
        hits = [
            {"rank": rank + 1, "score": 0.9 - rank / 10, "row": rank, "path": f"{rank}.png", "caption": None,
             "metadata": {"width": np.int64(8), "taken": float("nan"), "raw": b"\xff"}}
            for rank in range(min(message.k, 6))
        ]  # fmt: skip
        return m.Found(tuple(hits), "photos")

    def _thumbnail(self, message: m.Thumbnail) -> bytes:
        if message.folder != "photos":
            raise UnknownNameError(f"no folder '{message.folder}'")
        if message.row >= 6:
            raise DataError(f"row {message.row} is not one of the 6 of photos")
        file = io.BytesIO()
        Image.new("RGB", (message.side, 8)).save(file, "JPEG")
        return file.getvalue()

    def _loadadapter(self, message: m.LoadAdapter) -> m.AdapterInfo:
        if message.name in self.adapters and not message.replace:
            raise ConfigError(f"an adapter '{message.name}' is registered; unload it first")
        if not (Path(message.source) / "adapter_model.safetensors").is_file():
            raise AdapterError(f"{message.source} holds no adapter")
        cg.load_adapter(self.clip, message.source, name=message.name)
        self.adapters[message.name] = Path(message.source)
        return m.AdapterInfo(message.name, message.source, "loaded")

    def _unloadadapter(self, message: m.UnloadAdapter) -> None:
        if self.adapters.pop(message.name, None) is None:
            raise UnknownNameError(f"no adapter '{message.name}'")

    def _describe(self, message: m.Describe) -> m.Description:
        return m.Description(
            base="emoji",
            fingerprint="0" * 16,
            dim=self._features((m.Text("a"),), m.BASE).shape[-1],
            context_length=self.clip.context_length,
            device="cpu",
            dtype="fp32",
            adapters=tuple(m.AdapterInfo(name, str(path)) for name, path in self.adapters.items()),
            folders=(m.FolderInfo("photos", "photos", 6, "image"),),
        )

    def _stats(self, message: m.Stats) -> m.Statistics:
        seconds = {"compute": {"0.1": 1.0, "inf": 0.0, "sum": 0.05}}
        return m.Statistics(
            {"items_text": 1}, {"queue_text": 0.0}, seconds, {"1": 1.0, "inf": 0.0, "sum": 1.0}
        )
