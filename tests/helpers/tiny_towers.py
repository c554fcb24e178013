"""Build tiny open_clip models with vision towers of timm and of open_clip's own, and name their weights.

The towers are timm's own functions with smaller numbers. `WEIGHTS` says for each site where its weight is,
written by hand (`weight_places`).
"""

from __future__ import annotations

from collections import OrderedDict
from collections.abc import Callable, Mapping

import open_clip
import timm
import torch
from open_clip.timm_model import TimmModel
from timm.models.vitamin import VitCfg, VitConvCfg
from torch import nn

from tiny_models import TINY_OPENCLIP, randomise
from weight_places import CONTEXT, DIM, SIZE, Place, blocks, named

_VIT = {"img_size": SIZE, "patch_size": 8, "embed_dim": 32, "depth": 2, "num_heads": 2}
_TEXT = {"context_length": CONTEXT, "vocab_size": 100, "width": 32, "heads": 2, "layers": 2}
_SIGLIP_TEXT = {
    **_TEXT,
    "no_causal_mask": True,
    "proj_bias": True,
    "pool_type": "last",
    "norm_kwargs": {"eps": 1e-6},
}


def _with_head(trunk: nn.Module, head: Mapping[str, nn.Module] | None = None) -> nn.Module:
    """An open_clip `TimmModel` around a trunk that was built already."""
    visual = TimmModel.__new__(TimmModel)
    nn.Module.__init__(visual)
    visual.image_size = (SIZE, SIZE)
    visual.trunk = trunk
    visual.head = nn.Sequential(OrderedDict(head or {}))
    return visual


def _siglip() -> nn.Module:
    name = "vit_base_patch16_siglip_224"
    return _with_head(timm.create_model(name, num_classes=0, **_VIT))


def _eva01() -> nn.Module:
    # timm makes the fused q/k/v weights with biases of q and v apart.
    return _with_head(timm.create_model("eva_giant_patch14_clip_224", num_classes=DIM, **_VIT))


def _eva02() -> nn.Module:
    options = {**_VIT, "ref_feat_shape": (4, 4)}
    return _with_head(timm.create_model("eva02_base_patch16_clip_224", num_classes=DIM, **options))


def _pe() -> nn.Module:
    options = {**_VIT, "ref_feat_shape": (4, 4), "attn_pool_num_heads": 2}
    return _with_head(timm.create_model("vit_pe_core_tiny_patch16_384", num_classes=DIM, **options))


def _hybrid() -> nn.Module:
    # timm fixes the stem's channels to those of the width of MobileCLIP-B: 768.
    options = {"img_size": SIZE, "embed_dim": 768, "depth": 2, "num_heads": 2, "mlp_ratio": 0.125}
    return _with_head(timm.create_model("vit_base_mci_224", num_classes=DIM, **options))


def _timm_vit() -> nn.Module:
    return _with_head(timm.create_model("vit_large_patch14_clip_224", num_classes=DIM, **_VIT))


def _projected(name: str) -> nn.Module:
    """A vision transformer of timm below a Linear of open_clip's."""
    trunk = timm.create_model(name, num_classes=0, **_VIT)
    return _with_head(trunk, {"proj": nn.Linear(32, DIM, bias=False)})


def _convnext(head: Mapping[str, nn.Module]) -> nn.Module:
    trunk = timm.create_model("convnext_tiny", num_classes=0, depths=(1, 1, 2, 1), dims=(8, 16, 16, 32))
    return _with_head(trunk, head)


def _convnext_mlp() -> nn.Module:
    mlp = nn.Sequential(OrderedDict(fc1=nn.Linear(32, 48), act=nn.GELU(), fc2=nn.Linear(48, DIM, bias=False)))
    return _convnext({"mlp": mlp})


def _fastvit() -> nn.Module:
    options = {"layers": (1, 1, 1, 1), "embed_dims": (32, 32, 32, 64)}
    visual = _with_head(timm.create_model("fastvit_mci0", num_classes=DIM, **options))
    visual.image_size = (2 * SIZE, 2 * SIZE)  # whose last map has more than one place to attend to
    return visual


