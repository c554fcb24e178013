"""Build tiny models, and convert one set of weights to every layout that clipgraft takes.

Every bias, norm and embedding is randomised: in fresh models many are zero or one, and a mapping that loses
or swaps one of them would go unnoticed. Projections are (32, 24), so that a forgotten transpose fails.
"""

from __future__ import annotations

import copy
from typing import Any

import torch
from torch import Tensor, nn

TINY_OPENCLIP: dict[str, Any] = {
    "embed_dim": 24,
    "quick_gelu": True,
    "vision_cfg": {"image_size": 32, "patch_size": 8, "width": 32, "head_width": 16, "layers": 2},
    "text_cfg": {"context_length": 77, "vocab_size": 49408, "width": 32, "heads": 2, "layers": 2},
}
TINY_HF_TOWER = {
    "hidden_size": 32,
    "intermediate_size": 128,
    "num_hidden_layers": 2,
    "num_attention_heads": 2,
}
BOS_ID, EOS_ID = 98, 99


def randomise(model: nn.Module, seed: int = 0) -> nn.Module:
    """Add noise to every weight but the scalars, in place."""
    generator = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for parameter in model.parameters():
            if parameter.ndim:
                parameter.add_(torch.randn(parameter.shape, generator=generator), alpha=0.1)
    return model


def build_hf(**text: Any) -> nn.Module:
    """Build a `transformers.CLIPModel` of 2 + 2 layers; keywords change the text configuration."""
    from transformers import CLIPConfig, CLIPModel

    ids = {"vocab_size": 100, "bos_token_id": BOS_ID, "eos_token_id": EOS_ID, "pad_token_id": EOS_ID}
    config = CLIPConfig(
        text_config={**TINY_HF_TOWER, "max_position_embeddings": 16, **ids, **text},
        vision_config={**TINY_HF_TOWER, "image_size": 32, "patch_size": 8},
        projection_dim=24,
    )
    torch.manual_seed(0)
    return randomise(CLIPModel(config)).eval()


def to_transformers(model: nn.Module) -> nn.Module:
    """Convert an open_clip CLIP to a `CLIPModel`, weight by weight."""
    from transformers import CLIPConfig, CLIPModel

    text, vision = TINY_OPENCLIP["text_cfg"], TINY_OPENCLIP["vision_cfg"]
    towers = {"intermediate_size": 128, "num_attention_heads": 2, "hidden_act": "quick_gelu"}
    config = CLIPConfig(
        projection_dim=TINY_OPENCLIP["embed_dim"],
        text_config={
            **towers,
            "hidden_size": text["width"],
            "num_hidden_layers": text["layers"],
            "vocab_size": text["vocab_size"],
            "max_position_embeddings": text["context_length"],
            "eos_token_id": 49407,
        },
        vision_config={
            **towers,
            "hidden_size": vision["width"],
            "num_hidden_layers": vision["layers"],
            "image_size": vision["image_size"],
            "patch_size": vision["patch_size"],
        },
    )
    converted = CLIPModel(config).eval()
    named = dict(converted.named_parameters())

    def put(name: str, value: Tensor) -> None:
        assert named[name].shape == value.shape
        with torch.no_grad():
            named.pop(name).copy_(value)

    def norm(name: str, module: nn.LayerNorm) -> None:
        put(f"{name}.weight", module.weight)
        put(f"{name}.bias", module.bias)

    def linear(name: str, module: nn.Linear) -> None:
        put(f"{name}.weight", module.weight)
        put(f"{name}.bias", module.bias)

    put("logit_scale", model.logit_scale)
    put("text_projection.weight", model.text_projection.T)
    put("visual_projection.weight", model.visual.proj.T)
    put("text_model.embeddings.token_embedding.weight", model.token_embedding.weight)
    put("text_model.embeddings.position_embedding.weight", model.positional_embedding)
    put("vision_model.embeddings.position_embedding.weight", model.visual.positional_embedding)
    put("vision_model.embeddings.class_embedding", model.visual.class_embedding)
    put("vision_model.embeddings.patch_embedding.weight", model.visual.conv1.weight)
    norm("vision_model.pre_layrnorm", model.visual.ln_pre)
    norm("vision_model.post_layernorm", model.visual.ln_post)
    norm("text_model.final_layer_norm", model.ln_final)
    for tower, transformer in (("text", model.transformer), ("vision", model.visual.transformer)):
        for index, block in enumerate(transformer.resblocks):
            stem = f"{tower}_model.encoder.layers.{index}"
            for number, letter in enumerate("qkv"):
                rows = slice(32 * number, 32 * (number + 1))
                put(f"{stem}.self_attn.{letter}_proj.weight", block.attn.in_proj_weight[rows])
                put(f"{stem}.self_attn.{letter}_proj.bias", block.attn.in_proj_bias[rows])
            linear(f"{stem}.self_attn.out_proj", block.attn.out_proj)
            linear(f"{stem}.mlp.fc1", block.mlp.c_fc)
            linear(f"{stem}.mlp.fc2", block.mlp.c_proj)
            norm(f"{stem}.layer_norm1", block.ln_1)
            norm(f"{stem}.layer_norm2", block.ln_2)
    assert not named
    return converted


def to_custom_text(model: nn.Module) -> nn.Module:
    """Convert an open_clip CLIP to a `CustomTextCLIP`."""
    import open_clip

    converted = open_clip.CustomTextCLIP(**copy.deepcopy(TINY_OPENCLIP)).eval()
    text = ("transformer.", "token_embedding.", "positional_embedding", "ln_final.", "text_projection")
    state = {f"text.{n}" if n.startswith(text) else n: t for n, t in model.state_dict().items()}
    converted.load_state_dict(state)
    return converted


def in_every_layout(model: nn.Module, model_4x: nn.Module) -> dict[str, nn.Module]:
    """Convert one set of weights to each kind of model that clipgraft takes."""
    return {
        "CLIP": model,
        "CLIP of open_clip 4": model_4x,
        "CustomTextCLIP": to_custom_text(model),
        "CLIPModel": to_transformers(model),
    }
