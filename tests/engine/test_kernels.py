"""The parts of the engine, each against plain torch."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import torch
import torch.nn.functional as F

from clipgraft.engine import attention as kernels
from clipgraft.engine.attention import AttentionKernels, causal_mask, length_mask, sdpa
from clipgraft.engine.attention import products as two_products
from clipgraft.engine.linear import FrozenWeight, masked, packing_works, random_mask


def qkv(length: int = 9, queries: int = 9) -> list[torch.Tensor]:
    generator = torch.Generator().manual_seed(0)
    shapes = ((2, 3, queries, 8), (2, 3, length, 8), (2, 3, length, 8))
    return [torch.randn(shape, generator=generator).requires_grad_() for shape in shapes]


@pytest.mark.parametrize("kernel", [two_products, sdpa])
@pytest.mark.parametrize("case", ["causal", "free", "pooled"])
def test_attention_kernels_compute_attention(kernel: object, case: str) -> None:
    """Which kernel a machine is fast at changes what is trained on it."""
    mask = {"causal": causal_mask(9, torch.device("cpu")), "free": None}.get(case)
    if case == "pooled":
        mask = length_mask(torch.tensor([4, 9]), 9)
    ours, plain = qkv(queries=1 if case == "pooled" else 9), qkv(queries=1 if case == "pooled" else 9)
    out = kernel(*ours, mask)
    scores = plain[0] @ plain[1].mT / 8**0.5 + (0 if mask is None else mask)
    wanted = scores.softmax(-1) @ plain[2]
    torch.testing.assert_close(out, wanted, atol=1e-6, rtol=1e-5)
    weights = torch.randn(out.shape, generator=torch.Generator().manual_seed(1))
    (out * weights).sum().backward()
    (wanted * weights).sum().backward()
    for a, b in zip(ours, plain, strict=True):
        torch.testing.assert_close(a.grad, b.grad, atol=1e-6, rtol=1e-5)


def test_the_faster_kernel_is_chosen_and_kept(monkeypatch: pytest.MonkeyPatch) -> None:
    """A machine runs the slow kernel, or measures again at every step."""
    measured = []
    seconds = iter([3.0, 1.0, 1.0, 3.0])

    def fake(run: object) -> float:
        measured.append(run)
        return next(seconds)

    monkeypatch.setattr(kernels, "best_seconds", fake)
    attention = AttentionKernels()
    q, k, _ = qkv()
    assert attention.choose(q, k, True) == attention.choose(q, k, True) == "sdpa"
    assert attention.choose(q, k, False) == "products"
    assert len(measured) == 4
    assert AttentionKernels().choose(q, k, True) == "sdpa", "the machine knows it by now"
    assert len(measured) == 4


def test_a_damaged_list_of_choices_is_made_anew(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    """A cache folder that was full once would end every run."""
    monkeypatch.setenv("CLIPGRAFT_CACHE", str(tmp_path))
    q, k, _ = qkv()
    for content in ("", "[]", '{"x": 3}'):
        (tmp_path / "kernels.json").write_text(content)
        assert AttentionKernels().choose(q, k, False) in kernels.KERNELS
        assert json.loads((tmp_path / "kernels.json").read_text())
    monkeypatch.setenv("CLIPGRAFT_CACHE", str(tmp_path / "kernels.json"))
    assert AttentionKernels().choose(q, k, False) in kernels.KERNELS


def test_long_sequences_use_the_kernel_without_a_square_in_memory() -> None:
    """A 24×24 patch grid with many heads runs out of memory."""
    q = torch.zeros(1, 1, 577, 4)
    assert AttentionKernels().choose(q, q, True) == "sdpa"


def test_measuring_leaves_the_random_numbers_alone() -> None:
    """Which kernel is measured when decides which dropout is drawn, and no run can be repeated."""
    torch.manual_seed(0)
    wanted = torch.rand(3)
    torch.manual_seed(0)
    q, k, _ = qkv()
    AttentionKernels().choose(q, k, True)
    assert torch.equal(torch.rand(3), wanted)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_dropout_keeps_the_share_it_says(dtype: torch.dtype) -> None:
    """Adapters are trained with another dropout than was asked for, or scaled wrongly."""
    torch.manual_seed(0)
    x = torch.randn(1000, 512).to(dtype)
    mask, kept = random_mask(x, 0.1)
    assert kept == pytest.approx(0.9, abs=1 / 512)
    out = masked(x, mask)
    dropped = out == 0
    assert dropped.float().mean().item() == pytest.approx(1 - kept, abs=2e-3)
    assert torch.equal(out[~dropped], x[~dropped])
    by_column = dropped.float().mean(0)
    assert by_column.min() > 0.05
    assert by_column.max() < 0.16


def test_dropout_follows_the_seed() -> None:
    """A resumed run draws other masks than the run it continues."""
    x = torch.ones(7, 5)
    torch.manual_seed(3)
    first = random_mask(x, 0.5)[0]
    torch.manual_seed(3)
    assert torch.equal(random_mask(x, 0.5)[0], first)
    assert not torch.equal(random_mask(x, 0.5)[0], first)


@pytest.mark.parametrize("packing", [True, False])
def test_frozen_products_are_those_of_the_plain_weight(
    packing: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A torch that cannot pack weights computes something else than one that can."""
    if packing and not packing_works():
        pytest.skip("this torch does not pack bf16 weights")
    monkeypatch.setattr("clipgraft.engine.linear.packing_works", lambda: packing)
    generator = torch.Generator().manual_seed(0)
    weight, bias = torch.randn(48, 32, generator=generator), torch.randn(48, generator=generator)
    x, grad = torch.randn(11, 32, generator=generator), torch.randn(11, 48, generator=generator)
    weight, bias, x, grad = (t.to(torch.bfloat16) for t in (weight, bias, x, grad))
    frozen = FrozenWeight(lambda: list(weight.split([20, 28])), bias.split([20, 28]))
    assert frozen.packs == packing
    exact = F.linear(x.float(), weight.float(), bias.float())
    torch.testing.assert_close(frozen.forward(x).float(), exact, atol=0.1, rtol=0.01)
    torch.testing.assert_close(
        frozen.backward(grad).float(), grad.float() @ weight.float(), atol=0.1, rtol=0.01
    )


def test_several_machines_agree() -> None:
    """Two workers of one run would round their vectors differently, whoever met an image deciding."""
    told: list[tuple[str, str]] = []
    attention = AttentionKernels(lambda key, name: told.append((key, name)) or "sdpa")  # type: ignore[func-returns-value]
    q = torch.zeros(1, 2, 8, 16)
    assert attention.choose(q, q, trains=False) == "sdpa"
    assert attention.choose(q, q, trains=False) == "sdpa"
    assert [name for _, name in told] == ["products"]
    assert list(attention.choices.values()) == ["sdpa"]
