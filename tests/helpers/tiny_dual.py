"""Build tiny models with towers of transformers and of the user's own, and name their weights.

`WEIGHTS` says for each site where its weight is, written by hand (`weight_places`). Models are built from
configurations with random weights.
"""

from __future__ import annotations

import copy
import tempfile
from collections.abc import Callable
from typing import Any

import torch
from tokenizers import Tokenizer, models, pre_tokenizers, processors
from torch import Tensor, nn
from transformers import (
    AltCLIPConfig,
    AltCLIPModel,
    BertConfig,
    ChineseCLIPConfig,
    ChineseCLIPModel,
    CLIPTextConfig,
    CLIPTextModel,
    CLIPTextModelWithProjection,
    CLIPVisionConfig,
    CLIPVisionModel,
    CLIPVisionModelWithProjection,
    Dinov2Config,
    Dinov2Model,
    M2M100Config,
    MT5Config,
    MT5EncoderModel,
    PreTrainedConfig,
    PreTrainedTokenizerFast,
    VisionTextDualEncoderConfig,
    VisionTextDualEncoderModel,
    ViTConfig,
    XLMRobertaConfig,
    XLMRobertaModel,
)

from clipgraft.models import DualEncoder
from tiny_models import TINY_OPENCLIP, randomise
from weight_places import CONTEXT, DIM, SIZE, Place, blocks, ids, named, pixels

TEXTS = ["con mèo ngủ", "con chó", "con mèo ngủ trên ghế"]
_VIETNAMESE = ["con", "mèo", "chó", "ngủ", "trên", "ghế"]
WORDS = 100
PAD = {"BERT": 0, "XLM-R": 1, "NLLB": 1, "mT5": 0, "AltCLIP": 1, "ChineseCLIP": 0, "own": 0, "CLIP": 1}

_TOWER = {
    "hidden_size": 32,
    "intermediate_size": 48,
    "num_hidden_layers": 2,
    "num_attention_heads": 2,
}
_QUIET = {"hidden_dropout_prob": 0.0, "attention_probs_dropout_prob": 0.0}
_WORDS = {"vocab_size": WORDS, "max_position_embeddings": 40}
_IMAGE = {"image_size": SIZE, "patch_size": 8}
_M2M = {"layers": 2, "attention_heads": 2, "ffn_dim": 48}


def _bert() -> BertConfig:
    return BertConfig(**_TOWER, **_QUIET, **_WORDS, pad_token_id=0)


def _xlmr() -> XLMRobertaConfig:
    return XLMRobertaConfig(**_TOWER, **_QUIET, **_WORDS, pad_token_id=1)


def _nllb() -> M2M100Config:
    sizes = {f"{part}_{name}": size for part in ("encoder", "decoder") for name, size in _M2M.items()}
    return M2M100Config(
        **sizes,
        **_WORDS,
        d_model=32,
        dropout=0.0,
        attention_dropout=0.0,
        encoder_layerdrop=0.0,
        pad_token_id=1,
    )


def _mt5() -> MT5Config:
    return MT5Config(
        vocab_size=WORDS, d_model=32, d_kv=12, d_ff=48, num_layers=2, num_heads=2, dropout_rate=0.0
    )


def _clip_text() -> CLIPTextConfig:
    ids = {"bos_token_id": 98, "eos_token_id": 99, "pad_token_id": 1}
    return CLIPTextConfig(
        **_TOWER, vocab_size=WORDS, max_position_embeddings=CONTEXT, projection_dim=DIM, **ids
    )


def _clip_vision() -> CLIPVisionConfig:
    return CLIPVisionConfig(**_TOWER, **_IMAGE, projection_dim=DIM)


def _open_clip(config: PreTrainedConfig, **text: Any) -> nn.Module:
    """A `CustomTextCLIP` whose text tower is made of a configuration in a local folder."""
    import open_clip
    from open_clip.hf_model import HFTextEncoder

    model = open_clip.CustomTextCLIP(**copy.deepcopy(TINY_OPENCLIP))
    with tempfile.TemporaryDirectory() as folder:
        config.save_pretrained(folder)
        model.text = HFTextEncoder(folder, DIM, pretrained=False, **text)
    return model


def _altclip() -> nn.Module:
    text = {**_TOWER, **_QUIET, **_WORDS, "pad_token_id": 1, "project_dim": 20}
    return AltCLIPModel(
        AltCLIPConfig(text_config=text, vision_config={**_TOWER, **_IMAGE}, projection_dim=DIM)
    )


