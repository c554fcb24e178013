"""Profile one training step: the model's own forward under autocast, and the engine.

    python -m benchmarks.profile_step

One step is a forward and backward pass of ViT-B-32's text tower with LoRA r=16, dropout 0.1, on 64 captions
of the benchmark's `natural` lengths. Prints the seconds, the share of each kind of operation, and how far the
step is from the speed at which this machine multiplies matrices of its shapes.
"""

from __future__ import annotations

import csv
import functools
import time
from collections import defaultdict
from collections.abc import Callable

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.profiler import ProfilerActivity, profile

import clipgraft as cg
from benchmarks.prepare import OPENCLIP_BASE
from benchmarks.settings import FULL
from clipgraft.engine.encoder import Encoder

_KINDS = {
    "frozen weights": ("mkldnn::_linear_pointwise", "aten::addmm"),
    "other products": ("aten::mm", "aten::addmm_", "aten::bmm"),
    "attention kernel": (
        "aten::_scaled_dot_product_flash_attention_for_cpu",
        "aten::_scaled_dot_product_flash_attention_for_cpu_backward",
        "aten::_softmax",
        "aten::_softmax_backward_data",
    ),
    "dropout": ("aten::bernoulli_", "aten::random_", "aten::bitwise_and", "aten::native_dropout"),
    "norms": ("aten::native_layer_norm", "aten::native_layer_norm_backward"),
    "activation": ("aten::gelu", "aten::gelu_backward", "aten::silu", "aten::silu_backward"),
    "copies and casts": ("aten::copy_", "aten::cat", "aten::index_select", "aten::fill_"),
}
_REPEATS = 12


def main() -> None:
    """Profile both ways and print the tables."""
    clip = cg.load("ViT-B-32", pretrained=OPENCLIP_BASE)
    cg.apply_lora(clip, r=16, alpha=16, dropout=0.1)
    clip.train()
    tokens = clip.tokenize(_captions(64))
    encoder = Encoder(clip, autocast=True)

    def stock(ids: Tensor) -> Tensor:
        with torch.autocast("cpu", torch.bfloat16):
            return clip.encode_text(ids)

    packed = encoder.pack(tokens)
    assert packed is not None
    rows, width = len(tokens), clip.cut_tokens(tokens).shape[1]
    products = 2 * 12 * (12 * 512**2) * 2
    for name, encode, nodes in (
        ("the model's own forward", stock, rows * width),
        ("the engine", encoder.encode_text, len(packed.tokens)),
    ):
        _report(name, functools.partial(_step, encode, tokens), nodes, nodes * products)


def _captions(count: int) -> list[str]:
    with (FULL.data / "natural.csv").open(encoding="utf-8", newline="") as table:
        return [row["caption"] for row in csv.DictReader(table)][:count]


def _step(encode: Callable[[Tensor], Tensor], tokens: Tensor) -> None:
    features = F.normalize(encode(tokens).float(), dim=-1)
    target = torch.linspace(-1, 1, features.numel()).view_as(features)
    (features * target).sum().backward()  # type: ignore[no-untyped-call]


def _report(name: str, step: Callable[[], None], nodes: int, operations: int) -> None:
    seconds = sorted(_timed(step) for _ in range(_REPEATS))
    with profile(activities=[ProfilerActivity.CPU]) as run:
        step()
    totals: dict[str, float] = defaultdict(float)
    kind_of = {op: kind for kind, ops in _KINDS.items() for op in ops}
    for event in run.key_averages():
        totals[kind_of.get(event.key, "everything else")] += event.self_cpu_time_total / 1e6
    whole = sum(totals.values())
    speed = _matmul_speed(nodes)
    median = seconds[len(seconds) // 2]
    print(f"\n{name}: {nodes:,} token states, {1e3 * seconds[0]:.0f} ms best, {1e3 * median:.0f} ms median")
    for kind, total in sorted(totals.items(), key=lambda item: -item[1]):
        print(f"  {kind:<18}{1e3 * total:7.0f} ms {100 * total / whole:5.1f} %")
    floor = operations / speed
    print(
        f"  frozen weights alone: {operations / 1e9:.0f} GFLOP at the measured {speed / 1e9:.0f} GFLOP/s "
        f"are {1e3 * floor:.0f} ms: the step takes {seconds[0] / floor:.1f} times that"
    )


def _timed(step: Callable[[], object]) -> float:
    started = time.perf_counter()
    step()
    return time.perf_counter() - started


def _matmul_speed(rows: int) -> float:
    """Return bf16 operations a second of the largest product of a block."""
    x = torch.randn(rows, 512).bfloat16()
    weights = [torch.randn(2048, 512).bfloat16() for _ in range(12)]
    best = min(_timed(lambda: [F.linear(x, weight) for weight in weights]) for _ in range(8))
    return 12 * 2 * rows * 512 * 2048 / best


if __name__ == "__main__":
    main()
