"""Smaller models, opened by stock transformers and compared with their base."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import open_clip
import pytest
import torch
import transformers
from torch import nn

import clipgraft as cg
from clipgraft.compact.model import compact_model, write_compact
from clipgraft.compact.vocabulary import bpe_of
from clipgraft.errors import ConfigError, DataError, ModelError
from clipgraft.models.clip import Clip, as_clip, family_of
from clipgraft.models.convert import to_transformers
from clipgraft.models.family import LARGEST_ID
from clipgraft.models.load import load
from clipgraft.models.processors import HfTokenizer, OpenClipTokenizer, to_hf_tokenizer

TEXTS = ("a photo of a dog", "hai con chó đang chạy trên bãi cỏ 🐕", "Dogs & cats; it's 12 o'clock!")
OTHERS = ("zebra crossing", "một chiếc ô tô", "")

VISION = {"image_size": 32, "patch_size": 8, "width": 32, "head_width": 16, "layers": 2}
SIGLIP_TEXT = {
    "context_length": 16,
    "vocab_size": 100,
    "width": 32,
    "heads": 2,
    "layers": 2,
    "no_causal_mask": True,
    "pool_type": "last",
    "proj_bias": True,
}


@pytest.fixture(scope="module")
def emoji() -> Clip:
    """The embedded default. Read only."""
    return load("emoji")


def encoded(clip: Clip, texts: tuple[str, ...] = TEXTS) -> torch.Tensor:
    """Text features, not normalised."""
    with torch.no_grad():
        return clip.encode_text(list(texts))


def stock(folder: Path, texts: tuple[str, ...]) -> torch.Tensor:
    """What transformers alone makes of texts."""
    tokenizer = transformers.CLIPTokenizerFast.from_pretrained(folder)
    model = transformers.CLIPModel.from_pretrained(folder).eval()
    inputs = tokenizer(list(texts), padding="max_length", max_length=48, return_tensors="pt")
    with torch.no_grad():
        return model.get_text_features(input_ids=inputs["input_ids"]).pooler_output


def test_texts_of_the_corpus_keep_their_features(emoji: Clip, tmp_path: Path) -> None:
    """A model cut for a user's captions scores them otherwise than before, by however little."""
    before = emoji.fingerprint
    small = compact_model(emoji, texts=TEXTS)
    assert torch.equal(encoded(small.clip), encoded(emoji))
    assert small.clip.tokenize(OTHERS).max() < len(small.vocabulary.token_ids)  # type: ignore[union-attr]
    out = write_compact(small, str(tmp_path / "nhỏ"))  # as the documents call it
    assert torch.equal(encoded(cg.load(out)), encoded(emoji))
    assert torch.equal(stock(out, TEXTS), stock(Path(emoji.model.name_or_path), TEXTS))
    assert emoji.fingerprint == before


# Early releases of transformers 5 read these two files in a way that tokenizers has deprecated.
@pytest.mark.filterwarnings("ignore:Deprecated in 0.9.0:DeprecationWarning")
@pytest.mark.parametrize("how", ["tokenizer.json", "vocab.json and merges.txt"])
def test_stock_tokenizers_read_the_folder(emoji: Clip, how: str, tmp_path: Path) -> None:
    """transformers finds other ids in the folder than clipgraft, or none."""
    small = compact_model(emoji, texts=TEXTS, vocab_size=700)
    out = write_compact(small, tmp_path / "small")
    if how != "tokenizer.json":
        (out / "tokenizer.json").unlink()
    inner = transformers.CLIPTokenizerFast.from_pretrained(out)
    assert len(inner) == 700
    assert sorted(inner.get_vocab().values()) == list(range(700))
    ids = inner([*TEXTS, *OTHERS], padding="max_length", max_length=48)["input_ids"]
    assert ids == small.clip.tokenize([*TEXTS, *OTHERS]).tolist()
    config = transformers.CLIPModel.from_pretrained(out).config.text_config
    assert (config.eos_token_id, config.bos_token_id) == (inner.eos_token_id, inner.bos_token_id)
    assert (config.pad_token_id, config.vocab_size) == (inner.pad_token_id, 700)
    record = json.loads((out / "compact.json").read_text())
    assert record["base"] == {"name": "emoji", "pretrained": "", "fingerprint": emoji.fingerprint}
    assert len(record["token_ids"]) == 700
    assert not list(tmp_path.glob(".*"))


def test_blocks_keep_their_weights(emoji: Clip) -> None:
    """A kept block has another block's weights, or the model is not that of its blocks run one by one."""
    small = compact_model(emoji, text_layers=3, vision_blocks=(1, 4))
    assert (small.text_blocks, small.vision_blocks) == ((0, 1, 3), (1, 4))
    reference: nn.Module = transformers.CLIPModel.from_pretrained(emoji.model.name_or_path).eval()
    text, vision = reference.text_model.encoder, reference.vision_model.encoder
    text.layers = nn.ModuleList(text.layers[i] for i in (0, 1, 3))
    vision.layers = nn.ModuleList(vision.layers[i] for i in (1, 4))
    pixels, ids = torch.randn(2, 3, 96, 96), emoji.tokenize(TEXTS)
    with torch.no_grad():
        for name, inputs in (("get_text_features", ids), ("get_image_features", pixels)):
            got, wanted = (getattr(model, name)(inputs) for model in (small.clip.model, reference))
            assert torch.equal(got.pooler_output, wanted.pooler_output)
    assert small.parameters == sum(p.numel() for p in reference.parameters())


