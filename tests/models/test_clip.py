"""`Clip` over every kind of model: the same features as the model's own, tokens cut without a trace, one
fingerprint for one set of weights, and each public function on raw models."""

from __future__ import annotations

import copy
from collections.abc import Callable
from pathlib import Path
from typing import Any

import open_clip
import pytest
import torch
import torch.nn.functional as F
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from torch import Tensor, nn
from transformers import SiglipConfig, SiglipModel

import clipgraft as cg
from clipgraft.models.clip import ClipLike, as_clip
from explicit_lora import randomise_lora
from tiny_models import EOS_ID, TINY_OPENCLIP, in_every_layout, randomise, to_transformers
from tiny_siglip import build_siglip, with_logit_bias

Make = Callable[..., nn.Module]
# Hypothesis reuses a test's fixtures for all its examples; nothing here changes the models.
shared_models = settings(max_examples=15, suppress_health_check=[HealthCheck.function_scoped_fixture])


def custom_text(**text: Any) -> nn.Module:
    """A `CustomTextCLIP` whose text configuration a test chooses."""
    config = copy.deepcopy(TINY_OPENCLIP)
    config["text_cfg"] |= {"vocab_size": 100, "context_length": 16, **text}
    return randomise(open_clip.CustomTextCLIP(**config)).eval()


def stock_features(model: nn.Module, tokens: Tensor) -> Tensor:
    """What the model's own library makes of full-length tokens."""
    with torch.no_grad():
        if hasattr(model, "get_text_features"):
            return model.get_text_features(tokens).pooler_output
        return model.encode_text(tokens)


@st.composite
def captions(draw: st.DrawFn, length: int, end: int) -> Tensor:
    """(N, length) ids: words, one end token, and then anything that is no end token or padding with it."""
    ends = draw(st.lists(st.integers(1, length - 1), min_size=1, max_size=4))
    generator = torch.Generator().manual_seed(draw(st.integers(0, 2**31)))
    tokens = torch.randint(3, end, (len(ends), length), generator=generator)
    for row, position in enumerate(ends):
        tokens[row, position] = end
        padding = draw(st.sampled_from([0, end, None]))
        if padding is not None:
            tokens[row, position + 1 :] = padding
    return tokens


def assert_cut_changes_nothing(model: nn.Module, tokens: Tensor, end: int) -> None:
    """Cut right behind the last end token of the batch, with the features of the full length.

    In double precision no rounding can hide a difference.
    """
    clip = as_clip(model)
    first_ends = [row.tolist().index(end) for row in tokens]
    assert clip.cut_tokens(tokens).equal(tokens[:, : max(first_ends) + 1])
    with torch.no_grad():
        unit = clip.encode_text(tokens, normalize=True)
        torch.testing.assert_close(unit, F.normalize(stock_features(model, tokens)), atol=1e-6, rtol=0)
        model.double()
        exact = clip.encode_text(tokens), stock_features(model, tokens)
        model.float()
    torch.testing.assert_close(*exact, atol=1e-12, rtol=1e-12)


@shared_models
@given(tokens=captions(77, 49407))
def test_cut_text_of_clip(tiny_openclip: nn.Module, tokens: Tensor) -> None:
    """Cutting the padding changes the text features of an open_clip CLIP."""
    assert_cut_changes_nothing(tiny_openclip, tokens, 49407)


@shared_models
@given(tokens=captions(77, 49407))
def test_cut_text_of_open_clip_4(tiny_openclip_4x: nn.Module, tokens: Tensor) -> None:
    """Cutting the padding changes the text features once open_clip 4 is installed."""
    assert_cut_changes_nothing(tiny_openclip_4x, tokens, 49407)


@pytest.fixture(params=[{}, {"pool_type": "eos", "eos_id": EOS_ID}], ids=["argmax", "eos"])
def causal_custom_text(request: pytest.FixtureRequest) -> nn.Module:
    """A `CustomTextCLIP` with a causal text tower."""
    return custom_text(**request.param)


@shared_models
@given(tokens=captions(16, EOS_ID))
def test_cut_text_of_custom_text_clip(causal_custom_text: nn.Module, tokens: Tensor) -> None:
    """A model with its text tower apart (EVA, MobileCLIP, ViTamin) fails on short text, or changes."""
    assert_cut_changes_nothing(causal_custom_text, tokens, EOS_ID)


