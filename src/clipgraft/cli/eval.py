"""`clipgraft eval`."""

from __future__ import annotations

import logging
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any, TypeVar

from clipgraft.cli.parser import parse
from clipgraft.cli.train import class_faults
from clipgraft.config import ClassSpec, DataSpec, EvalSpec, ModelSpec, Spec
from clipgraft.errors import ConfigError

if TYPE_CHECKING:
    from torch import Tensor

    from clipgraft.data.pairs import Pairs
    from clipgraft.models.clip import Clip

log = logging.getLogger("clipgraft")
_SUMMARY = "Measure retrieval or classification: a base, or an adapter beside its base."
_SHOWN = (
    "image_to_text_R@1",
    "image_to_text_R@5",
    "image_to_text_R@10",
    "image_to_text_mean_rank",
    "image_to_text_median_rank",
    "text_to_image_R@1",
    "text_to_image_R@5",
    "text_to_image_R@10",
    "text_to_image_mean_rank",
    "text_to_image_median_rank",
)


def run(argv: Sequence[str]) -> None:
    """Parse, load, evaluate, print a table and optionally write JSON."""
    kinds: list[type[Spec]] = [ModelSpec, DataSpec, ClassSpec, EvalSpec]
    model_spec, data, classes, spec = parse("eval", _SUMMARY, kinds, argv)
    if data.val_data is None:
        raise ConfigError("--val-data is missing: a table of images and captions, or a folder of both")
    if not data.val_data.exists():
        raise ConfigError(f"--val-data {data.val_data}: there is no such file or folder; check the path")
    faults = class_faults(classes, data)
    if spec.classifier is not None and classes.task == "retrieval":
        faults.append("--classifier given without --task classification: add it")
    if faults:
        raise ConfigError("\n".join(faults))
    from clipgraft.adapters.loading import load_adapter
    from clipgraft.cli.common import load_model, open_cache, read_table
    from clipgraft.files import write_json
    from clipgraft.models.precision import use_autocast

    clip = load_model(model_spec)
    if spec.adapter is not None:
        load_adapter(clip, spec.adapter, force=spec.force, peft_out_proj=spec.peft_out_proj)
    options = {
        "batch_size": spec.batch_size,
        "workers": data.workers,
        "autocast": use_autocast(model_spec.autocast, clip.device),
        "cache": open_cache(data),
        "exact_preprocess": data.exact_preprocess,
    }
    if classes.task == "classification":
        from clipgraft.cli.classify import class_table, measure_classes

        results = measure_classes(clip, data, classes, spec.classifier, **options)
        columns = {name: result.metrics for name, result in results.items()}
        print(class_table(results))
    else:
        columns = measure(clip, read_table(clip, data.val_data, data, "validation data"), **options)
        print(table(columns))
    if spec.out is not None:
        write_json(spec.out, columns)
        log.info("wrote %s", spec.out)


def measure(clip: Clip, pairs: Pairs, **options: Any) -> dict[str, dict[str, float]]:
    """Metrics of the base and, where the model carries one, of its adapter.

    `options` are what `encode_images` and `evaluate_retrieval` both take.
    """
    from clipgraft.evaluate.retrieval import evaluate_retrieval

    return side_by_side(
        clip,
        pairs.images,
        lambda images: evaluate_retrieval(clip, pairs, image_features=images, **options),
        **options,
    )


_R = TypeVar("_R")


def side_by_side(
    clip: Clip, files: Sequence[Path], evaluate: Callable[[Tensor], _R], **options: Any
) -> dict[str, _R]:
    """What `evaluate` makes of unit-norm image features with the base and, if there is one, the adapter."""
    from clipgraft.lora.state import lora_state
    from clipgraft.lora.switch import lora_disabled

    state = lora_state(clip)
    if state is None:
        return {"base": evaluate(_images(clip, files, **options))}
    with lora_disabled(clip):
        images = _images(clip, files, **options)
        base = evaluate(images)
    if state.chosen().touches("vision"):
        images = _images(clip, files, **options)
    return {"base": base, "adapter": evaluate(images)}


def _images(clip: Clip, files: Sequence[Path], **options: Any) -> Tensor:
    from tqdm import tqdm

    from clipgraft.data.features import encode_images

    with tqdm(desc="images", total=len(files), unit="image", disable=None) as bar:

        def advance(images: int) -> None:
            bar.update(images)

        return encode_images(clip, files, progress=advance, **options)


def table(columns: Mapping[str, Mapping[str, float]]) -> str:
    """Metrics as aligned rows, one column a model; recalls in percent."""
    lines = [f"{'':<26}" + "".join(f"{name:>10}" for name in columns)]
    for metric in _SHOWN:
        percent = "_R@" in metric
        values = (100 * column[metric] if percent else column[metric] for column in columns.values())
        lines.append(f"{metric:<26}" + "".join(f"{value:>10.1f}" for value in values))
    return "\n".join(lines)
