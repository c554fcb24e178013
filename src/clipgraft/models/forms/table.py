"""All forms in which a whole model can be written."""

from __future__ import annotations

from clipgraft.models.forms.form import FormSpec
from clipgraft.models.forms.graphs import ONNX
from clipgraft.models.forms.immich import IMMICH
from clipgraft.models.forms.libraries import OPEN_CLIP, TRANSFORMERS
from clipgraft.models.forms.names import Form
from clipgraft.models.forms.onnx_int8 import ONNX_INT8
from clipgraft.models.forms.openvino import OPENVINO
from clipgraft.models.forms.sentence_transformers import SENTENCE_TRANSFORMERS
from clipgraft.models.forms.text_encoder import COMFYUI, DIFFUSERS

FORMS: dict[Form, FormSpec] = {
    "open_clip": OPEN_CLIP,
    "transformers": TRANSFORMERS,
    "onnx": ONNX,
    "onnx-int8": ONNX_INT8,
    "openvino": OPENVINO,
    "sentence-transformers": SENTENCE_TRANSFORMERS,
    "immich": IMMICH,
    "diffusers": DIFFUSERS,
    "comfyui": COMFYUI,
}
"""How each is written, by the name that `clipgraft merge --to` takes."""
