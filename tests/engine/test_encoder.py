"""The engine against models that know nothing of it: the explicit W + s·B·A, and the stock forwards."""

from __future__ import annotations

import copy

import open_clip
import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

import clipgraft as cg
from clipgraft.engine.attention import AttentionKernels
from clipgraft.engine.encoder import Encoder
from clipgraft.lora.state import require_lora
from clipgraft.models.clip import as_clip
from explicit_lora import (
    CONTEXT_END,
    HF_END,
    custom_text,
    explicit_model,
    explicit_run,
    features,
    inputs,
    is_hf,
    largest,
    loss_of,
    randomise_lora,
)
from tiny_models import TINY_OPENCLIP, randomise

LAYOUTS = ("tiny_openclip", "tiny_openclip_4x", "tiny_hf", "custom_text", "linear_text_projection")


@pytest.fixture
def base(request: pytest.FixtureRequest) -> nn.Module:
    """The model of the layout that the test is parametrised with."""
    if request.param.startswith("tiny"):
        return request.getfixturevalue(request.param)
    options = {"proj_type": "linear"} if request.param == "linear_text_projection" else {}
    return randomise(custom_text(TINY_OPENCLIP, **options)).eval()


def ragged(model: nn.Module) -> tuple[Tensor, Tensor]:
    """Pixels, and captions of very different length that share beginnings and repeat each other."""
    end = HF_END if is_hf(model) else CONTEXT_END
    captions = [
        [7, 8, 9, 10],
        [7, 8],
        [7, 8, 9, 10],
        [7, 8, 9, 11, 12, 13, 14, 15, 16, 17, 18, 19, 20, 21],
        [5],
        [7, 8, 9],
    ]
    ids = torch.zeros(len(captions), 16 if is_hf(model) else 77, dtype=torch.long)
    for row, caption in enumerate(captions):
        ids[row, : len(caption) + 2] = torch.tensor([3, *caption, end])
    generator = torch.Generator().manual_seed(1)
    return torch.randn(len(captions), 3, 32, 32, generator=generator), ids


def encode(encoder: Encoder, pixels: Tensor, ids: Tensor) -> tuple[Tensor, Tensor]:
    return encoder.encode_image(pixels), encoder.encode_text(ids)


def tolerance(wanted: tuple[Tensor, ...]) -> float:
    return 1e-5 * max(1.0, *(t.abs().max().item() for t in wanted))


def adapted(base: nn.Module, targets: str = "all", **options: object) -> tuple[nn.Module, dict]:
    model = copy.deepcopy(base)
    cg.apply_lora(model, targets=targets, **{"r": 3, "alpha": 5, **options})
    return model, randomise_lora(model)


@pytest.mark.parametrize("base", LAYOUTS, indirect=True)
@pytest.mark.parametrize("targets", ["all", "text.*.q,v", "vision.1.*,vision.proj", "text.token_embedding"])
def test_features_and_gradients_are_those_of_the_explicit_model(base: nn.Module, targets: str) -> None:
    """A fast run trains another adapter than the slow one would, or reports another recall."""
    model, updates = adapted(base, targets)
    pixels, ids = ragged(base)
    encoder = Encoder(as_clip(model))
    ours = encode(encoder, pixels, ids)
    with torch.no_grad():
        wanted = features(explicit_model(base, updates), pixels, ids)
        inferred = encode(encoder, pixels, ids)
    assert largest(ours, wanted) <= tolerance(wanted)
    assert largest(inferred, wanted) <= tolerance(wanted)
    loss_of(ours).backward()
    leaves = {site: (a.requires_grad_(), b.requires_grad_(), s) for site, (a, b, s) in updates.items()}
    loss_of(explicit_run(base, leaves, lambda m: features(m, pixels, ids))).backward()
    for site, layer in require_lora(model).layers.items():
        a, b, _ = leaves[str(site)]
        assert largest((layer.lora_A.grad, layer.lora_B.grad), (a.grad, b.grad)) <= tolerance(
            (a.grad, b.grad)
        )


@pytest.mark.parametrize("base", LAYOUTS, indirect=True)
def test_full_fine_tuning_has_the_stock_gradients(base: nn.Module) -> None:
    """Full fine-tuning through the engine is another training than open_clip's or transformers'."""
    stock, ours = copy.deepcopy(base), copy.deepcopy(base)
    for model in (stock, ours):
        model.requires_grad_(True)
    pixels, ids = ragged(base)
    loss_of(features(stock, pixels, ids)).backward()
    loss_of(encode(Encoder(as_clip(ours)), pixels, ids)).backward()
    grads = dict(ours.named_parameters())
    compared = 0
    for name, parameter in stock.named_parameters():
        if parameter.grad is not None:
            assert largest((grads[name].grad,), (parameter.grad,)) <= tolerance((parameter.grad,)), name
            compared += 1
    assert compared > 40


