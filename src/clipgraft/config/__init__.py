"""Specs: every flag of the command line, declared once, typed, and checked all at once.

A field is a flag: `lora_r` is `--lora-r` and the key `lora_r` or `lora-r` of a YAML file. Names and defaults
are open_clip's and the guide's where they have one. Specs are frozen and stop at their folder's door: the
library's functions take plain arguments.
"""

from __future__ import annotations

from clipgraft.config.search import EncodeSpec, IndexSpec, SearchSpec
from clipgraft.config.specs import (
    AdapterSpec,
    CacheSpec,
    ClassSpec,
    ClassTrainSpec,
    ColumnSpec,
    DataSpec,
    DeviceSpec,
    EvalSpec,
    LoraSpec,
    ModelSpec,
    PromptSpec,
    RunSpec,
    SweepSpec,
    TableSpec,
    TrainSpec,
)
from clipgraft.config.tools import (
    CompactSpec,
    ConvertSpec,
    DemoSpec,
    DistillSpec,
    InspectSpec,
    MergeSpec,
    ProfileSpec,
    ReportSpec,
)

__all__ = [
    "AdapterSpec",
    "CacheSpec",
    "ClassSpec",
    "ClassTrainSpec",
    "ColumnSpec",
    "CompactSpec",
    "ConvertSpec",
    "DataSpec",
    "DemoSpec",
    "DeviceSpec",
    "DistillSpec",
    "EncodeSpec",
    "EvalSpec",
    "IndexSpec",
    "InspectSpec",
    "LoraSpec",
    "MergeSpec",
    "ModelSpec",
    "ProfileSpec",
    "PromptSpec",
    "ReportSpec",
    "RunSpec",
    "SearchSpec",
    "SweepSpec",
    "TableSpec",
    "TrainSpec",
]