def _vitamin(name: str) -> nn.Module:
    convolutions = VitConvCfg(norm_layer="layernorm2d", norm_eps=1e-6)
    config = VitCfg((16, 24, 32), (1, 1, 1), 16, convolutions, "1d")
    options = {"embed_dim": 32, "depth": 2, "num_heads": 2, "img_size": SIZE, "embed_cfg": config}
    trunk = timm.create_model(name, num_classes=0, **options)
    return _with_head(trunk, {"proj": nn.Linear(32, DIM, bias=False)})


def _swin() -> nn.Module:
    options = {
        "img_size": SIZE,
        "window_size": 4,
        "embed_dim": 16,
        "depths": (2, 1),
        "num_heads": (2, 2),
        "drop_path_rate": 0.0,
    }
    trunk = timm.create_model("swin_base_patch4_window7_224", num_classes=0, **options)
    return _with_head(trunk, {"proj": nn.Linear(32, DIM, bias=False)})


_TWO = ["trunk.blocks.0", "trunk.blocks.1"]
_QKV: dict[str, Place | str] = {role: ("attn.qkv.weight", index, 3) for index, role in enumerate("qkv")}
_PLAIN: dict[str, Place | str] = {**_QKV, "out": "attn.proj", "fc1": "mlp.fc1", "fc2": "mlp.fc2"}
_PATCHES = named(
    vision__patch_embedding="trunk.patch_embed.proj.weight", vision__position_embedding="trunk.pos_embed"
)
_PROJ = named(vision__proj="head.proj.weight")
_HEAD = named(vision__proj="trunk.head.weight")
_LATENT_POOL = {
    **named(
        vision__pool_q="trunk.attn_pool.q.weight",
        vision__pool_out="trunk.attn_pool.proj.weight",
        vision__pool_fc1="trunk.attn_pool.mlp.fc1.weight",
        vision__pool_fc2="trunk.attn_pool.mlp.fc2.weight",
    ),
    "vision.pool_k": ("trunk.attn_pool.kv.weight", 0, 2),
    "vision.pool_v": ("trunk.attn_pool.kv.weight", 1, 2),
}
_EVA02 = {
    "q": "attn.q_proj",
    "k": "attn.k_proj",
    "v": "attn.v_proj",
    "out": "attn.proj",
    "gate": "mlp.fc1_g",
    "fc1": "mlp.fc1_x",
    "fc2": "mlp.fc2",
}
_GEGLU = {**_QKV, "out": "attn.proj", "gate": "mlp.w0", "fc1": "mlp.w1", "fc2": "mlp.w2"}
_CONVNEXT = [
    f"trunk.stages.{stage}.blocks.{block}" for stage, block in ((0, 0), (1, 0), (2, 0), (2, 1), (3, 0))
]
_FASTVIT = [f"trunk.stages.{stage}.blocks.0" for stage in range(4)]
_MIXER = {
    "mixer": "token_mixer.mixer.conv_kxk.0.conv",
    "mixer_scale": "token_mixer.mixer.conv_scale.conv",
    "conv_dw": "mlp.conv.conv",
    "fc1": "mlp.fc1",
    "fc2": "mlp.fc2",
}
_MBCONV = {"conv1": "conv1_1x1", "conv_dw": "conv2_kxk", "conv3": "conv3_1x1"}
_VITAMIN = [f"trunk.patch_embed.backbone.stages.{stage}.0" for stage in range(2)]
_SWIN = ["trunk.layers.0.blocks.0", "trunk.layers.0.blocks.1", "trunk.layers.1.blocks.0"]
_RESNET = [f"layer{stage}.0" for stage in range(1, 5)]


def _later(sites: Mapping[str, Place], by: int) -> dict[str, Place]:
    """The same sites with other block numbers."""
    return {f"vision.{int(s.split('.')[1]) + by}.{s.split('.')[2]}": place for s, place in sites.items()}


