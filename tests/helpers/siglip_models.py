"""Build tiny models with a `logit_bias`, as SigLIP has one, that read words and pictures."""

from __future__ import annotations

import copy
from collections.abc import Sequence
from dataclasses import dataclass, replace

import numpy as np
import torch
from PIL.Image import Image
from torch import Tensor, nn

from clipgraft.models.clip import Clip, as_clip
from tiny_models import TINY_HF_TOWER, TINY_OPENCLIP, randomise

BIAS = -4.0
SCALE = 2.5
"""Its log."""


def with_logit_bias(clip: Clip) -> Clip:
    """Return an open_clip CLIP of the tests' shape once more, as open_clip builds it for the sigmoid loss."""
    import open_clip

    config = {**copy.deepcopy(TINY_OPENCLIP), "init_logit_scale": SCALE, "init_logit_bias": BIAS}
    model = open_clip.CLIP(**config).eval()
    weights = {name: weight for name, weight in clip.model.state_dict().items() if name != "logit_scale"}
    left = model.load_state_dict(weights, strict=False)
    assert set(left.missing_keys) == {"logit_scale", "logit_bias"}
    return replace(clip, model=model)


@dataclass(frozen=True)
class Letters:
    """A tokenizer of 16 letters."""

    length: int = 16

    def __call__(self, texts: Sequence[str]) -> Tensor:
        rows = [[1 + ord(letter) % 97 for letter in text[-self.length :]] for text in texts]
        return torch.tensor([row + [0] * (self.length - len(row)) for row in rows])

    def count(self, texts: Sequence[str]) -> list[int]:
        return [len(text) for text in texts]


def pixels(image: Image) -> Tensor:
    """Resize to (3, 32, 32), between -1 and 1."""
    values = np.array(image.resize((32, 32)), dtype=np.float32)
    return torch.from_numpy(values).permute(2, 0, 1) / 127.5 - 1


def build_siglip() -> nn.Module:
    """Build a `transformers.SiglipModel` of 2 + 2 layers."""
    from transformers import SiglipConfig, SiglipModel

    tower = {**TINY_HF_TOWER, "intermediate_size": 64}
    ids = {"vocab_size": 100, "bos_token_id": 98, "eos_token_id": 99, "pad_token_id": 0}
    config = SiglipConfig(
        text_config={**tower, "max_position_embeddings": 16, "projection_size": 32, **ids},
        vision_config={**tower, "image_size": 32, "patch_size": 8},
    )
    torch.manual_seed(0)
    model = randomise(SiglipModel(config)).eval()
    with torch.no_grad():
        model.logit_scale.fill_(SCALE)
        model.logit_bias.fill_(BIAS)
    return model


def siglip_clip() -> Clip:
    """Return `build_siglip` with a tokenizer and a preprocessing."""
    return replace(as_clip(build_siglip()), tokenizer=Letters(), preprocess=pixels)
