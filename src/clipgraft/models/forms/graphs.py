"""ONNX graphs of both towers, in fp32."""

from __future__ import annotations

from clipgraft.models.forms.form import TOKENIZER_FILES, Differences, FormSpec, Job
from clipgraft.models.onnx import DESCRIPTION, require_onnx, write_onnx

GRAPH_FILES = ("*.onnx", "*.onnx.data", *TOKENIZER_FILES)


def write_graphs(job: Job) -> Differences:
    """A folder with `text.onnx`, `vision.onnx`, a description and the tokenizer (`clipgraft.models.onnx`)."""
    return write_onnx(job.clip, job.target, job.tell)


ONNX = FormSpec(write_graphs, 4, DESCRIPTION, GRAPH_FILES, require=require_onnx)