_BELOW_VISUAL: dict[str, dict[str, Place]] = {
    "SigLIP": {**blocks("vision", _TWO, _PLAIN), **_PATCHES, **_LATENT_POOL},
    "EVA01": {**blocks("vision", _TWO, _PLAIN), **_PATCHES, **_HEAD},
    "EVA02": {**blocks("vision", _TWO, _EVA02), **_PATCHES, **_HEAD},
    "PE": {**blocks("vision", _TWO, _PLAIN), **_PATCHES, **_LATENT_POOL, **_HEAD},
    "MobileCLIP-B": {
        **blocks("vision", _TWO, _PLAIN),
        **named(vision__position_embedding="trunk.pos_embed"),
        **_HEAD,
    },
    "timm ViT": {**blocks("vision", _TWO, _PLAIN), **_PATCHES, **_HEAD},
    "timm ViT without class token": {**blocks("vision", _TWO, _PLAIN), **_PATCHES, **_PROJ},
    "timm ViT of relative positions": {
        **blocks("vision", _TWO, _PLAIN),
        **named(vision__patch_embedding="trunk.patch_embed.proj.weight"),
        **_PROJ,
    },
    "ConvNeXt below an MLP": {
        **blocks("vision", _CONVNEXT, {"conv_dw": "conv_dw", "fc1": "mlp.fc1", "fc2": "mlp.fc2"}),
        **{
            f"vision.{block}.downsample": (f"trunk.stages.{stage}.downsample.1.weight", 0, 1)
            for stage, block in ((1, 1), (2, 2), (3, 4))
        },
        **named(
            vision__patch_embedding="trunk.stem.0.weight",
            vision__proj_fc1="head.mlp.fc1.weight",
            vision__proj_fc2="head.mlp.fc2.weight",
        ),
    },
    "FastViT": {
        **blocks("vision", _FASTVIT[:3], _MIXER),
        **_later(
            blocks(
                "vision",
                _FASTVIT[3:],
                {
                    **{role: ("token_mixer.qkv.weight", index, 3) for index, role in enumerate("qkv")},
                    "out": "token_mixer.proj",
                    "conv_dw": "mlp.conv.conv",
                    "fc1": "mlp.fc1",
                    "fc2": "mlp.fc2",
                },
            ),
            3,
        ),
        **named(vision__proj="trunk.head.fc.weight"),
    },
    "ViTamin": {
        **blocks("vision", _VITAMIN, _MBCONV),
        "vision.1.shortcut": (f"{_VITAMIN[1]}.shortcut.expand.weight", 0, 1),
        **_later(blocks("vision", _TWO, _GEGLU), 2),
        **named(vision__position_embedding="trunk.pos_embed", vision__proj="head.proj.weight"),
    },
    "Swin": {
        **blocks("vision", _SWIN, _PLAIN),
        **named(vision__patch_embedding="trunk.patch_embed.proj.weight", vision__proj="head.proj.weight"),
        "vision.2.downsample": ("trunk.layers.1.downsample.reduction.weight", 0, 1),
    },
    "ResNet": {
        **blocks("vision", _RESNET, {role: role for role in ("conv1", "conv2", "conv3")}),
        **blocks("vision", _RESNET, {"shortcut": "downsample.0"}),
        **named(
            vision__position_embedding="attnpool.positional_embedding",
            vision__pool_q="attnpool.q_proj.weight",
            vision__pool_k="attnpool.k_proj.weight",
            vision__pool_v="attnpool.v_proj.weight",
            vision__pool_out="attnpool.c_proj.weight",
        ),
    },
    "CoCa": {
        **blocks(
            "vision",
            [f"transformer.resblocks.{block}" for block in range(2)],
            {"out": "attn.out_proj", "fc1": "mlp.c_fc", "fc2": "mlp.c_proj"},
        ),
        **{
            f"vision.{block}.{role}": (f"transformer.resblocks.{block}.attn.in_proj_weight", index, 3)
            for block in range(2)
            for index, role in enumerate("qkv")
        },
        **named(
            vision__patch_embedding="conv1.weight",
            vision__position_embedding="positional_embedding",
            vision__pool_q="attn_pool.attn.q_proj_weight",
            vision__pool_k="attn_pool.attn.k_proj_weight",
            vision__pool_v="attn_pool.attn.v_proj_weight",
            vision__pool_out="attn_pool.attn.out_proj.weight",
            vision__proj="proj",
        ),
    },
}
_BELOW_VISUAL["ConvNeXt"] = {
    **{s: place for s, place in _BELOW_VISUAL["ConvNeXt below an MLP"].items() if "proj" not in s},
    **_PROJ,
}
_BELOW_VISUAL["ViTamin without positions"] = {
    s: place for s, place in _BELOW_VISUAL["ViTamin"].items() if "position" not in s
}
_BELOW_VISUAL["CLIPA"] = {s: place for s, place in _BELOW_VISUAL["CoCa"].items() if "pool" not in s}
WEIGHTS: dict[str, dict[str, Place]] = {
    family: {site: (f"visual.{name}", index, count) for site, (name, index, count) in places.items()}
    for family, places in _BELOW_VISUAL.items()
}
_TRUNKS: dict[str, Callable[[], nn.Module]] = {
    "SigLIP": _siglip,
    "EVA01": _eva01,
    "EVA02": _eva02,
    "PE": _pe,
    "MobileCLIP-B": _hybrid,
    "timm ViT": _timm_vit,
    "timm ViT without class token": lambda: _projected("vit_medium_patch16_gap_256"),
    "timm ViT of relative positions": lambda: _projected("vit_relpos_medium_patch16_cls_224"),
    "ConvNeXt": lambda: _convnext({"proj": nn.Linear(32, DIM, bias=False)}),
    "ConvNeXt below an MLP": _convnext_mlp,
    "FastViT": _fastvit,
    "ViTamin": lambda: _vitamin("vitamin_small_224"),
    "ViTamin without positions": lambda: _vitamin("vitamin_xlarge_256"),
    "Swin": _swin,
}