@pytest.mark.parametrize("base", ["tiny_openclip", "tiny_hf"], indirect=True)
@pytest.mark.parametrize("kind", ["gelu", "quick_gelu", "gelu_tanh"])
def test_every_activation(base: nn.Module, kind: str) -> None:
    """A model with the other GELU gets features that are slightly wrong everywhere."""
    from transformers.activations import ACT2FN

    act = ACT2FN[{"gelu_tanh": "gelu_pytorch_tanh"}.get(kind, kind)]
    open_clip_act = {
        "gelu": nn.GELU(),
        "gelu_tanh": nn.GELU(approximate="tanh"),
        "quick_gelu": open_clip.transformer.QuickGELU(),
    }[kind]
    for module in base.modules():
        if hasattr(module, "activation_fn"):
            module.activation_fn = act
        if isinstance(getattr(module, "gelu", None), nn.Module):
            module.gelu = open_clip_act
    pixels, ids = ragged(base)
    with torch.no_grad():
        wanted = features(base, pixels, ids)
        ours = encode(Encoder(as_clip(base)), pixels, ids)
    assert largest(ours, wanted) <= tolerance(wanted)


def strange_models() -> dict[str, nn.Module]:
    """Towers that differ from the plain one in a detail each."""
    torch.manual_seed(0)

    def build(text: dict | None = None, vision: dict | None = None) -> nn.Module:
        config = copy.deepcopy(TINY_OPENCLIP)
        config["text_cfg"].update(text or {})
        config["vision_cfg"].update(vision or {})
        return randomise(open_clip.CustomTextCLIP(**config)).eval()

    return {
        "layer scale": build({"ls_init_value": 0.5}, {"ls_init_value": 0.5}),
        "qk norm": build({"qk_norm": True}, {"qk_norm": True}),
        "average pool": build(vision={"pool_type": "avg"}),
        "attentional pool": build(vision={"attentional_pool": True, "attn_pooler_heads": 2}),
        "no causal mask": build({"no_causal_mask": True, "pool_type": "last"}),
        "class token": build({"embed_cls": True}),
        "no pre-norm": build(vision={"no_ln_pre": True}),
        "patch dropout": build(vision={"patch_dropout": 0.5}),
    }


@pytest.mark.parametrize("name", strange_models())
def test_towers_that_are_not_plain_run_their_own_forward(name: str) -> None:
    """A model with an extra norm or another pooling gets features of a model without it."""
    model = strange_models()[name]
    pixels, ids = inputs(model)
    with torch.no_grad():
        wanted = features(model, pixels, ids)
        ours = encode(Encoder(as_clip(model)), pixels, ids)
    assert largest(ours, wanted) <= tolerance(wanted)


@pytest.mark.parametrize("base", LAYOUTS, indirect=True)
def test_bf16_stays_close(base: nn.Module) -> None:
    """`--precision amp_bf16` changes what the model says about a picture or a caption."""
    model, _ = adapted(base)
    pixels, ids = ragged(base)
    with torch.no_grad():
        exact = encode(Encoder(as_clip(model)), pixels, ids)
        fast = encode(Encoder(as_clip(model), autocast=True), pixels, ids)
        stored = encode(Encoder(as_clip(copy.deepcopy(model).to(torch.bfloat16))), pixels, ids)
    for one in (fast, stored):
        assert min(F.cosine_similarity(a, b).min() for a, b in zip(one, exact, strict=True)) > 0.995
        assert all(part.dtype == torch.float32 for part in one)


@pytest.mark.parametrize("base", ["tiny_openclip", "tiny_hf"], indirect=True)
def test_gradients_in_bf16_stay_close(base: nn.Module) -> None:
    """Training in bf16 pulls an adapter in another direction than training in fp32."""
    model, _ = adapted(base)
    pixels, ids = ragged(base)
    grads = []
    for autocast in (False, True):
        model.zero_grad()
        loss_of(encode(Encoder(as_clip(model), autocast=autocast), pixels, ids)).backward()
        named = model.named_parameters()
        grads.append(torch.cat([p.grad.flatten() for name, p in named if ".lora_" in f".{name}"]))
    assert F.cosine_similarity(grads[0], grads[1], dim=0) > 0.99