@shared_models
@given(tokens=captions(16, EOS_ID))
def test_cut_text_of_transformers(tiny_hf: nn.Module, tokens: Tensor) -> None:
    """Cutting the padding changes the text features of a transformers CLIP."""
    assert_cut_changes_nothing(tiny_hf, tokens, EOS_ID)


@pytest.fixture
def legacy_hf(make_hf: Make) -> nn.Module:
    """Like OpenAI's first uploads, whose configuration says that the end token is 2."""
    return make_hf(eos_token_id=2)


@shared_models
@given(tokens=captions(16, EOS_ID))
def test_cut_text_of_legacy_transformers(legacy_hf: nn.Module, tokens: Tensor) -> None:
    """openai/clip-vit-base-patch32 pools its largest id, not id 2; cut elsewhere, its features are lost."""
    assert_cut_changes_nothing(legacy_hf, tokens, EOS_ID)


def siglip_text() -> nn.Module:
    """open_clip's SigLIP layout: every token sees every other, and the last one is pooled."""
    return custom_text(no_causal_mask=True, pool_type="last", proj_bias=True)


def coca_text() -> nn.Module:
    """CoCa's layout: a class token behind the text sees all of it."""
    return custom_text(embed_cls=True, pad_id=0)


def bidirectional_clip() -> nn.Module:
    """A CLIP without a causal mask."""
    config = copy.deepcopy(TINY_OPENCLIP)
    config["text_cfg"] |= {"vocab_size": 100, "context_length": 16, "no_causal_mask": True}
    return randomise(open_clip.CLIP(**config)).eval()


def siglip_of_transformers() -> nn.Module:
    """A `SiglipModel`."""
    tower = {"hidden_size": 32, "intermediate_size": 64, "num_hidden_layers": 1, "num_attention_heads": 2}
    ids = {"vocab_size": 100, "max_position_embeddings": 16, "bos_token_id": 1, "eos_token_id": 99}
    sizes = {"image_size": 32, "patch_size": 8}
    config = SiglipConfig(text_config={**tower, **ids}, vision_config={**tower, **sizes})
    return randomise(SiglipModel(config)).eval()


@pytest.mark.parametrize("make", [siglip_text, coca_text, bidirectional_clip, siglip_of_transformers])
def test_text_that_sees_its_padding_is_never_cut(make: Callable[[], nn.Module]) -> None:
    """SigLIP attends to its padding: cut text is other text, and retrieval gets worse without a message."""
    model = make()
    clip = as_clip(model)
    tokens = torch.tensor([[98, 5, 99] + [0] * 13, [98, 7, 8, 99] + [0] * 12])
    assert clip.cut_tokens(tokens) is tokens
    with torch.no_grad():
        assert clip.encode_text(tokens).equal(stock_features(model, tokens))
    changed = tokens.clone()
    changed[:, -1] = 9
    assert not stock_features(model, changed).allclose(stock_features(model, tokens), atol=1e-3)


def test_images_are_the_stock_features(tiny_openclip: nn.Module, tiny_hf: nn.Module) -> None:
    """Image features differ from the model's own, or pixels of another type are refused."""
    images = torch.randn(2, 3, 32, 32, generator=torch.Generator().manual_seed(0), dtype=torch.float64)
    with torch.no_grad():
        stock = tiny_openclip.encode_image(images.float())
        assert as_clip(tiny_openclip).encode_image(images).equal(stock)
        stock = tiny_hf.get_image_features(images.float()).pooler_output
        assert as_clip(tiny_hf).encode_image(images).equal(stock)
        unit = as_clip(tiny_hf).encode_image(images, normalize=True)
    torch.testing.assert_close(unit, stock / stock.norm(dim=-1, keepdim=True))


def test_strings_and_tokens_are_one(hf_folder: Path, tiny_config: Path) -> None:
    """`encode_text` of strings differs from that of their tokens, or a lone string is split into letters."""
    for clip in (cg.load(hf_folder), cg.load(tiny_config, "none")):
        texts = ["the cat", "a dog on a chair"]
        with torch.no_grad():
            both = clip.encode_text(texts, normalize=True)
            assert both.equal(clip.encode_text(clip.tokenize(texts), normalize=True))
            torch.testing.assert_close(clip.encode_text("the cat", normalize=True), both[:1])
            torch.testing.assert_close(both.norm(dim=-1), torch.ones(2))
        assert clip.tokenize("the cat").shape == (1, clip.context_length)
        assert clip.tokenize([]).shape == (0, clip.context_length)


