"""Build tiny models with a `logit_bias`: SigLIP of transformers and of open_clip, and CLIP with one."""

from __future__ import annotations

import copy
from collections.abc import Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np
import torch
from PIL.Image import Image
from torch import Tensor, nn

from clipgraft.models.clip import Clip, as_clip
from tiny_models import TINY_OPENCLIP, randomise
from tiny_towers import build_tower

BIAS = -4.0
SCALE = 2.5
"""Its log."""
_TOWER = {"hidden_size": 32, "intermediate_size": 128, "num_hidden_layers": 2, "num_attention_heads": 2}
_EXACT = {"hidden_act": "gelu", "layer_norm_eps": 1e-6}
_TEXT = {**_TOWER, **_EXACT, "vocab_size": 100, "max_position_embeddings": 16, "projection_size": 32}
_IDS = {"bos_token_id": 1, "eos_token_id": 1, "pad_token_id": 1}


def build_siglip() -> nn.Module:
    """A `SiglipModel` of 2 + 2 layers."""
    from transformers import SiglipConfig, SiglipModel

    vision = {**_TOWER, **_EXACT, "image_size": 32, "patch_size": 8}
    torch.manual_seed(0)
    model = randomise(SiglipModel(SiglipConfig(text_config={**_TEXT, **_IDS}, vision_config=vision))).eval()
    with torch.no_grad():
        model.logit_scale.fill_(SCALE)
        model.logit_bias.fill_(BIAS)
    return model


def build_siglip2() -> nn.Module:
    """A `Siglip2Model` of 2 + 2 layers, of at most 16 patches of 8 pixels."""
    from transformers import Siglip2Config, Siglip2Model

    vision = {**_TOWER, **_EXACT, "num_patches": 16, "patch_size": 8}
    torch.manual_seed(0)
    return randomise(Siglip2Model(Siglip2Config(text_config={**_TEXT, **_IDS}, vision_config=vision))).eval()


def to_openclip(siglip: nn.Module) -> nn.Module:
    """An open_clip model with the weights of a tiny `SiglipModel`, copied name by name."""
    source, target = siglip.state_dict(), build_tower("SigLIP")
    state: dict[str, Tensor] = {}
    vision, trunk, head = "vision_model.", "visual.trunk.", "vision_model.head."
    for kind in ("weight", "bias"):
        state[f"{trunk}patch_embed.proj.{kind}"] = source[f"{vision}embeddings.patch_embedding.{kind}"]
        state[f"{trunk}norm.{kind}"] = source[f"{vision}post_layernorm.{kind}"]
        in_proj = source[f"{head}attention.in_proj_{kind}"]
        state[f"{trunk}attn_pool.q.{kind}"], state[f"{trunk}attn_pool.kv.{kind}"] = in_proj[:32], in_proj[32:]
        state[f"{trunk}attn_pool.proj.{kind}"] = source[f"{head}attention.out_proj.{kind}"]
        state[f"{trunk}attn_pool.norm.{kind}"] = source[f"{head}layernorm.{kind}"]
        state[f"text.ln_final.{kind}"] = source[f"text_model.final_layer_norm.{kind}"]
        state[f"text.text_projection.{kind}"] = source[f"text_model.head.{kind}"]
        for layer in ("fc1", "fc2"):
            state[f"{trunk}attn_pool.mlp.{layer}.{kind}"] = source[f"{head}mlp.{layer}.{kind}"]
        for block in range(2):
            theirs, ours = f"{vision}encoder.layers.{block}.", f"{trunk}blocks.{block}."
            texts, own = f"text_model.encoder.layers.{block}.", f"text.transformer.resblocks.{block}."
            for stem, place in ((theirs, f"{ours}attn.qkv."), (texts, f"{own}attn.in_proj_")):
                parts = [source[f"{stem}self_attn.{role}_proj.{kind}"] for role in "qkv"]
                state[f"{place}{kind}"] = torch.cat(parts)
            state[f"{ours}attn.proj.{kind}"] = source[f"{theirs}self_attn.out_proj.{kind}"]
            state[f"{own}attn.out_proj.{kind}"] = source[f"{texts}self_attn.out_proj.{kind}"]
            names = (("layer_norm1", "norm1", "ln_1"), ("layer_norm2", "norm2", "ln_2"))
            names += (("mlp.fc1", "mlp.fc1", "mlp.c_fc"), ("mlp.fc2", "mlp.fc2", "mlp.c_proj"))
            for hf, timm, openclip in names:
                state[f"{ours}{timm}.{kind}"] = source[f"{theirs}{hf}.{kind}"]
                state[f"{own}{openclip}.{kind}"] = source[f"{texts}{hf}.{kind}"]
    state[f"{trunk}pos_embed"] = source[f"{vision}embeddings.position_embedding.weight"][None]
    state[f"{trunk}attn_pool.latent"] = source[f"{head}probe"]
    state["text.token_embedding.weight"] = source["text_model.embeddings.token_embedding.weight"]
    state["text.positional_embedding"] = source["text_model.embeddings.position_embedding.weight"]
    state["logit_scale"], state["logit_bias"] = source["logit_scale"][0], source["logit_bias"][0]
    target.load_state_dict(state)
    return target.eval()


def hf_features(model: nn.Module, pixels: Tensor, ids: Tensor) -> tuple[Tensor, Tensor]:
    """Image and text features by transformers' own functions."""
    image = model.get_image_features(pixel_values=pixels).pooler_output
    return image, model.get_text_features(input_ids=ids).pooler_output


def save_siglip(model: nn.Module, folder: Path, processor: Any) -> Path:
    """A folder as the hub has it: the model, a word-level tokenizer and the image processor."""
    from tokenizers import Tokenizer, models, pre_tokenizers, processors
    from transformers import PreTrainedTokenizerFast

    words = ["<unk>", "</s>", *(f"w{number}" for number in range(90))]
    inner = Tokenizer(models.WordLevel({word: number for number, word in enumerate(words)}, "<unk>"))
    inner.pre_tokenizer = pre_tokenizers.Whitespace()
    inner.post_processor = processors.TemplateProcessing("$A </s>", special_tokens=[("</s>", 1)])
    tokenizer = PreTrainedTokenizerFast(
        tokenizer_object=inner, unk_token="<unk>", eos_token="</s>", pad_token="</s>", model_max_length=16
    )
    copy.deepcopy(model).save_pretrained(folder)
    tokenizer.save_pretrained(folder)
    processor.save_pretrained(folder)
    return folder


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


def _preprocess(image: Image) -> Tensor:
    """Resize to (3, 32, 32), between -1 and 1."""
    values = np.array(image.resize((32, 32)), dtype=np.float32)
    return torch.from_numpy(values).permute(2, 0, 1) / 127.5 - 1


def siglip_clip() -> Clip:
    """Return `build_siglip` with a tokenizer and a preprocessing."""
    return replace(as_clip(build_siglip()), tokenizer=Letters(), preprocess=_preprocess)
