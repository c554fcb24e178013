"""Models and outputs for tests against PEFT: one set of weights in open_clip and in transformers."""

from __future__ import annotations

import open_clip
import torch
from peft import PeftModel
from torch import Tensor, nn

from explicit_lora import ROLES, features, weight_name

ALL_MODULES = [
    "token_embedding",
    "position_embedding",
    "patch_embedding",
    "q_proj",
    "k_proj",
    "v_proj",
    "out_proj",
    "fc1",
    "fc2",
    "visual_projection",
    "text_projection",
]
_TOWERS = {"text_model": "", "vision_model": "visual."}
_BLOCK_PARTS = {"layer_norm1": "ln_1", "layer_norm2": "ln_2", "mlp.fc1": "mlp.c_fc", "mlp.fc2": "mlp.c_proj"}


def to_openclip(tiny_hf: nn.Module) -> nn.Module:
    """Build an open_clip model with the weights of `tiny_hf`, copied name by name."""
    converted = open_clip.CLIP(
        embed_dim=24,
        quick_gelu=True,
        vision_cfg={"image_size": 32, "patch_size": 8, "width": 32, "head_width": 16, "layers": 2},
        text_cfg={"context_length": 16, "vocab_size": 100, "width": 32, "heads": 2, "layers": 2},
    )
    source, state = tiny_hf.state_dict(), {}
    for tower, prefix in _TOWERS.items():
        for block in range(2):
            theirs, ours = f"{tower}.encoder.layers.{block}.", f"{prefix}transformer.resblocks.{block}."
            for kind in ("weight", "bias"):
                parts = [source[f"{theirs}self_attn.{role}_proj.{kind}"] for role in "qkv"]
                state[f"{ours}attn.in_proj_{kind}"] = torch.cat(parts)
                state[f"{ours}attn.out_proj.{kind}"] = source[f"{theirs}self_attn.out_proj.{kind}"]
                for old, new in _BLOCK_PARTS.items():
                    state[f"{ours}{new}.{kind}"] = source[f"{theirs}{old}.{kind}"]
    for kind in ("weight", "bias"):
        state[f"visual.ln_pre.{kind}"] = source[f"vision_model.pre_layrnorm.{kind}"]
        state[f"visual.ln_post.{kind}"] = source[f"vision_model.post_layernorm.{kind}"]
        state[f"ln_final.{kind}"] = source[f"text_model.final_layer_norm.{kind}"]
    state["visual.class_embedding"] = source["vision_model.embeddings.class_embedding"]
    state["logit_scale"] = source["logit_scale"]
    for site in (role for role in ROLES if role.endswith(("embedding", "proj"))):
        weight = source[weight_name(tiny_hf, site)]
        state[weight_name(converted, site)] = weight.T if site.endswith("proj") else weight
    converted.load_state_dict(state)
    return converted.eval()


def outputs(model: nn.Module) -> tuple[Tensor, Tensor]:
    """Compute features of a model of either family on fixed pixels and ids."""
    generator = torch.Generator().manual_seed(0)
    pixels = torch.randn(3, 3, 32, 32, generator=generator)
    ids = torch.randint(1, 98, (3, 16), generator=generator)
    ids[:, 9:] = 99
    hf = model.get_base_model() if isinstance(model, PeftModel) else model
    with torch.no_grad():
        return features(hf, pixels, ids)