def test_nothing_is_shared_with_the_base(emoji: Clip) -> None:
    """Training the smaller model changes its base, or a raw model is read with the base's tokenizer."""
    small = compact_model(emoji, text_layers=1, texts=TEXTS)
    owned = {p.untyped_storage().data_ptr() for p in emoji.model.parameters()}
    assert not owned & {p.untyped_storage().data_ptr() for p in small.clip.model.parameters()}
    assert small.clip.model.name_or_path == ""
    with pytest.raises(ModelError, match="no tokenizer"):
        as_clip(small.clip.model).tokenize(TEXTS)


@pytest.mark.parametrize("old", [2, 4935])
def test_both_ways_to_say_where_a_text_ends(emoji: Clip, old: int) -> None:
    """A model in OpenAI's form, with eos_token_id 2, is pooled at another token after the cut."""
    raw = transformers.CLIPModel.from_pretrained(emoji.model.name_or_path).eval()
    raw.config.text_config.eos_token_id = raw.text_model.eos_token_id = old
    clip = Clip(raw, emoji.family, emoji.tokenizer)
    small = compact_model(clip, texts=TEXTS).clip
    config = small.model.config.text_config
    assert config.eos_token_id == config.vocab_size - 1 == small.tokenizer.inner.eos_token_id
    assert torch.equal(encoded(small), encoded(clip))


def test_end_of_text_that_is_not_the_largest_id(make_hf: Callable[..., nn.Module]) -> None:
    """A tokenizer with its special tokens in front is pooled at a wrong token once ids are renumbered."""
    pieces = [
        "<|startoftext|>",
        "<|endoftext|>",
        *"abcd",
        *(f"{letter}</w>" for letter in "abcd"),
        "ab",
        "cd</w>",
    ]
    inner = transformers.CLIPTokenizer(
        vocab={piece: i for i, piece in enumerate(pieces)}, merges=[("a", "b"), ("c", "d</w>")]
    )
    for eos in (2, 1):
        ids = {"bos_token_id": 0, "eos_token_id": eos, "pad_token_id": 1}
        model = make_hf(vocab_size=len(pieces), **ids)
        clip = Clip(model, family_of(model), HfTokenizer(inner, 16))
        small = compact_model(clip, texts=["abc"])
        assert small.vocabulary is not None
        assert len(small.vocabulary.token_ids) == len(pieces) - 1
        assert small.clip.family.pooled_id(small.clip.model) == (LARGEST_ID if eos == 2 else 1)
        assert torch.equal(encoded(small.clip, ("abc", "b a")), encoded(clip, ("abc", "b a")))


def test_added_tokens_stay(emoji: Clip, tmp_path: Path) -> None:
    """A token that a user taught the base is gone, or has another token's embedding."""
    clip = load("emoji")
    clip.tokenizer.inner.add_tokens(["<cat-toy>"])  # type: ignore[union-attr]
    clip.model.text_model.embeddings.token_embedding = nn.Embedding(4937, 192)
    clip.model.config.text_config.vocab_size = 4937  # type: ignore[union-attr]
    texts = ("a photo of a <cat-toy> dog", "<cat-toy>")
    small = compact_model(clip, texts=texts[:1])
    assert small.vocabulary is not None
    assert small.vocabulary.token_ids[-1] == 4936
    assert torch.equal(encoded(small.clip, texts), encoded(clip, texts))
    assert torch.equal(encoded(cg.load(write_compact(small, tmp_path / "s")), texts), encoded(clip, texts))


def test_open_clip_bases_become_transformers(tiny_config: Path, tmp_path: Path) -> None:
    """A compact open_clip model cannot be opened, or its texts score otherwise than those of the base."""
    clip = load(str(tiny_config), "none")
    small = compact_model(clip, texts=TEXTS)
    assert torch.equal(encoded(small.clip), encoded(to_transformers(clip)))
    assert torch.allclose(encoded(small.clip), encoded(clip), atol=1e-5)
    assert len(small.vocabulary.token_ids) < 600  # type: ignore[union-attr]
    out = write_compact(compact_model(clip, text_layers=1, texts=TEXTS), tmp_path / "out")
    assert cg.load(out).model.config.text_config.num_hidden_layers == 1