@pytest.mark.parametrize("base", ["tiny_openclip", "tiny_hf"], indirect=True)
def test_gradient_checkpointing_changes_nothing_but_memory(base: nn.Module) -> None:
    """--grad-checkpointing trains another adapter, or forgets the dropout it drew."""
    model, _ = adapted(base, dropout=0.3)
    model.train()
    pixels, ids = ragged(base)
    grads, kernels = [], AttentionKernels()
    for checkpointing in (False, True):
        model.zero_grad()
        torch.manual_seed(5)
        encoder = Encoder(as_clip(model), attention=kernels, grad_checkpointing=checkpointing)
        loss_of(encode(encoder, pixels, ids)).backward()
        grads.append([layer.lora_A.grad.clone() for layer in require_lora(model).layers.values()])
    assert all(torch.equal(a, b) for a, b in zip(*grads, strict=True))


@pytest.mark.parametrize("base", ["tiny_openclip", "tiny_hf"], indirect=True)
def test_nothing_is_kept_below_the_lowest_site(base: nn.Module) -> None:
    """An adapter on the last block costs the memory and the time of one on all blocks."""
    kept = {}
    pixels, ids = ragged(base)
    for targets in ("text.0.*,vision.0.*", "text.1.out,vision.1.out", "text.proj,vision.proj"):
        model, _ = adapted(base, targets)
        total = 0

        def count(tensor: Tensor) -> Tensor:
            nonlocal total
            total += tensor.nbytes
            return tensor

        with torch.autograd.graph.saved_tensors_hooks(count, lambda tensor: tensor):
            encode(Encoder(as_clip(model)), pixels, ids)
        kept[targets] = total
    lowest, last, head = kept.values()
    assert head < last / 2 < lowest / 4


@pytest.mark.parametrize("base", ["tiny_openclip", "tiny_hf"], indirect=True)
def test_frozen_weights_have_no_gradient(base: nn.Module) -> None:
    """LoRA training pays for gradients of the base that it then throws away."""
    model, _ = adapted(base)
    loss_of(encode(Encoder(as_clip(model)), *ragged(base))).backward()
    assert {name for name, p in model.named_parameters() if p.grad is not None} == {
        name for name, _ in model.named_parameters() if ".lora_" in f".{name}"
    }


@pytest.mark.parametrize("base", ["tiny_openclip", "tiny_hf"], indirect=True)
def test_an_encoder_follows_its_model(base: nn.Module) -> None:
    """Features of a model that was trained, switched off or reloaded in between are those from before."""
    model, _ = adapted(base)
    pixels, ids = ragged(base)
    encoder = Encoder(as_clip(model))
    with torch.no_grad():
        adapted_features = encode(encoder, pixels, ids)
        with cg.lora_disabled(model):
            plain = encode(encoder, pixels, ids)
            wanted = features(base, pixels, ids)
        assert largest(plain, wanted) <= tolerance(wanted)
        assert largest(adapted_features, wanted) > 1e-2
        cg.remove_lora(model)
        model.load_state_dict(randomise(copy.deepcopy(base), seed=3).state_dict())
        moved = features(model, pixels, ids)
        assert largest(encode(encoder, pixels, ids), moved) <= tolerance(moved)
        assert largest(moved, wanted) > 1e-2


@pytest.mark.parametrize("base", ["tiny_openclip", "tiny_hf"], indirect=True)
def test_a_base_that_trains_beside_its_adapter(base: nn.Module) -> None:
    """Someone who unfreezes a weight under LoRA gets no gradient for it, or a wrong one."""
    model, _ = adapted(base, "text.*.q,k,v,out,fc1,fc2")
    stock = copy.deepcopy(model)
    pixels, ids = ragged(base)
    for one in (model, stock):
        for name, parameter in one.named_parameters():
            parameter.requires_grad_(".lora_" in f".{name}" or "bias" in name or "weight" in name)
    loss_of(features(stock, pixels, ids)).backward()
    loss_of(encode(Encoder(as_clip(model)), pixels, ids)).backward()
    ours = dict(model.named_parameters())
    for name, parameter in stock.named_parameters():
        if parameter.grad is not None:
            assert largest((ours[name].grad,), (parameter.grad,)) <= tolerance((parameter.grad,)), name