def _chinese() -> nn.Module:
    text = {**_TOWER, **_QUIET, **_WORDS, "pad_token_id": 0}
    return ChineseCLIPModel(
        ChineseCLIPConfig(text_config=text, vision_config={**_TOWER, **_IMAGE}, projection_dim=DIM)
    )


def _pair(vision: PreTrainedConfig, text: PreTrainedConfig) -> nn.Module:
    config = VisionTextDualEncoderConfig.from_vision_text_configs(vision, text, projection_dim=DIM)
    return VisionTextDualEncoderModel(config)


class _Pixels(nn.Module):
    """An image tower of torch's own blocks: patches, two blocks, the mean."""

    def __init__(self) -> None:
        super().__init__()
        self.embeddings = nn.Module()
        self.embeddings.patch_embedding = nn.Conv2d(3, 32, 8, 8)
        layer = nn.TransformerEncoderLayer(32, 2, 48, 0.0, batch_first=True)
        self.blocks = nn.TransformerEncoder(layer, 2, enable_nested_tensor=False)

    def forward(self, pixels: Tensor) -> Tensor:
        patches = self.embeddings.patch_embedding(pixels).flatten(2).transpose(1, 2)
        found: Tensor = self.blocks(patches).mean(1)
        return found


def _own() -> nn.Module:
    return DualEncoder(_Pixels(), MT5EncoderModel(_mt5()), nn.Linear(32, DIM), nn.Linear(32, DIM, bias=False))


def _own_hf() -> nn.Module:
    towers = Dinov2Model(Dinov2Config(**_TOWER, **_IMAGE, mlp_ratio=2)), XLMRobertaModel(_xlmr())
    return DualEncoder(*towers)


BUILDERS: dict[str, Callable[[], nn.Module]] = {
    "open_clip XLM-R": lambda: _open_clip(_xlmr(), pooler_type="mean_pooler", proj_type="mlp"),
    "open_clip XLM-R below a Linear": lambda: _open_clip(
        _xlmr(), pooler_type="mean_pooler", proj_type="linear"
    ),
    "open_clip NLLB": lambda: _open_clip(_nllb(), pooler_type="cls_pooler", proj_type="linear"),
    "open_clip mT5": lambda: _open_clip(_mt5(), pooler_type="mean_pooler", proj_type="mlp"),
    "open_clip BERT": lambda: _open_clip(_bert(), pooler_type="cls_pooler", proj_type="linear"),
    "AltCLIP": _altclip,
    "ChineseCLIP": _chinese,
    "ViT and BERT": lambda: _pair(ViTConfig(**_TOWER, **_IMAGE), _bert()),
    "CLIP vision and XLM-R": lambda: _pair(_clip_vision(), _xlmr()),
    "CLIP and CLIP": lambda: _pair(_clip_vision(), _clip_text()),
    "CLIPTextModel": lambda: CLIPTextModel(_clip_text()),
    "CLIPTextModelWithProjection": lambda: CLIPTextModelWithProjection(_clip_text()),
    "CLIPVisionModel": lambda: CLIPVisionModel(_clip_vision()),
    "CLIPVisionModelWithProjection": lambda: CLIPVisionModelWithProjection(_clip_vision()),
    "own towers": _own,
    "own DINOv2 and XLM-R": _own_hf,
}
LONE = [name for name in BUILDERS if name.startswith("CLIP") and name.count(" ") == 0]
PAIRS = [name for name in BUILDERS if name not in LONE]
# What stock PEFT has no modules for, or not all.
WITHOUT_PEFT = [name for name in BUILDERS if name.startswith("open_clip")] + ["own towers"]


def _two(path: str) -> list[str]:
    return [f"{path}.{block}" for block in range(2)]


