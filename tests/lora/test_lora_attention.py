"""Attention with updates, called in every way torch's and open_clip's own attention can be called."""

from __future__ import annotations

import copy
from concurrent.futures import ThreadPoolExecutor
from typing import Any

import open_clip
import pytest
import torch
from torch import Tensor, nn

import clipgraft as cg
from clipgraft.lora.state import require_lora
from explicit_lora import explicit_model, features, inputs, largest, randomise_lora
from tiny_models import TINY_OPENCLIP, randomise


def attention_pair(base: nn.Module, **options: object) -> tuple[nn.Module, nn.Module]:
    """The first text attention of an adapted model, and of its explicit counterpart."""
    model = copy.deepcopy(base)
    cg.apply_lora(model, r=3, targets="text.0.*", **options)
    explicit = explicit_model(base, randomise_lora(model))
    return model.transformer.resblocks[0].attn, explicit.transformer.resblocks[0].attn


def causal(length: int) -> Tensor:
    return torch.full((length, length), float("-inf")).triu(1)


HIDDEN = torch.tensor([[False] * 6, [False] * 4 + [True] * 2, [False] * 5 + [True]])
CALLS: dict[str, dict[str, Any]] = {
    "no mask": {},
    "additive mask": {"attn_mask": causal(6)},
    "boolean mask": {"attn_mask": causal(6).isinf()},
    "mask per head": {"attn_mask": causal(6).expand(6, -1, -1)},
    "padding": {"key_padding_mask": HIDDEN},
    "padding and mask": {"key_padding_mask": HIDDEN, "attn_mask": causal(6).isinf()},
    "weights": {"need_weights": True},
    "weights per head": {"need_weights": True, "average_attn_weights": False, "attn_mask": causal(6)},
    "causal hint": {"attn_mask": causal(6), "is_causal": True},
}


@pytest.mark.parametrize("call", CALLS)
@pytest.mark.parametrize("train", [False, True])
@pytest.mark.parametrize("grad", [False, True])
@pytest.mark.parametrize("batch_first", [False, True])
def test_every_call_of_multihead_attention(
    tiny_openclip: nn.Module, call: str, train: bool, grad: bool, batch_first: bool
) -> None:
    """A tower that passes padding masks or asks for attention maps silently runs without its adapter."""
    ours, explicit = attention_pair(tiny_openclip)
    torch.manual_seed(0)
    x = torch.randn(3, 6, 32) if batch_first else torch.randn(6, 3, 32)
    for module in (ours, explicit):
        module.train(train)
        module.batch_first = batch_first
    options = {"need_weights": False, **CALLS[call]}
    with torch.set_grad_enabled(grad):
        got, wanted = ours(x, x, x, **options), explicit(x, x, x, **options)
    assert torch.allclose(got[0], wanted[0], atol=5e-6)
    assert (got[1] is None) == (wanted[1] is None)
    if wanted[1] is not None:
        assert got[1].shape == wanted[1].shape
        assert torch.allclose(got[1], wanted[1], atol=5e-6)
    if grad:
        (got[0] ** 2).mean().backward()
        assert ours.lora_q.current.lora_A.grad.any()
        assert ours.lora_out.current.lora_B.grad.any()


@pytest.mark.parametrize("grad", [False, True])
def test_cross_attention_and_single_sequences(tiny_openclip: nn.Module, grad: bool) -> None:
    """An attention pooler or an unbatched call runs without its adapter."""
    ours, explicit = attention_pair(tiny_openclip)
    query, key, value = torch.randn(3, 2, 32), torch.randn(3, 6, 32), torch.randn(3, 6, 32)
    with torch.set_grad_enabled(grad):
        for arguments in ((query, key, value), (key, key, value), (key[0], key[0], key[0])):
            got, wanted = (module(*arguments, need_weights=False)[0] for module in (ours, explicit))
            assert torch.allclose(got, wanted, atol=5e-6)


@pytest.mark.parametrize("grad", [False, True])
def test_attention_without_biases(grad: bool) -> None:
    """A base whose attention has no biases cannot be adapted."""
    from clipgraft.lora.attention import graft_attention
    from clipgraft.lora.layers import AdapterSlot
    from clipgraft.lora.variants import PlainLora
    from clipgraft.models.sites import Site, SiteRef

    stock = nn.MultiheadAttention(16, 2, bias=False, batch_first=True).eval()
    ours, explicit = copy.deepcopy(stock), copy.deepcopy(stock)
    graft_attention(ours)
    ref = SiteRef(Site("text", 0, "k"), "", "in_proj_weight", "fused", (16, 16), slice(16, 32))
    layer, ours.lora_k = PlainLora(ref, 2, 3.0), AdapterSlot()
    ours.lora_k.put("default", layer)
    ours.lora_k.active = "default"
    layer.lora_B.data.normal_()
    with torch.no_grad():
        explicit.in_proj_weight[16:32] += 1.5 * layer.lora_B @ layer.lora_A
    x = torch.randn(2, 5, 16)
    with torch.set_grad_enabled(grad):
        got, wanted = (module(x, x, x, need_weights=False)[0] for module in (ours, explicit))
    assert torch.allclose(got, wanted, atol=5e-6)


