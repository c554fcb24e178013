"""The forms of the two libraries that CLIP is trained in: open_clip and transformers."""

from __future__ import annotations

from collections.abc import Callable

from clipgraft.files import write_json
from clipgraft.models.clip import Clip
from clipgraft.models.configs import CONFIG_FILE
from clipgraft.models.convert import config_of, to_open_clip, to_transformers
from clipgraft.models.forms.form import TOKENIZER_FILES, Differences, FormSpec, Job
from clipgraft.models.processors import OpenClipTokenizer
from clipgraft.models.saved import save_checkpoint, save_transformers_files, weights_size

TRANSFORMERS_FILES = ("model*.safetensors*", "*processor_config.json", "generation_config.json")
_WEIGHTS_FILE = "open_clip_model.safetensors"


def write_transformers(job: Job) -> Differences:
    """A folder for `CLIPModel`, `AutoTokenizer` and `AutoImageProcessor`."""
    twin = as_transformers(job.clip, job.tell)
    twin.require_inputs()
    job.tell(f"writing {weights_size(job.clip) / 1e6:,.1f} MB")
    save_transformers_files(twin, job.target)
    return {}


def as_transformers(clip: Clip, tell: Callable[[str], None]) -> Clip:
    """Convert to transformers, and say so, where a model is of another library."""
    if clip.family.name != "transformers":
        tell("converting to transformers")
    return to_transformers(clip)


def as_open_clip(clip: Clip, tell: Callable[[str], None]) -> Clip:
    """Convert to open_clip, and say so, where a model is of another library."""
    if clip.family.name != "open_clip":
        tell("converting to open_clip")
    return to_open_clip(clip)


def write_open_clip(job: Job) -> Differences:
    """A folder for `local-dir:`, with configuration and tokenizer."""
    clip = as_open_clip(job.clip, job.tell)
    clip.require_inputs()
    job.tell(f"writing {weights_size(clip) / 1e6:,.1f} MB")
    preprocess = dict(clip.model.visual.preprocess_cfg)  # type: ignore[union-attr, arg-type]
    preprocess.pop("size", None)  # open_clip takes it from the model
    write_json(job.target / CONFIG_FILE, {"model_cfg": config_of(clip), "preprocess_cfg": preprocess})
    save_checkpoint(clip, job.target / _WEIGHTS_FILE, epoch=0)
    tokenizer = clip.tokenizer
    if isinstance(tokenizer, OpenClipTokenizer) and hasattr(tokenizer.inner, "save_pretrained"):
        tokenizer.inner.save_pretrained(job.target)
    return {}


def write_checkpoint(job: Job) -> None:
    """A checkpoint that `open_clip.create_model(name, pretrained=file)` opens."""
    converted = as_open_clip(job.clip, job.tell)
    job.tell(f"writing {weights_size(job.clip) / 1e6:,.1f} MB")
    save_checkpoint(converted, job.target, epoch=0)


OPEN_CLIP = FormSpec(
    write_open_clip,
    2,
    CONFIG_FILE,
    (_WEIGHTS_FILE, *TOKENIZER_FILES),
    suffixes=(".pt", ".safetensors"),
    write_file=write_checkpoint,
)
TRANSFORMERS = FormSpec(write_transformers, 2, "config.json", (*TRANSFORMERS_FILES, *TOKENIZER_FILES))