@pytest.mark.parametrize("text", ["", "the cat", "x " * 200])
def test_count_tokens(hf_folder: Path, tiny_config: Path, text: str) -> None:
    """The report of captions longer than the context counts wrongly."""
    hf, config = cg.load(hf_folder), cg.load(tiny_config, "none")
    assert hf.count_tokens([text]) == [2 + len(text.replace("the", "t").replace(" ", ""))]
    assert config.count_tokens([text]) == [2 + len(text.split())]
    for clip in (hf, config):
        assert clip.count_tokens([]) == []
        used = int(as_clip(clip).family.text_ends(clip.model, clip.tokenize([text]))) + 1
        assert min(clip.count_tokens([text])[0], clip.context_length) == used


def test_raw_models_take_no_strings(tiny_hf: nn.Module) -> None:
    """Strings for a model without a tokenizer end with a traceback that does not say what to do."""
    for call in (as_clip(tiny_hf).encode_text, as_clip(tiny_hf).tokenize, as_clip(tiny_hf).count_tokens):
        with pytest.raises(cg.errors.ModelError, match="pass token ids instead of strings"):
            call(["a cat"])


def test_logit_scale_is_the_models_own(tiny_openclip: nn.Module, tiny_hf: nn.Module) -> None:
    """Training the temperature trains a copy of it."""
    for model in (tiny_openclip, tiny_hf):
        assert as_clip(model).logit_scale is model.logit_scale
        assert as_clip(model).model is model
        assert as_clip(as_clip(model)).model is model
        assert as_clip(model).logit_bias is None
        assert list(as_clip(model).temperature) == ["logit_scale"]


def test_logit_bias_is_the_models_own(tiny_openclip: nn.Module) -> None:
    """Training or reading the bias of a SigLIP trains or reads a copy of it, or none."""
    for model in (build_siglip(), with_logit_bias(as_clip(tiny_openclip)).model):
        clip = as_clip(model)
        assert clip.logit_bias is model.logit_bias
        assert clip.temperature == {"logit_scale": model.logit_scale, "logit_bias": model.logit_bias}


@pytest.mark.parametrize("model", [nn.Linear(2, 2), nn.Sequential(), "ViT-B-32", None])
def test_other_objects_are_no_clip(model: Any) -> None:
    """A model that is no CLIP fails somewhere deep inside instead of at the door."""
    with pytest.raises(
        cg.errors.ModelError, match=r"is no CLIP model clipgraft knows: pass an open_clip"
    ) as caught:
        cg.apply_lora(model)
    assert len(str(caught.value).splitlines()) == 1


@pytest.mark.parametrize(
    ("kind", "told"),
    [
        ("Clap", "compares texts with sounds, and clipgraft reads images: adapt it with PEFT"),
        (
            "CLIPSegForImageSegmentation",
            "gives masks of images and no features: pass the CLIP model that it holds",
        ),
        ("GPT2LMHead", "is a decoder, whose output is the next token .* pass an encoder"),
        ("MT5", "is an encoder with a decoder: pass its encoder"),
        ("Bert", "is one tower or no CLIP model at all: join a text and an image tower with"),
    ],
)
def test_relatives_that_are_no_clip(kind: str, told: str) -> None:
    """A model of sounds, masks or tokens fails deep inside, or nobody says what to do instead."""
    import transformers

    names = {"CLIPSegForImageSegmentation": "CLIPSeg", "GPT2LMHead": "GPT2"}
    config = getattr(transformers, f"{names.get(kind, kind)}Config")()
    model = kind if kind.startswith("CLIPSeg") else f"{kind}Model"
    with torch.device("meta"):
        built = getattr(transformers, model)(config)
    with pytest.raises(cg.errors.ModelError, match=told) as caught:
        cg.apply_lora(built)
    assert len(str(caught.value).splitlines()) == 1


