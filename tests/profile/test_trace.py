"""What tracing says a model costs, against torch's FlopCounterMode around real passes and closed formulas."""

from __future__ import annotations

import copy
from collections.abc import Callable
from typing import Any

import open_clip
import pytest
import torch
import torch.nn.functional as F
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor, nn
from torch.utils._python_dispatch import TorchDispatchMode
from transformers import CLIPConfig, CLIPModel

import clipgraft as cg
from clipgraft.models.clip import as_clip
from clipgraft.models.sites import TOWERS, Tower
from clipgraft.profile.ops import price
from clipgraft.profile.trace import Trace, join, trace
from flop_counting import attention_backward_flops, attention_flops, counted, flop_counter, slow_path
from tiny_models import EOS_ID


def full_size(kind: str) -> nn.Module:
    with torch.device("meta"):
        if kind == "open_clip":
            return open_clip.CLIP(**open_clip.get_model_config("ViT-B-32")).eval()
        model: nn.Module = CLIPModel._from_config(CLIPConfig(), attn_implementation=kind)
        return model.eval()


@pytest.mark.parametrize("kind", ["open_clip", "sdpa", "eager"])
def test_multiply_adds_of_vit_b_32(kind: str) -> None:
    """`clipgraft profile` reports other multiply-adds than torch counts on the model itself."""
    clip = as_clip(full_size(kind))
    images = torch.empty(2, 3, 224, 224, device="meta")
    tokens = torch.empty(2, 77, dtype=torch.int64, device="meta")
    encode: dict[Any, Tensor] = {clip.family.encode_image: images, clip.family.encode_text: tokens}
    for run, inputs in encode.items():
        found = trace(clip.model, inputs, call=run)
        assert found.total.macs == counted(lambda run=run, inputs=inputs: run(clip.model, inputs))
        assert found.unpriced == ()
    # Patches, then blocks of 12·d² a token and 2·L²·d for attention, then the projection.
    d, length = 768, 50
    blocks = 12 * (12 * d * d * length + 2 * length * length * d)
    vision = trace(clip.model, images, call=clip.family.encode_image)
    assert vision.total.macs == 2 * (49 * 3 * 32 * 32 * d + blocks + d * 512)
    d, length = 512, 77
    blocks = 12 * (12 * d * d * length + 2 * length * length * d)
    text = trace(clip.model, tokens, call=clip.family.encode_text)
    assert text.total.macs == 2 * (blocks + d * 512)


@pytest.mark.parametrize("kind", ["open_clip", "sdpa", "eager"])
def test_other_operations_of_vit_b_32(kind: str) -> None:
    """The figures of one model change with the version of torch or transformers that profiles it."""
    clip = as_clip(full_size(kind))
    # OpenAI's QuickGELU is 6 a number, GELU 5; transformers norms the pooled token alone, open_clip all.
    activation, normed = (5, 50) if kind == "open_clip" else (6, 1)

    def closed(width: int, length: int, heads: int, per_score: int) -> int:
        # Two norms, the biases of q, k, v and out, both sums; the MLP's biases and activation; positions.
        numbers = 2 * 7 + 4 + 2 + 4 + 1 + 4 * activation
        return 12 * (numbers * width * length + per_score * heads * length**2) + width * length

    vision = trace(clip.model, torch.empty(1, 3, 224, 224, device="meta"), call=clip.family.encode_image)
    other = vision.total.flops - 2 * vision.total.macs
    assert other == closed(768, 50, 12, per_score=6) + 7 * 768 * (50 + normed)
    tokens = torch.empty(1, 77, dtype=torch.int64, device="meta")
    text = trace(clip.model, tokens, call=clip.family.encode_text)
    assert text.total.flops - 2 * text.total.macs == closed(512, 77, 8, per_score=7) + 7 * 512 * 77


@pytest.mark.parametrize("causal", [False, True])
def test_attention_on_cpu(causal: bool) -> None:
    """Attention costs nothing, or half, in a pass that really runs."""
    query, key, value = (torch.randn(2, 3, length, 8, requires_grad=True) for length in (5, 5, 5))
    with flop_counter() as counter:
        out = F.scaled_dot_product_attention(query, key, value, is_causal=causal)
        forward = counter.get_total_flops()
        out.sum().backward()  # type: ignore[no-untyped-call]
    shapes = (query.shape, key.shape, value.shape)
    assert forward == attention_flops(*shapes) == 2 * 2 * (2 * 3 * 5 * 5 * 8)
    assert counter.get_total_flops() - forward == attention_backward_flops(out.shape, *shapes)
    assert attention_backward_flops(out.shape, *shapes) == forward * 5 // 2
    assert 2 * trace(Attend(causal), query, key, value).total.macs == forward


