"""`clipgraft eval`."""

from __future__ import annotations

import logging
from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING, Any

from clipgraft.cli.parser import parse
from clipgraft.config import DataSpec, EvalSpec, ModelSpec
from clipgraft.errors import ConfigError

if TYPE_CHECKING:
    from torch import Tensor

    from clipgraft.data.pairs import Pairs
    from clipgraft.models.clip import Clip

log = logging.getLogger("clipgraft")
_SUMMARY = "Measure retrieval on images with captions: a base, or an adapter beside its base."
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
    model_spec, data, spec = parse("eval", _SUMMARY, [ModelSpec, DataSpec, EvalSpec], argv)
    if data.val_data is None:
        raise ConfigError("--val-data is missing: a table of images and captions, or a folder of both")
    if not data.val_data.exists():
        raise ConfigError(f"--val-data {data.val_data}: there is no such file or folder; check the path")
    from clipgraft.adapters.loading import load_adapter
    from clipgraft.cli.common import load_model, open_cache, read_table
    from clipgraft.files import write_json
    from clipgraft.models.precision import use_autocast

    clip = load_model(model_spec)
    if spec.adapter is not None:
        load_adapter(clip, spec.adapter, force=spec.force, peft_out_proj=spec.peft_out_proj)
    pairs = read_table(clip, data.val_data, data, "validation data")
    columns = measure(
        clip,
        pairs,
        batch_size=spec.batch_size,
        workers=data.workers,
        autocast=use_autocast(model_spec.autocast, clip.device),
        cache=open_cache(data),
        exact_preprocess=data.exact_preprocess,
    )
    print(table(columns))
    if spec.out is not None:
        write_json(spec.out, columns)
        log.info("wrote %s", spec.out)


def measure(clip: Clip, pairs: Pairs, **options: Any) -> dict[str, dict[str, float]]:
    """Metrics of the base and, where the model carries one, of its adapter.

    `options` are what `encode_images` and `evaluate_retrieval` both take.
    """
    from clipgraft.evaluate.retrieval import evaluate_retrieval
    from clipgraft.lora.state import lora_state
    from clipgraft.lora.switch import lora_disabled

    state = lora_state(clip)
    if state is None:
        return {
            "base": evaluate_retrieval(clip, pairs, image_features=_images(clip, pairs, **options), **options)
        }
    with lora_disabled(clip):
        images = _images(clip, pairs, **options)
        base = evaluate_retrieval(clip, pairs, image_features=images, **options)
    if state.chosen().touches("vision"):
        images = _images(clip, pairs, **options)
    return {"base": base, "adapter": evaluate_retrieval(clip, pairs, image_features=images, **options)}


def _images(clip: Clip, pairs: Pairs, **options: Any) -> Tensor:
    from tqdm import tqdm

    from clipgraft.data.features import encode_images

    with tqdm(desc="images", total=len(pairs), unit="image", disable=None) as bar:

        def advance(images: int) -> None:
            bar.update(images)

        return encode_images(clip, pairs.images, progress=advance, **options)


def table(columns: Mapping[str, Mapping[str, float]]) -> str:
    """Metrics as aligned rows, one column a model; recalls in percent."""
    lines = [f"{'':<26}" + "".join(f"{name:>10}" for name in columns)]
    for metric in _SHOWN:
        percent = "_R@" in metric
        values = (100 * column[metric] if percent else column[metric] for column in columns.values())
        lines.append(f"{metric:<26}" + "".join(f"{value:>10.1f}" for value in values))
    return "\n".join(lines)