def test_a_small_update_survives_bf16_weights() -> None:
    """On a bf16 base, an update finer than bf16 can hold is lost in use although it was trained."""
    torch.manual_seed(0)
    base = randomise(open_clip.CLIP(**copy.deepcopy(TINY_OPENCLIP))).eval().bfloat16()
    model = copy.deepcopy(base)
    cg.apply_lora(model, r=1, alpha=1, targets="vision.0.v")
    layer = require_lora(model).layers[cg.models.Site.parse("vision.0.v")]
    weight = base.visual.transformer.resblocks[0].attn.in_proj_weight.detach()[64:].float()
    u, _, v = torch.linalg.svd(weight, full_matrices=False)
    layer.lora_B.data.copy_(u[:, :1] * weight.std() * 2**-4)
    layer.lora_A.data.copy_(v[:1])
    attention = model.visual.transformer.resblocks[0].attn
    x = (v[:1] * 4).expand(2, 17, -1).bfloat16()  # the input that the update is about
    calls: list[Tensor] = []
    with torch.no_grad():
        calls.append(attention(x, x, x, need_weights=False)[0].float())
        with cg.lora_disabled(model):
            calls.append(attention(x, x, x, need_weights=False)[0].float())
        exact = copy.deepcopy(base).float().visual.transformer.resblocks[0].attn
        delta = 4 * layer.lora_B[:, 0] @ exact.out_proj.weight.T
    found = (calls[0] - calls[1]).mean((0, 1))
    assert torch.cosine_similarity(found, delta, dim=0) > 0.9
    assert 0.5 < found.norm() / delta.norm() < 2


@pytest.mark.parametrize("layout", ["tiny_openclip", "tiny_openclip_4x", "tiny_hf"])
def test_two_threads_at_once(layout: str, request: pytest.FixtureRequest) -> None:
    """A server with two threads mixes up the weights of two requests."""
    base = request.getfixturevalue(layout)
    model = copy.deepcopy(base)
    cg.apply_lora(model, r=3, targets="all")
    randomise_lora(model)
    batches = [inputs(model, batch=2, seed=seed) for seed in range(4)]

    def encode(batch: tuple[Tensor, Tensor]) -> tuple[Tensor, Tensor]:
        with torch.no_grad():
            return features(model, *batch)

    alone = [encode(batch) for batch in batches]
    with ThreadPoolExecutor(2) as pool:
        together = list(pool.map(encode, batches * 4))
    assert all(largest(got, alone[i % 4]) == 0 for i, got in enumerate(together))


@pytest.mark.parametrize("layout", ["tiny_openclip", "tiny_openclip_4x", "tiny_hf"])
def test_forward_never_writes_weights(layout: str, request: pytest.FixtureRequest) -> None:
    """A base in bf16 drifts with every forward, as with adapters that are folded in and out again."""
    model = request.getfixturevalue(layout)
    cg.apply_lora(model, r=3, targets="all")
    randomise_lora(model)
    before = {name: (p._version, p.detach().clone()) for name, p in model.named_parameters()}
    for train in (False, True):
        for grad in (False, True):
            with torch.set_grad_enabled(grad):
                features(model.train(train), *inputs(model))
    for name, p in model.named_parameters():
        assert p._version == before[name][0], name
        assert torch.equal(p, before[name][1]), name


@pytest.mark.parametrize("block", [{"qk_norm": True}, {"scale_heads": True}, {"scale_attn_inner": True}])
def test_open_clip_3_own_attention(block: dict[str, bool]) -> None:
    """open_clip 3.3's normalised attention blocks (qk_norm, …) run without their adapter, or fail."""
    torch.manual_seed(0)
    config = copy.deepcopy(TINY_OPENCLIP)
    config["text_cfg"].update(block)
    config["vision_cfg"].update(block)
    base = randomise(open_clip.CLIP(**config)).eval()
    adapted = copy.deepcopy(base)
    assert cg.apply_lora(adapted, r=3, targets="linear") == 2 * 2 * 6 + 2
    pixels, ids = inputs(base)
    assert largest(features(adapted, pixels, ids), features(base, pixels, ids)) == 0
    wanted = features(explicit_model(base, randomise_lora(adapted)), pixels, ids)
    for train in (False, True):
        got = features(adapted.train(train), pixels, ids)
        assert largest(got, wanted) < 1e-4


def test_boolean_masks_mean_what_each_release_means(tiny_openclip_4x: nn.Module) -> None:
    """open_clip 3 hides where a mask is True, 4 attends there: adapted blocks read it the wrong way round."""
    seen = ~causal(6).isinf()
    x = torch.randn(3, 6, 32)
    ours, explicit = attention_pair(tiny_openclip_4x)
    assert torch.allclose(ours(x, attn_mask=seen), explicit(x, attn_mask=seen), atol=5e-6)
    config = copy.deepcopy(TINY_OPENCLIP)
    config["text_cfg"].update(qk_norm=True)
    ours, explicit = attention_pair(randomise(open_clip.CLIP(**config)).eval())
    assert torch.allclose(ours(x, attn_mask=~seen), explicit(x, attn_mask=~seen), atol=5e-6)


def test_open_clip_4_cross_attention(tiny_openclip_4x: nn.Module) -> None:
    """4.x passes key and value apart from the query: an adapted block reads all three from the query."""
    ours, explicit = attention_pair(tiny_openclip_4x)
    query, key, value = torch.randn(3, 2, 32), torch.randn(3, 6, 32), torch.randn(3, 6, 32)
    assert torch.allclose(ours(query, key, value), explicit(query, key, value), atol=5e-6)


def test_other_uses_of_a_raw_projection_are_refused(tiny_openclip: nn.Module) -> None:
    """A model that uses its projection in another way than `x @ proj` silently loses its update."""
    cg.apply_lora(tiny_openclip, targets="projection")
    with pytest.raises(NotImplementedError, match="leave proj out of the targets"):
        torch.sum(tiny_openclip.visual.proj)