class Attend(nn.Module):
    """Attention alone."""

    def __init__(self, causal: bool) -> None:
        super().__init__()
        self.causal = causal

    def forward(self, query: Tensor, key: Tensor, value: Tensor) -> Tensor:
        return F.scaled_dot_product_attention(query, key, value, is_causal=self.causal)


ADAPTERS: list[dict[str, Any]] = [
    {},
    {"targets": "text-attention"},
    {"targets": "all"},
    {"targets": "vision.1.q+v"},
    {"targets": "embedding"},
    {"targets": "linear", "use_dora": True},
    {"targets": "linear", "init": "pissa"},
    {"targets": "mlp", "bias": "all"},
]


def real_pass(model: nn.Module, run: Callable[[nn.Module, Tensor], Tensor], inputs: Tensor) -> list[int]:
    """Multiply-adds forward and backward, and bytes kept in between, of a real pass of a real model."""
    saved: list[Tensor] = []

    def keep(tensor: Tensor) -> Tensor:
        saved.append(tensor)
        return tensor

    with slow_path(), flop_counter() as counter:
        with torch.autograd.graph.saved_tensors_hooks(keep, lambda tensor: tensor):
            features = run(model, inputs)
        forward = counter.get_total_flops() // 2
        if features.requires_grad:
            features.sum().backward()  # type: ignore[no-untyped-call]
    mine = {t.data_ptr() for t in (*model.parameters(), inputs)}
    storages = {t.untyped_storage().data_ptr(): t.untyped_storage().nbytes() for t in saved}
    kept = sum(size for pointer, size in storages.items() if pointer not in mine)
    return [forward, counter.get_total_flops() // 2 - forward, kept]


@pytest.mark.parametrize("family", ["tiny_openclip", "tiny_openclip_4x", "tiny_hf"])
@pytest.mark.parametrize(
    "adapter", ADAPTERS, ids=lambda adapter: "-".join(map(str, adapter.values())) or "full"
)
def test_a_real_training_pass(family: str, adapter: dict[str, Any], request: pytest.FixtureRequest) -> None:
    """Costs or memory of training differ from those of the training that a user then runs."""
    clip = as_clip(request.getfixturevalue(family))
    if adapter:
        cg.apply_lora(clip, r=4, **adapter)
    clip.eval()
    tokens = torch.randint(1, 90, (3, clip.context_length))
    tokens[:, 5] = EOS_ID
    encoders: dict[Tower, tuple[Any, Tensor]] = {
        "text": (clip.family.encode_text, tokens),
        "vision": (clip.family.encode_image, torch.randn(3, 3, 32, 32)),
    }
    for tower in TOWERS:
        run, inputs = encoders[tower]
        found = trace(clip.model, inputs, call=run)
        expected = real_pass(clip.model, run, inputs)
        assert [found.total.macs, found.total.backward_macs, found.saved_bytes] == expected, tower


def test_the_model_stays_as_it_is(tiny_openclip: nn.Module) -> None:
    """Profiling a model that is in use moves, freezes or hooks it, or leaves torch's settings changed."""
    tiny_openclip.train()
    attention, before = F.scaled_dot_product_attention, copy.deepcopy(tiny_openclip.state_dict())
    trace(tiny_openclip, torch.zeros(1, 3, 32, 32), torch.zeros(1, 77, dtype=torch.int64))
    with pytest.raises(RuntimeError):
        trace(tiny_openclip, torch.zeros(1, 4, 32, 32))
    assert F.scaled_dot_product_attention is attention
    assert torch.backends.mha.get_fastpath_enabled()
    assert tiny_openclip.training
    assert all(not m._forward_hooks and not m._forward_pre_hooks for m in tiny_openclip.modules())
    after = tiny_openclip.state_dict()
    assert all(torch.equal(after[name], tensor) for name, tensor in before.items())


class Twice(nn.Module):
    """Calls one layer twice, by two names, and multiplies by a Parameter of its own."""

    def __init__(self) -> None:
        super().__init__()
        self.first = nn.Linear(4, 4, bias=False)
        self.again = self.first
        self.proj = nn.Parameter(torch.zeros(4, 2))

    def forward(self, x: Tensor) -> Tensor:
        return self.again(self.first(x)) @ self.proj


def test_shared_modules_and_raw_parameters() -> None:
    """Shared weights are counted twice, or products with a bare Parameter not at all."""
    found = trace(Twice(), torch.zeros(3, 4))
    assert found.total.parameters == 16 + 8
    assert found.total.own_parameters == 8
    assert (found.layer("first").calls, found.layer("first").macs) == (2, 2 * 3 * 16)
    assert (found.total.own_macs, found.total.macs) == (3 * 8, 2 * 3 * 16 + 3 * 8)
    assert {p.weight for p in found.products} == {"first.weight", "proj"}
    assert found.total.input_shape == (3, 4)
    assert found.total.output_shape == (3, 2)


def test_parts_add_up_to_the_whole(tiny_hf: nn.Module) -> None:
    """Shares in the report do not add up to 100 %."""
    images, tokens = torch.zeros(2, 3, 32, 32), torch.zeros(2, 16, dtype=torch.int64)
    found = trace(tiny_hf, input_ids=tokens, pixel_values=images)
    assert found.total.macs == sum(layer.own_macs for layer in found.layers)
    assert found.total.flops == sum(layer.own_flops for layer in found.layers)
    assert found.total.parameters == sum(layer.own_parameters for layer in found.layers)
    assert found.total.macs == sum(product.macs for product in found.products)
    inside = [layer.macs for layer in found.layers if layer.depth == 1]
    assert found.total.macs == sum(inside) + found.total.own_macs
    assert found.input_bytes == images.numel() * 4 + tokens.numel() * 8


def test_traces_join(tiny_hf: nn.Module) -> None:
    """Two towers traced apart cost something else together than one call of both."""
    images, tokens = torch.zeros(2, 3, 32, 32), torch.zeros(2, 16, dtype=torch.int64)
    text = trace(tiny_hf, tokens, call=lambda model, x: model.get_text_features(input_ids=x))
    vision = trace(tiny_hf, images, call=lambda model, x: model.get_image_features(pixel_values=x))
    both = join(text, vision)
    whole = trace(tiny_hf, input_ids=tokens, pixel_values=images)
    logits = 2 * 2 * 24
    assert both.total.macs == whole.total.macs - logits
    shown = {layer.path: (layer.macs, layer.input_shape, layer.output_shape) for layer in whole.layers[1:]}
    assert {
        layer.path: (layer.macs, layer.input_shape, layer.output_shape) for layer in both.layers[1:]
    } == shown
    assert both.input_bytes == whole.input_bytes
    with pytest.raises(ValueError, match=r"two models|longer|shorter"):
        join(text, trace(nn.Linear(2, 2), torch.zeros(1, 2)))


def flops(module: nn.Module, *inputs: Tensor) -> tuple[int, int]:
    found: Trace = trace(module, *inputs)
    assert found.unpriced == ()
    return found.total.macs, found.total.flops - 2 * found.total.macs


@given(st.integers(1, 9), st.integers(1, 9), st.integers(1, 9), st.booleans())
@settings(max_examples=20)
def test_linear(rows: int, inner: int, outer: int, bias: bool) -> None:
    """A Linear's cost is not rows·in·out and one addition for each bias."""
    assert flops(nn.Linear(inner, outer, bias=bias), torch.zeros(rows, inner)) == (
        rows * inner * outer,
        rows * outer * bias,
    )


@given(
    st.integers(1, 4),
    st.integers(1, 4),
    st.integers(1, 3),
    st.integers(1, 3),
    st.integers(1, 2),
    st.booleans(),
)
@settings(max_examples=20)
def test_convolution(rows: int, half: int, kernel: int, stride: int, groups: int, bias: bool) -> None:
    """A Conv2d's cost is not the number of its outputs times what each of them reads."""
    size = 7
    conv = nn.Conv2d(2 * half, 4, kernel, stride, groups=groups, bias=bias)
    outputs = rows * 4 * ((size - kernel) // stride + 1) ** 2
    expected = (outputs * kernel * kernel * 2 * half // groups, outputs * bias)
    assert flops(conv, torch.zeros(rows, 2 * half, size, size)) == expected


@pytest.mark.parametrize(
    ("module", "each"),
    [
        (nn.LayerNorm(8), 7),
        (nn.LayerNorm(8, bias=False), 6),
        (nn.LayerNorm(8, elementwise_affine=False), 5),
        (nn.Softmax(-1), 5),
        (nn.GELU(), 5),
        (nn.GELU("tanh"), 9),
        (nn.SiLU(), 5),
        (nn.Sigmoid(), 4),
        (nn.Tanh(), 1),
        (nn.ReLU(), 1),
        (open_clip.transformer.QuickGELU(), 6),
        (nn.Dropout(0.5), 0),
        (nn.Flatten(), 0),
    ],
    ids=str,
)
def test_the_table_of_formulas(module: nn.Module, each: int) -> None:
    """Operations outside of products are counted by other formulas than documented."""
    assert flops(module, torch.zeros(3, 8)) == (0, 3 * 8 * each)


def test_norms_of_llama_and_lookups() -> None:
    """An RMSNorm costs a thousand times what it does, as in some reports, or a lookup costs anything."""
    from transformers.models.llama.modeling_llama import LlamaRMSNorm

    # Square, mean, scale, weight of each element; epsilon and root of each row.
    assert flops(LlamaRMSNorm(64), torch.zeros(3, 64)) == (0, 3 * 64 * 4 + 2 * 3)
    assert flops(nn.Embedding(5, 64), torch.zeros(3, dtype=torch.int64)) == (0, 0)


class Recorder(TorchDispatchMode):  # type: ignore[no-untyped-call]
    def __init__(self) -> None:
        super().__init__()  # type: ignore[no-untyped-call]
        self.macs: dict[str, int] = {}

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        out = func(*args, **(kwargs or {}))
        if macs := price(func, args, kwargs or {}, out).macs:
            name = str(func.overloadpacket).removeprefix("aten.")
            self.macs[name] = self.macs.get(name, 0) + macs
        return out


def test_attention_costs_the_same_in_every_kernel() -> None:
    """Attention is missed, or counted differently, where another of torch's kernels runs it."""
    rows, heads, length, dim = 2, 2, 5, 8
    q = torch.randn(rows, heads, length, dim)
    expected = 2 * rows * heads * length * length * dim
    for backend in (torch.nn.attention.SDPBackend.MATH, torch.nn.attention.SDPBackend.FLASH_ATTENTION):
        with torch.nn.attention.sdpa_kernel(backend), Recorder() as recorder:
            F.scaled_dot_product_attention(q, q, q)
        assert sum(recorder.macs.values()) == expected
    with Recorder() as recorder:
        _ = (q @ q.transpose(-1, -2)).softmax(-1) @ q
    assert sum(recorder.macs.values()) == expected
    meta = q.to("meta")
    for name in ("flash_attention", "efficient_attention"):
        operator = getattr(torch.ops.aten, f"_scaled_dot_product_{name}").default
        extra = (None, False) if name.startswith("efficient") else ()
        assert price(operator, (meta, meta, meta, *extra), {}, meta).macs == expected


def test_the_fast_path_of_multihead_attention() -> None:
    """open_clip models in eval mode appear to have no attention, as other profilers report."""
    attention = nn.MultiheadAttention(16, 4, batch_first=True).eval()
    x = torch.randn(2, 5, 16)
    expected = 2 * 5 * 4 * 16 * 16 + 2 * 2 * 5 * 5 * 16
    with torch.no_grad(), Recorder() as recorder:
        attention(x, x, x, need_weights=False)
    assert recorder.macs == {"_native_multi_head_attention": expected}
    assert trace(attention, x, x, x, need_weights=False).total.macs == expected


def test_unknown_operators_are_named() -> None:
    """A model with an operator that has no formula is reported as cheaper than it is, without a word."""

    class Odd(nn.Module):
        def forward(self, x: Tensor) -> Tensor:
            return torch.linalg.qr(x)[0]

    assert trace(Odd(), torch.zeros(3, 3)).unpriced == ("aten.linalg_qr",)


def test_calflops_agrees_on_linear_and_conv() -> None:
    """Reports differ from calflops where that one is right."""
    calflops = pytest.importorskip("calflops")
    model = nn.Sequential(nn.Conv2d(3, 8, 4, 4), nn.Flatten(), nn.Linear(8 * 16, 24))
    _, macs, parameters = calflops.calculate_flops(
        model, input_shape=(1, 3, 16, 16), print_results=False, output_as_string=False
    )
    found = trace(model, torch.zeros(1, 3, 16, 16))
    assert (found.total.macs, found.total.parameters) == (macs, parameters)