_BERT_PLACES: dict[str, str | Place] = {
    "q": "attention.self.query",
    "k": "attention.self.key",
    "v": "attention.self.value",
    "out": "attention.output.dense",
    "fc1": "intermediate.dense",
    "fc2": "output.dense",
}
_CLIP_ATTENTION: dict[str, str | Place] = {
    "q": "self_attn.q_proj",
    "k": "self_attn.k_proj",
    "v": "self_attn.v_proj",
    "out": "self_attn.out_proj",
}
_CLIP_PLACES: dict[str, str | Place] = {**_CLIP_ATTENTION, "fc1": "mlp.fc1", "fc2": "mlp.fc2"}
_VIT_PLACES: dict[str, str | Place] = {
    **{role: f"attention.{role}_proj" for role in "qkv"},
    "out": "attention.o_proj",
    "fc1": "mlp.fc1",
    "fc2": "mlp.fc2",
}
_T5_PLACES: dict[str, str | Place] = {
    **{role: f"layer.0.SelfAttention.{role}" for role in "qkv"},
    "out": "layer.0.SelfAttention.o",
    "gate": "layer.1.DenseReluDense.wi_0",
    "fc1": "layer.1.DenseReluDense.wi_1",
    "fc2": "layer.1.DenseReluDense.wo",
}
_TORCH_PLACES: dict[str, str | Place] = {
    **{role: ("self_attn.in_proj_weight", index, 3) for index, role in enumerate("qkv")},
    "out": "self_attn.out_proj",
    "fc1": "linear1",
    "fc2": "linear2",
}
_OPEN_CLIP_PLACES: dict[str, str | Place] = {
    **{role: ("attn.in_proj_weight", index, 3) for index, role in enumerate("qkv")},
    "out": "attn.out_proj",
    "fc1": "mlp.c_fc",
    "fc2": "mlp.c_proj",
}
_OPEN_CLIP_VISION = {
    **blocks("vision", _two("visual.transformer.resblocks"), _OPEN_CLIP_PLACES),
    **named(
        vision__patch_embedding="visual.conv1.weight",
        vision__position_embedding="visual.positional_embedding",
        vision__proj="visual.proj",
    ),
}
_PROJ = named(text__proj="text_projection.weight", vision__proj="visual_projection.weight")
_MLP_PROJ = named(text__proj_fc1="text.proj.0.weight", text__proj_fc2="text.proj.2.weight")


def _bert_tower(path: str, layers: str = "layer") -> dict[str, Place]:
    return {
        **blocks("text", _two(f"{path}.encoder.{layers}"), _BERT_PLACES),
        **named(
            text__token_embedding=f"{path}.embeddings.word_embeddings.weight",
            text__position_embedding=f"{path}.embeddings.position_embeddings.weight",
        ),
    }


def _clip_tower(tower: str, path: str) -> dict[str, Place]:
    dot = f"{path}." if path else ""
    first = "token" if tower == "text" else "patch"
    return {
        **blocks(tower, _two(f"{dot}encoder.layers"), _CLIP_PLACES),
        f"{tower}.{first}_embedding": (f"{dot}embeddings.{first}_embedding.weight", 0, 1),
        f"{tower}.position_embedding": (f"{dot}embeddings.position_embedding.weight", 0, 1),
    }


WEIGHTS: dict[str, dict[str, Place]] = {
    "open_clip XLM-R": {**_OPEN_CLIP_VISION, **_bert_tower("text.transformer"), **_MLP_PROJ},
    "open_clip XLM-R below a Linear": {
        **_OPEN_CLIP_VISION,
        **_bert_tower("text.transformer"),
        **named(text__proj="text.proj.weight"),
    },
    "open_clip NLLB": {
        **_OPEN_CLIP_VISION,
        **blocks("text", _two("text.transformer.layers"), {**_CLIP_ATTENTION, "fc1": "fc1", "fc2": "fc2"}),
        **named(text__token_embedding="text.transformer.embed_tokens.weight", text__proj="text.proj.weight"),
    },
    "open_clip mT5": {
        **_OPEN_CLIP_VISION,
        **blocks("text", _two("text.transformer.block"), _T5_PLACES),
        **named(text__token_embedding="text.transformer.embed_tokens.weight"),
        **_MLP_PROJ,
    },
    "open_clip BERT": {
        **_OPEN_CLIP_VISION,
        **_bert_tower("text.transformer"),
        **named(text__pool_fc1="text.transformer.pooler.dense.weight", text__proj="text.proj.weight"),
    },
    "AltCLIP": {
        **_bert_tower("text_model.roberta", "layers"),
        **_clip_tower("vision", "vision_model"),
        **named(text__proj_fc1="text_model.transformation.weight"),
        **_PROJ,
    },
    "ChineseCLIP": {**_bert_tower("text_model"), **_clip_tower("vision", "vision_model"), **_PROJ},
    "ViT and BERT": {
        **_bert_tower("text_model"),
        **blocks("vision", _two("vision_model.layers"), _VIT_PLACES),
        **named(
            text__pool_fc1="text_model.pooler.dense.weight",
            vision__pool_fc1="vision_model.pooler.dense.weight",
            vision__patch_embedding="vision_model.embeddings.patch_embeddings.projection.weight",
            vision__position_embedding="vision_model.embeddings.position_embeddings",
        ),
        **_PROJ,
    },
    "CLIP vision and XLM-R": {
        **_bert_tower("text_model"),
        **_clip_tower("vision", "vision_model"),
        **named(text__pool_fc1="text_model.pooler.dense.weight"),
        **_PROJ,
    },
    "CLIP and CLIP": {
        **_clip_tower("text", "text_model"),
        **_clip_tower("vision", "vision_model"),
        **_PROJ,
    },
    "CLIPTextModel": _clip_tower("text", ""),
    "CLIPTextModelWithProjection": {
        **_clip_tower("text", "text_model"),
        **named(text__proj="text_projection.weight"),
    },
    "CLIPVisionModel": _clip_tower("vision", ""),
    "CLIPVisionModelWithProjection": {
        **_clip_tower("vision", "vision_model"),
        **named(vision__proj="visual_projection.weight"),
    },
    "own towers": {
        **blocks("text", _two("text_tower.encoder.block"), _T5_PLACES),
        **blocks("vision", _two("vision_tower.blocks.layers"), _TORCH_PLACES),
        **named(
            text__token_embedding="text_tower.encoder.embed_tokens.weight",
            text__proj="text_projection.weight",
            vision__patch_embedding="vision_tower.embeddings.patch_embedding.weight",
            vision__proj="vision_projection.weight",
        ),
    },
    "own DINOv2 and XLM-R": {
        **_bert_tower("text_tower"),
        **blocks("vision", _two("vision_tower.encoder.layer"), _VIT_PLACES),
        **named(
            text__pool_fc1="text_tower.pooler.dense.weight",
            vision__patch_embedding="vision_tower.embeddings.patch_embeddings.projection.weight",
            vision__position_embedding="vision_tower.embeddings.position_embeddings",
        ),
    },
}


