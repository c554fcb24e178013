"""A folder for Immich's machine learning, which runs open_clip models as ONNX graphs of one tower each.

Its textual encoder gives `text`, (1, context) int32 ids from `textual/tokenizer.json`, padded with the
`pad_token` of `tokenizer_config.json` to the `context_length` of `config.json`; its visual one gives `image`,
(1, 3, H, W) fp32, prepared as `visual/preprocess_cfg.json` says. Both take the first output as the embedding.
Embeddings have unit norm, as those of Immich's own exports.
"""

from __future__ import annotations

from typing import Any

import torch.nn.functional as F
from torch import Tensor, nn

from clipgraft.errors import ModelError
from clipgraft.files import write_json
from clipgraft.models.clip import Clip
from clipgraft.models.convert import config_of
from clipgraft.models.forms.form import TOKENIZER_FILES, Differences, FormSpec, Job, inside
from clipgraft.models.forms.libraries import as_open_clip
from clipgraft.models.onnx import Graph, export_graph, graphs_of, measured, onnx_runner, require_onnx
from clipgraft.models.processors import hf_tokenizer_files, image_settings, preprocess_config

_PARTS = {"text.onnx": ("textual", "text"), "vision.onnx": ("visual", "image")}
_GRAPH = "model.onnx"


def write_immich(job: Job) -> Differences:
    """`textual/`, `visual/` and `config.json`, to put where Immich keeps a model of the same kind."""
    clip = as_open_clip(job.clip, job.tell)
    preprocess = _preprocess(clip)
    exact, graphs = graphs_of(clip)
    if set(graphs) != set(_PARTS):
        raise ModelError("Immich needs both towers, and this model has one: write the onnx form")
    differences = {}
    for file, graph in graphs.items():
        name, given = _PARTS[file]
        (job.target / name).mkdir()
        path = job.target / name / _GRAPH
        job.tell(f"exporting {name}/{_GRAPH}")
        part = _Part(graph, given)
        export_graph(part, path)
        difference = measured(part, path, onnx_runner(path))
        differences[f"{name}/{_GRAPH}"] = difference
        job.tell(f"{name}/{_GRAPH} agrees with PyTorch to {difference:.1e} of the largest feature")
    write_json(job.target / "visual" / "preprocess_cfg.json", preprocess)
    write_json(job.target / "config.json", config_of(exact))
    _save_tokenizer(exact, job)
    return differences


def _preprocess(clip: Clip) -> dict[str, Any]:
    """The settings of images as open_clip names them, which Immich reads.

    Raises:
        ModelError: Immich cannot prepare images in this way.
    """
    clip.require_inputs()
    settings = image_settings(clip)
    if settings is None or settings.size[0] != settings.size[1]:
        raise ModelError("Immich takes square images, which this model does not: write the onnx form")
    if settings.resize_mode not in ("shortest", "squash"):
        raise ModelError(
            f"Immich cannot resize images in mode '{settings.resize_mode}', which this model takes: write "
            "the onnx form"
        )
    return {**preprocess_config(settings), "mode": "RGB", "fill_color": 0}


def _save_tokenizer(clip: Clip, job: Job) -> None:
    folder = job.target / "textual"
    tokenizer = hf_tokenizer_files(clip)
    if tokenizer is not None:
        tokenizer.save_pretrained(folder)
    if not (folder / "tokenizer.json").is_file() or tokenizer.pad_token is None:
        raise ModelError(
            "Immich needs a tokenizer.json with a padding token, which this model's tokenizer is not: write "
            "the onnx form"
        )


class _Part(nn.Module):
    """A tower as Immich calls it: its name for the input, 32-bit ids, and features of unit norm."""

    def __init__(self, graph: Graph, name: str) -> None:
        super().__init__()
        self.inner, self.input_names = graph, (name,)
        self.output_name = f"{name}_features"  # Immich takes the first, whatever its name

    @property
    def model(self) -> nn.Module:
        return self.inner.model

    def forward(self, rows: Tensor) -> Tensor:
        """(B, L) int32 ids or (B, 3, H, W) pixels -> (B, D) of unit norm."""
        assert callable(self.inner)
        features: Tensor = self.inner(rows if rows.is_floating_point() else rows.long())
        return F.normalize(features, dim=-1)

    def sample(self, batch: int) -> tuple[Tensor, ...]:
        """Inputs of that many rows, ids in 32 bits."""
        return tuple(rows if rows.is_floating_point() else rows.int() for rows in self.inner.sample(batch))

    def dynamic(self) -> tuple[dict[int, Any], ...]:
        return self.inner.dynamic()

    def reference(self, *inputs: Tensor) -> Tensor:
        rows = (each if each.is_floating_point() else each.long() for each in inputs)
        return F.normalize(self.inner.reference(*rows), dim=-1)

    def described(self) -> dict[str, Any]:
        return self.inner.described()


IMMICH = FormSpec(
    write_immich,
    5,
    "config.json",
    (
        *inside("textual", "model.onnx", "model.onnx.data", *TOKENIZER_FILES),
        *inside("visual", "model.onnx", "model.onnx.data", "preprocess_cfg.json"),
    ),
    require=require_onnx,
)
