"""The names of the forms, apart from what writes them, which takes seconds to import."""

from __future__ import annotations

from typing import Literal

Form = Literal[
    "open_clip",
    "transformers",
    "onnx",
    "onnx-int8",
    "openvino",
    "sentence-transformers",
    "immich",
    "diffusers",
    "comfyui",
]