def build(name: str) -> nn.Module:
    """A model of a name in `BUILDERS`, in eval mode."""
    torch.manual_seed(0)
    model = randomise(BUILDERS[name]())
    with torch.no_grad():
        for parameter_name, parameter in model.named_parameters():
            if "layer_scale" in parameter_name:
                parameter.fill_(1.0)
    return model.eval()


def tokenizer_of(padding: int) -> PreTrainedTokenizerFast:
    """A tokenizer of a few words that begins and ends a text, and pads with an id of choice."""
    special = ["<pad>", "<s>"] if padding == 0 else ["<s>", "<pad>"]
    words = {word: index for index, word in enumerate([*special, "</s>", "<unk>", *_VIETNAMESE])}
    inner = Tokenizer(models.WordLevel(words, "<unk>"))
    inner.pre_tokenizer = pre_tokenizers.Whitespace()
    ends = [("<s>", words["<s>"]), ("</s>", words["</s>"])]
    inner.post_processor = processors.TemplateProcessing("<s> $A </s>", special_tokens=ends)
    names = {"pad_token": "<pad>", "unk_token": "<unk>", "bos_token": "<s>", "eos_token": "</s>"}
    return PreTrainedTokenizerFast(tokenizer_object=inner, **names)


def padding_of(name: str) -> int:
    """The id that pads the texts of a model."""
    return next(pad for kind, pad in PAD.items() if kind in name)


def ids_of(name: str) -> Tensor:
    """(3, 16) token ids of a model, padded as it pads."""
    return ids(padding_of(name))


def stock_features(model: nn.Module, name: str) -> tuple[Tensor, ...]:
    """What the model's own functions give, with a mask of padding made here; of a tower alone, one tensor."""
    tokens = ids_of(name)
    mask = tokens.ne(padding_of(name)).long()
    if name in LONE:
        output = model(input_ids=tokens) if "Text" in name else model(pixel_values=pixels())
        projected = getattr(output, "text_embeds", getattr(output, "image_embeds", None))
        return (output.pooler_output if projected is None else projected,)
    if name.startswith("open_clip"):
        return model.encode_image(pixels()), model.encode_text(tokens)
    if name.startswith("own DINOv2"):
        text = model.text_tower(input_ids=tokens, attention_mask=mask).pooler_output
        return model.vision_tower(pixel_values=pixels()).pooler_output, text
    if name.startswith("own"):
        states = model.text_tower(input_ids=tokens, attention_mask=mask).last_hidden_state
        text = torch.stack([row[kept.bool()].mean(0) for row, kept in zip(states, mask, strict=True)])
        return model.vision_projection(model.vision_tower(pixels())), model.text_projection(text)
    hidden = {} if name == "CLIP and CLIP" else {"attention_mask": mask}
    image = model.get_image_features(pixel_values=pixels()).pooler_output
    return image, model.get_text_features(input_ids=tokens, **hidden).pooler_output