def test_clip_inside_clipseg() -> None:
    """The CLIP model that CLIPSeg holds cannot be adapted in its place."""
    from transformers import CLIPSegConfig, CLIPSegForImageSegmentation

    tower = {"hidden_size": 32, "intermediate_size": 64, "num_hidden_layers": 2, "num_attention_heads": 2}
    sizes = {"image_size": 32, "patch_size": 8}
    config = CLIPSegConfig(
        text_config={**tower, "vocab_size": 50, "bos_token_id": 48, "eos_token_id": 49},
        vision_config={**tower, **sizes},
        extract_layers=[0, 1],
        reduce_dim=8,
    )
    whole = CLIPSegForImageSegmentation(config).eval()
    inputs = {"input_ids": torch.tensor([[48, 5, 49]]), "pixel_values": torch.randn(1, 3, 32, 32)}
    with torch.no_grad():
        before = whole(**inputs).logits
        cg.apply_lora(whole.clip, r=2, targets="text.0.q")
        assert whole(**inputs).logits.equal(before)
        randomise_lora(whole.clip)
        assert not whole(**inputs).logits.equal(before)


def test_one_fingerprint_in_every_layout(tiny_openclip: nn.Module, tiny_openclip_4x: nn.Module) -> None:
    """An adapter is refused on its own base because that was loaded with the other library."""
    prints = {
        layout: as_clip(model).fingerprint
        for layout, model in in_every_layout(tiny_openclip, tiny_openclip_4x).items()
    }
    assert len(set(prints.values())) == 1, prints
    assert len(prints["CLIP"]) == 16


def test_canonical_weights_leave_nothing_out(tiny_openclip: nn.Module, tiny_openclip_4x: nn.Module) -> None:
    """A weight outside the fingerprint can change without anybody noticing."""
    expected = to_transformers(tiny_openclip).state_dict()
    for layout, model in in_every_layout(tiny_openclip, tiny_openclip_4x).items():
        weights = list(as_clip(model).family.canonical_weights(model))
        assert len(weights) == len(expected), layout
        for name, weight in weights:
            assert weight.equal(expected[name]), (layout, name)


def test_fingerprint_survives_bf16(tiny_openclip: nn.Module, tiny_hf: nn.Module) -> None:
    """An adapter trained on a bf16 base is refused on the fp32 one."""
    for model in (tiny_openclip, tiny_hf):
        full, half = copy.deepcopy(model), copy.deepcopy(model).to(torch.bfloat16)
        assert as_clip(full).fingerprint == as_clip(half).fingerprint


def test_fingerprint_sees_every_weight(tiny_openclip: nn.Module, tiny_hf: nn.Module) -> None:
    """A base with one other weight passes for the same base."""
    for model in (tiny_openclip, tiny_hf):
        before = as_clip(model).fingerprint
        for name, parameter in model.named_parameters():
            with torch.no_grad():
                kept = parameter.clone()
                parameter.flatten()[-1:].copy_(parameter.flatten()[-1:] * 1.02 + 0.01)
                changed = as_clip(model).fingerprint
                parameter.copy_(kept)
            assert (changed == before) == (name == "logit_scale"), name
        assert as_clip(model).fingerprint == before


def test_fingerprint_follows_training(tiny_openclip: nn.Module) -> None:
    """A fine-tuned model, or a copy of one, passes for the base it came from."""
    before = as_clip(tiny_openclip).fingerprint
    optimizer = torch.optim.AdamW(tiny_openclip.parameters(), lr=0.1)
    tiny_openclip.encode_image(torch.zeros(1, 3, 32, 32)).sum().backward()
    optimizer.step()
    trained = as_clip(tiny_openclip).fingerprint
    assert trained != before
    twin = copy.deepcopy(tiny_openclip)
    assert as_clip(twin).fingerprint == trained
    nn.init.zeros_(twin.visual.proj)
    assert as_clip(twin).fingerprint != trained
    twin.load_state_dict(tiny_openclip.state_dict())
    assert as_clip(twin).fingerprint == trained


