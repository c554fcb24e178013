"""OpenVINO's intermediate representation of both towers, in fp32, checked against PyTorch."""

from __future__ import annotations

import importlib.util
import tempfile
from pathlib import Path
from typing import Any

from clipgraft.errors import ModelError
from clipgraft.files import write_json
from clipgraft.models.forms.form import TOKENIZER_FILES, Differences, FormSpec, Job, inside
from clipgraft.models.onnx import (
    Run,
    describe,
    export_graph,
    graphs_of,
    measured,
    require_onnx,
    save_tokenizer,
)
from clipgraft.models.sites import TOWERS

DESCRIPTION = "clipgraft_openvino.json"
IR = "openvino_model.xml"
_FP32 = {"INFERENCE_PRECISION_HINT": "f32"}


def require_openvino() -> None:
    """Raise ModelError where the packages that write and check the IR are not installed."""
    require_onnx()
    if importlib.util.find_spec("openvino") is None:
        raise ModelError("OpenVINO needs openvino: pip install 'clipgraft[openvino]'")


def write_openvino(job: Job) -> Differences:
    """`text/` and `vision/`, each with `openvino_model.xml` and `.bin`, a description and the tokenizer.

    Inputs and outputs are those of the `onnx` form. Weights stay in fp32; OpenVINO computes in bf16 on CPUs
    that are faster in it, unless it is told `INFERENCE_PRECISION_HINT: f32`, as the check here does.
    """
    exact, graphs = graphs_of(job.clip)
    differences = {}
    for file, graph in graphs.items():
        name = file.removesuffix(".onnx")
        (job.target / name).mkdir()
        path = job.target / name / IR
        job.tell(f"exporting {name}/{IR}")
        with tempfile.TemporaryDirectory(dir=job.target) as folder:
            export_graph(graph, Path(folder) / file)
            _convert(Path(folder) / file, path)
        difference = measured(graph, path, openvino_runner(path))
        differences[f"{name}/{IR}"] = difference
        job.tell(f"{name}/{IR} agrees with PyTorch to {difference:.1e} of the largest feature")
    save_tokenizer(exact, job.target)
    write_json(job.target / DESCRIPTION, _description(describe(exact, graphs, differences)))
    return differences


def _convert(graph: Path, target: Path) -> None:
    import openvino

    # `convert_model` would do the same, but reports its use over the network where telemetry is on.
    openvino.save_model(openvino.Core().read_model(graph), target, compress_to_fp16=False)


def openvino_runner(path: Path) -> Run:
    """A function that runs an IR on the CPU in fp32."""
    import openvino

    compiled: Any = openvino.Core().compile_model(path, "CPU", _FP32)
    return lambda inputs: compiled(inputs)[0]


def _description(told: dict[str, Any]) -> dict[str, Any]:
    towers: dict[str, Any] = {name: {**told[name], "file": f"{name}/{IR}"} for name in TOWERS if name in told}
    return {**told, "format": "clipgraft-openvino", "checked_with": _FP32, **towers}


OPENVINO = FormSpec(
    write_openvino,
    4,
    DESCRIPTION,
    (
        *TOKENIZER_FILES,
        *(name for tower in TOWERS for name in inside(tower, IR, "openvino_model.bin")),
    ),
    require=require_openvino,
)
