"""The ONNX graphs with products in 8-bit integers, which have to pass a gate: recall on the user's own pairs.

ONNX Runtime's dynamic quantisation: weights per output channel, activations as they come. Weights take 7 of
the 8 bits, since CPUs without VNNI add up pairs of products in 16 bits, which 8 overflow: so the file
computes the same everywhere, and what the gate measured holds. Embeddings and the patch convolution stay in
fp32.
"""

from __future__ import annotations

import json
import logging
import warnings
from pathlib import Path

from clipgraft.errors import ModelError
from clipgraft.files import write_json
from clipgraft.models.forms.form import Differences, FormSpec, Job
from clipgraft.models.forms.graphs import GRAPH_FILES
from clipgraft.models.onnx import (
    DESCRIPTION,
    describe,
    export_graph,
    graphs_of,
    measured,
    onnx_runner,
    require_onnx,
    save_tokenizer,
)

_WEIGHTS = "int8: products per output channel, 7 bits; everything else fp32"
_NO_BOUND = float("inf")


def write_onnx_int8(job: Job) -> Differences:
    """The `onnx` form, quantised; `clipgraft_onnx.json` also has `weights`, and `recall` before and after.

    Raises:
        ModelError: there is no gate.
        ConfigError: the gate refuses it.
    """
    if job.gate is None:
        raise ModelError(
            "int8 loses some recall, and there is nothing to measure it on: give a gate of images and "
            "captions of your own (`clipgraft.evaluate.graph_gate`)"
        )
    exact, graphs = graphs_of(job.clip)
    differences = {}
    for file, graph in graphs.items():
        whole, path = job.target / f"whole-{file}", job.target / file
        job.tell(f"exporting {file}")
        export_graph(graph, whole)
        measured(graph, whole, onnx_runner(whole))
        _quantise(whole, path)
        for left in job.target.glob(f"whole-{file}*"):
            left.unlink()
        differences[file] = measured(graph, path, onnx_runner(path), _NO_BOUND)
        job.tell(f"{file} in int8 differs from PyTorch by {differences[file]:.1e} of the largest feature")
    save_tokenizer(exact, job.target)
    said = {**describe(exact, graphs, differences), "weights": _WEIGHTS}
    write_json(job.target / DESCRIPTION, said)
    write_json(job.target / DESCRIPTION, {**said, "recall": dict(job.gate(job.target))})
    return differences


def _quantise(graph: Path, target: Path) -> None:
    from onnxruntime.quantization import QuantType, quantize_dynamic

    level = logging.root.level
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        # It advises, through the root logger, to optimise a graph that is optimised already.
        logging.root.setLevel(logging.ERROR)
        try:
            quantize_dynamic(
                graph,
                target,
                op_types_to_quantize=["MatMul", "Gemm"],
                per_channel=True,
                reduce_range=True,
                weight_type=QuantType.QInt8,
                use_external_data_format=(graph.parent / f"{graph.name}.data").exists(),
            )
        finally:
            logging.root.setLevel(level)


def graph_paths(folder: Path) -> dict[str, Path]:
    """The graph of each tower in a folder of the `onnx` or `onnx-int8` form, by `text` and `vision`."""
    told = json.loads((folder / DESCRIPTION).read_text(encoding="utf-8"))
    return {tower: folder / told[tower]["file"] for tower in ("text", "vision") if tower in told}


ONNX_INT8 = FormSpec(write_onnx_int8, 4, DESCRIPTION, GRAPH_FILES, require=require_onnx)