@pytest.mark.parametrize("targets", ["text-attention", "all"])
def test_fingerprint_ignores_adapters(
    tiny_openclip: nn.Module, tiny_openclip_4x: nn.Module, targets: str
) -> None:
    """An adapter saved from a trained model names a base that nobody has."""
    layouts = in_every_layout(tiny_openclip, tiny_openclip_4x)
    before = as_clip(tiny_openclip).fingerprint
    for layout, model in layouts.items():
        cg.apply_lora(model, r=2, targets=targets)
        for name, parameter in model.named_parameters():
            if ".lora_" in name:
                nn.init.normal_(parameter)
        assert as_clip(model).fingerprint == before, layout
        # Whatever was kept, the weights themselves must say the same.
        assert as_clip(model)._fingerprint() == before, layout
        cg.remove_lora(model)
        assert as_clip(model)._fingerprint() == before, layout


def test_dtype_is_the_bases(tiny_hf: nn.Module, tiny_openclip: nn.Module) -> None:
    """Pixels for a bf16 base with an fp32 adapter are sent in fp32, and the first layer fails."""
    for model in (tiny_hf, tiny_openclip):
        model.to(torch.bfloat16)
        cg.apply_lora(model, r=2, targets="all")
        assert as_clip(model).dtype == torch.bfloat16


@pytest.mark.parametrize("wrap", [lambda model: model, as_clip], ids=["raw", "Clip"])
@pytest.mark.parametrize("kind", ["tiny_openclip", "tiny_openclip_4x", "tiny_hf"])
def test_functions_take_raw_models(
    request: pytest.FixtureRequest, tmp_path: Path, kind: str, wrap: Callable[[nn.Module], ClipLike]
) -> None:
    """A function works on `Clip` alone, or does not reach the model that its user holds."""
    raw = request.getfixturevalue(kind)
    model, end = wrap(raw), 99 if kind == "tiny_hf" else 49407
    tokens = torch.full((2, as_clip(raw).context_length), end)
    tokens[:, :3] = torch.tensor([[1, 5, 7], [1, 8, 9]])
    base = stock_features(raw, tokens)
    assert cg.apply_lora(model, r=2) == 8
    assert cg.count_parameters(model).lora == cg.count_parameters(model).trainable == 8 * 2 * 2 * 32
    for name, parameter in raw.named_parameters():
        if "lora_B" in name:
            nn.init.normal_(parameter)
    adapted = stock_features(raw, tokens)
    assert not adapted.allclose(base, atol=1e-2)
    with cg.lora_disabled(model):
        assert stock_features(raw, tokens).equal(base)
    cg.disable_lora(model)
    assert stock_features(raw, tokens).equal(base)
    cg.enable_lora(model)
    as_clip(model).encode_text(tokens).sum().backward()
    assert cg.lora.verify_gradients(model) == 16
    cg.save_adapter(model, tmp_path / "adapter")
    assert len(cg.adapters.lora_state_dict(model)) == 16
    cg.remove_lora(model)
    assert stock_features(raw, tokens).equal(base)
    cg.load_adapter(model, tmp_path / "adapter")
    torch.testing.assert_close(stock_features(raw, tokens), adapted)


def test_grad_checkpointing_changes_no_gradient(
    tiny_openclip: nn.Module, tiny_openclip_4x: nn.Module
) -> None:
    """`--grad-checkpointing` saves memory at the price of wrong gradients, or cannot be switched off."""
    tokens = torch.full((2, 77), 49407)
    tokens[:, :3] = torch.tensor([[1, 5, 7], [1, 8, 9]])
    images = torch.randn(2, 3, 32, 32, generator=torch.Generator().manual_seed(0))
    for layout, model in in_every_layout(tiny_openclip, tiny_openclip_4x).items():
        clip = as_clip(model).train()
        gradients = []
        for enable in (False, True, False):
            clip.family.set_grad_checkpointing(model, enable)
            model.zero_grad()
            calls: list[int] = []
            hooks = [
                model.get_submodule(ref.module).register_forward_hook(lambda *_, seen=calls: seen.append(1))
                for site, ref in clip.site_refs.items()
                if site.role == "fc1"
            ]
            (clip.encode_image(images) * clip.encode_text(tokens)).sum().backward()
            assert len(calls) == (8 if enable else 4), layout
            for hook in hooks:
                hook.remove()
            gradients.append([p.grad for p in model.parameters() if p.grad is not None])
        for one, two, three in zip(*gradients, strict=True):
            torch.testing.assert_close(two, one, msg=layout)
            assert three.equal(one)
