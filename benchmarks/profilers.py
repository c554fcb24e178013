"""`python -m benchmarks.profilers`: what clipgraft and other profilers count for the same models.

The others run the model; ours reads its shapes. All weights are random. One image, one text of full length.
"""

from __future__ import annotations

import argparse
import contextlib
import io
import sys
import time
import warnings
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils.flop_counter import FlopCounterMode

from benchmarks.environment import describe
from benchmarks.report import Table, machine, markdown_table
from clipgraft.lora.inject import apply_lora
from clipgraft.models.clip import as_clip
from clipgraft.profile.forward import costs


@dataclass(frozen=True)
class Subject:
    """A model on the CPU, and the inputs of its forward by argument name."""

    name: str
    model: nn.Module
    inputs: dict[str, Tensor]

    def run(self) -> None:
        """Profile both towers, and each tower alone."""
        clip = as_clip(self.model)
        images, texts = self.inputs.values() if "image" in self.inputs else reversed(self.inputs.values())
        clip.family.encode_image(self.model, images)
        clip.family.encode_text(self.model, texts)


@dataclass(frozen=True)
class Count:
    """What a profiler reports; None where it reports nothing."""

    parameters: int | None
    macs: float | None
    flops: float | None = None


def main(argv: Sequence[str] | None = None) -> int:
    """Print the table, and write it to `--out`."""
    parser = argparse.ArgumentParser(prog="python -m benchmarks.profilers", description=__doc__)
    parser.add_argument("--tiny", action="store_true", help="two blocks a tower, to try the tools")
    parser.add_argument("--out", type=Path, help="write the page there")
    arguments = parser.parse_args(argv)
    rows = [
        row for make in (open_clip_base, transformers_large, adapted) for row in rows_of(make(arguments.tiny))
    ]
    header = ("model", "profiler", "params", "GMACs", "of ours", "GFLOPs", "seconds")
    page = f"# Profilers side by side\n\n{_ABOUT}\n\n{markdown_table(Table(header, tuple(rows)))}\n\n{_WHY}\n"
    environment = {**describe(), "threads": torch.get_num_threads()}
    page += f"\n{machine(environment)}\n"
    print(page)
    if arguments.out is not None:
        arguments.out.write_text(page, encoding="utf-8")
    return 0


_ABOUT = (
    "One image and one text of full length through both towers, random weights, nothing trained; with the "
    "adapter (LoRA r=16 on all attention and MLP weights) its products as in training. "
    "MACs: multiply-adds of products."
)
_WHY = """What differs, and why:

- calflops does not see scaled-dot-product attention: its two products are missing, in both libraries;
  on open_clip also the last projections, which are products with raw parameters.
- fvcore misses them too, and adds norms to the multiply-adds.
- torchinfo counts modules, each by its weights: `nn.MultiheadAttention` and products with raw parameters are
  0, an embedding costs as much as a product with its whole table, and attention is nothing.
- torch's `FlopCounterMode` agrees to the last multiply-add, except on the fast path that
  `nn.MultiheadAttention` takes where no gradient is wanted: a single operator without a formula. Without
  gradients an adapter may also run as one folded product, where that is less work.
- FLOPs beyond 2·MACs are biases, norms, activations and softmax, by the formulas in
  `clipgraft/profile/ops.py`; calflops counts a few of them, at other prices."""


def open_clip_base(tiny: bool) -> Subject:
    import open_clip

    config = open_clip.get_model_config("ViT-B-32")
    assert config is not None
    if tiny:
        config["vision_cfg"]["layers"] = config["text_cfg"]["layers"] = 2
    model = open_clip.CLIP(**config).eval()
    return Subject("ViT-B-32, open_clip", model, {"image": torch.zeros(1, 3, 224, 224), "text": _text(49407)})