def build_tower(family: str) -> nn.Module:
    """An open_clip model with the vision tower of a family and the text tower that goes with it."""
    torch.manual_seed(0)
    if family == "CoCa":
        model: nn.Module = _coca()
    elif family == "CLIPA":
        options = {"no_ln_pre": True, "pool_type": "avg", "final_ln_after_pool": True}
        vision = {**TINY_OPENCLIP["vision_cfg"], **options}
        model = open_clip.CLIP(embed_dim=DIM, vision_cfg=vision, text_cfg={**_TEXT, "pool_type": "last"})
    elif family == "ResNet":
        vision = {"image_size": SIZE, "layers": [1, 1, 1, 1], "width": 8}
        model = open_clip.CLIP(embed_dim=DIM, vision_cfg=vision, text_cfg=dict(_TEXT))
    else:
        text = _SIGLIP_TEXT if family == "SigLIP" else _TEXT
        dim = 32 if family == "SigLIP" else DIM
        bias = -10.0 if family == "SigLIP" else None
        vision = dict(TINY_OPENCLIP["vision_cfg"])
        model = open_clip.CustomTextCLIP(dim, vision_cfg=vision, text_cfg=dict(text), init_logit_bias=bias)
        model.visual = _TRUNKS[family]()
    randomise(model)
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if name.endswith("gamma"):
                parameter.add_(1)  # new branches are scaled by 1e-5, which would hide what is in them
    return model.eval()


def _coca() -> nn.Module:
    vision = {**TINY_OPENCLIP["vision_cfg"], "attentional_pool": True, "attn_pooler_heads": 2}
    text = {**_TEXT, "embed_cls": True, "output_tokens": True}
    multimodal = {**_TEXT, "width": DIM, "layers": 1, "heads": 2, "attn_pooler_heads": 2}
    model = open_clip.CoCa(
        DIM, multimodal_cfg=multimodal, text_cfg=text, vision_cfg={**vision, "output_tokens": True}
    )
    nn.init.zeros_(model.text_decoder.text_projection)  # open_clip leaves it as the memory was
    return model
