"""A data-driven start of an adapter from the pairs that it will be trained on."""

from __future__ import annotations

import logging
import random

import torch

from clipgraft.data.datasets import Pairs
from clipgraft.lora.initialization import is_new, start_from_data
from clipgraft.lora.state import lora_state
from clipgraft.models.clip import Clip
from clipgraft.pictures import open_image

log = logging.getLogger("clipgraft")
_PAIRS, _BATCH = 256, 32


def start_adapter(clip: Clip, pairs: Pairs, seed: int) -> None:
    """Start an adapter whose `init` is `eva` from a sample of the pairs; any other stays as it is.

    So does one that has been trained before.
    """
    state = lora_state(clip)
    adapter = None if state is None else state.chosen()
    if adapter is None or adapter.settings.init != "eva" or not is_new(adapter):
        return
    rows = pairs.rows()
    sample = random.Random(seed).sample(rows, min(_PAIRS, len(rows)))

    def encode() -> None:
        for start in range(0, len(sample), _BATCH):
            batch = sample[start : start + _BATCH]
            if adapter.touches("text"):
                clip.encode_text([caption for _, caption in batch])
            if adapter.touches("vision"):
                transform = clip.require_preprocess()
                clip.encode_image(torch.stack([transform(open_image(pairs.images[i])) for i, _ in batch]))

    sites = start_from_data(clip, encode)
    log.info("LoRA starts on the principal directions of %d pairs at %d sites", len(sample), sites)