def transformers_large(tiny: bool) -> Subject:
    from transformers import CLIPConfig, CLIPModel

    text = {"hidden_size": 768, "intermediate_size": 3072, "num_hidden_layers": 12, "num_attention_heads": 12}
    vision = {
        **{
            "hidden_size": 1024,
            "intermediate_size": 4096,
            "num_hidden_layers": 24,
            "num_attention_heads": 16,
        },
        **{"image_size": 336, "patch_size": 14},
    }
    if tiny:
        text["num_hidden_layers"] = vision["num_hidden_layers"] = 2
    model = CLIPModel(CLIPConfig(text_config=text, vision_config=vision, projection_dim=768)).eval()
    inputs = {"input_ids": _text(49407), "pixel_values": torch.zeros(1, 3, 336, 336)}
    return Subject("ViT-L/14-336, transformers", model, inputs)


def adapted(tiny: bool) -> Subject:
    base = open_clip_base(tiny)
    apply_lora(base.model, r=16, targets="attention,mlp")
    return Subject("ViT-B-32, open_clip, LoRA r=16", base.model, base.inputs)


def _text(end: int) -> Tensor:
    """Make the longest possible text."""
    tokens = torch.full((1, 77), 320)
    tokens[0, 0], tokens[0, -1] = end - 1, end
    return tokens


def by_us(subject: Subject) -> Count:
    profile = costs(subject.model)
    return Count(profile.parameters, profile.macs, profile.flops)


def by_flop_counter(subject: Subject) -> Count:
    with FlopCounterMode(display=False) as counter:
        subject.run()
    return Count(None, counter.get_total_flops() / 2, counter.get_total_flops())


def by_flop_counter_in_inference(subject: Subject) -> Count:
    with torch.no_grad():
        return by_flop_counter(subject)


def by_calflops(subject: Subject) -> Count:
    from calflops import calculate_flops

    flops, macs, parameters = calculate_flops(
        subject.model, kwargs=dict(subject.inputs), print_results=False, output_as_string=False
    )
    return Count(int(parameters), float(macs), float(flops))


def by_fvcore(subject: Subject) -> Count:
    from fvcore.nn import FlopCountAnalysis

    names = ("image", "text") if "image" in subject.inputs else ("input_ids", "pixel_values")
    analysis = FlopCountAnalysis(subject.model, tuple(subject.inputs[name] for name in names))
    analysis.unsupported_ops_warnings(False).uncalled_modules_warnings(False)
    return Count(None, float(analysis.total()))


def by_torchinfo(subject: Subject) -> Count:
    from torchinfo import summary

    found = summary(subject.model, input_data=dict(subject.inputs), verbose=0)
    return Count(found.total_params, found.total_mult_adds)


PROFILERS: dict[str, Callable[[Subject], Count]] = {
    "clipgraft": by_us,
    "FlopCounterMode": by_flop_counter,
    "FlopCounterMode, no_grad": by_flop_counter_in_inference,
    "fvcore": by_fvcore,
    "torchinfo": by_torchinfo,
    # Last: it leaves torch's functions patched where a model fails.
    "calflops": by_calflops,
}


def rows_of(subject: Subject) -> Iterator[tuple[str, ...]]:
    """Make one row for each profiler; one that fails says why."""
    ours = by_us(subject).macs
    for name, count in PROFILERS.items():
        started = time.perf_counter()
        try:
            with _quiet():
                found = count(subject)
        except Exception as error:
            yield subject.name, name, "", f"fails: {type(error).__name__}", "", "", ""
            continue
        seconds = time.perf_counter() - started
        yield (subject.name, name, *_numbers(found, ours), f"{seconds:.1f}")


def _numbers(found: Count, ours: Any) -> tuple[str, ...]:
    return (
        "" if found.parameters is None else f"{found.parameters:,}",
        "" if found.macs is None else f"{found.macs / 1e9:.3f}",
        "" if found.macs is None else f"{found.macs / ours:.4f}",
        "" if found.flops is None else f"{found.flops / 1e9:.3f}",
    )


@contextlib.contextmanager
def _quiet() -> Iterator[None]:
    with warnings.catch_warnings(), contextlib.redirect_stdout(io.StringIO()):
        warnings.simplefilter("ignore")
        yield


if __name__ == "__main__":
    sys.exit(main())