def test_the_compact_clip_of_the_reference() -> None:
    """ViT-B/32 with 3 + 3 blocks and 4,940 tokens has another size than the published compact CLIP."""
    config = transformers.CLIPConfig(projection_dim=512, text_config={"eos_token_id": 49407})
    with torch.device("meta"):
        model = transformers.CLIPModel(config)
    inner = open_clip.get_tokenizer("ViT-B-32")
    clip = as_clip(model)
    clip.tokenizer = OpenClipTokenizer(inner, 77)
    clip.tokenizer = to_hf_tokenizer(clip)
    small = compact_model(clip, text_layers=3, vision_layers=3, vocab_size=4940)
    assert small.parameters == 36_347_393
    assert small.base_parameters == 151_277_313
    assert (small.text_blocks, small.vision_blocks) == ((0, 5, 11), (0, 5, 11))
    first = sorted(open_clip.tokenizer.SimpleTokenizer().bpe_ranks.items(), key=lambda item: item[1])
    assert bpe_of(small.clip.tokenizer.inner).merges == [pair for pair, _ in first[: 4940 - 514]]


def test_lossy_vocabularies_say_so(emoji: Clip) -> None:
    """Texts change their tokens without anyone asking for it, or unnoticed."""
    with pytest.raises(ConfigError, match=r"needs 5\d\d tokens to be encoded as before; ask for as many"):
        compact_model(emoji, texts=TEXTS, vocab_size=515)
    small = compact_model(emoji, texts=TEXTS, vocab_size=520, vocab_lossy=True)
    assert small.vocabulary is not None
    assert (len(small.vocabulary.token_ids), small.vocabulary.texts) == (520, 3)
    old = torch.tensor(small.vocabulary.token_ids)
    same = (old[small.clip.tokenize(TEXTS)] == emoji.tokenize(TEXTS)).all(1)
    assert small.vocabulary.unchanged == same.sum() < 3


@pytest.mark.parametrize(
    ("options", "error", "message"),
    [
        ({}, ConfigError, "nothing to cut"),
        ({"text_layers": 5}, ConfigError, "`text_layers=5`: the text tower has 4; keep 1 to 4"),
        ({"vision_layers": 0}, ConfigError, "`vision_layers=0`: the vision tower has 6; keep 1 to 6"),
        ({"text_blocks": (0, 4)}, ConfigError, "there is no block 4; name some of 0 to 3"),
        ({"text_blocks": ()}, ConfigError, "no block is left"),
        ({"vision_blocks": (2, 1)}, ConfigError, "in rising order"),
        ({"vision_blocks": (1, 1)}, ConfigError, "name each block once"),
        ({"text_layers": 1, "text_blocks": (0,)}, ConfigError, "both choose blocks"),
        ({"texts": ()}, DataError, "no text to take a vocabulary from"),
        ({"vocab_size": 513}, ConfigError, "stay in any case; ask for 514 or more"),
        ({"vocab_size": 4937}, ConfigError, "the base has 4936 tokens"),
    ],
)
def test_what_cannot_be_cut(
    emoji: Clip, options: dict[str, Any], error: type[Exception], message: str
) -> None:
    """A wrong number ends in a traceback, or in another model than was asked for."""
    with pytest.raises(error, match=message) as caught:
        compact_model(emoji, **options)
    assert "\n" not in str(caught.value)


def test_models_that_cannot_be_cut(
    tiny_openclip: nn.Module, make_hf: Callable[..., nn.Module], emoji: Clip, tmp_path: Path
) -> None:
    """A model with an adapter, or with a tokenizer of another kind, ends in a traceback or in nonsense."""
    cg.apply_lora(tiny_openclip, r=2)
    with pytest.raises(ModelError, match="carries an adapter: merge it"):
        compact_model(tiny_openclip, text_layers=1)
    words = {"[UNK]": 0, "[CLS]": 1, "[SEP]": 2, "[PAD]": 3, "[MASK]": 4, "dog": 5}
    model = make_hf()
    clip = Clip(model, family_of(model), HfTokenizer(transformers.BertTokenizer(vocab=words), 16))
    with pytest.raises(ModelError, match="a BertTokenizer, not CLIP's byte-level BPE") as caught:
        compact_model(clip, texts=["dog"])
    assert "\n" not in str(caught.value)
    assert compact_model(clip, text_layers=1).text_blocks == (0,)
    with pytest.raises(ModelError, match="no tokenizer to cut"):
        compact_model(make_hf(), vocab_size=90)
    with pytest.raises(ModelError, match="ids up to 4935 but the model 100 token embeddings"):
        compact_model(Clip(model, family_of(model), emoji.tokenizer), texts=["dog"])
    siglip = {"embed_dim": 24, "vision_cfg": VISION, "text_cfg": SIGLIP_TEXT}
    with pytest.raises(ModelError, match="not pooled at the end-of-text token"):
        compact_model(open_clip.CustomTextCLIP(**siglip), text_layers=1)
    (tmp_path / "taken").write_text("thesis")
    with pytest.raises(ModelError, match="exists already and is left as it is"):
        write_compact(compact_model(emoji, text_layers=1), tmp_path / "taken")
