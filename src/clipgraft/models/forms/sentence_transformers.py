"""A folder for sentence-transformers: texts and images into one space with `encode`.

The module is named as every release since 2.0 knows it; from 5.4 it stands for the multimodal `Transformer`.
"""

from __future__ import annotations

from clipgraft.errors import ModelError
from clipgraft.files import write_json
from clipgraft.models.forms.form import TOKENIZER_FILES, Differences, FormSpec, Job, inside
from clipgraft.models.forms.libraries import TRANSFORMERS_FILES, as_transformers
from clipgraft.models.saved import save_transformers_files, weights_size

_FOLDER = "0_CLIPModel"
_MODULES = "modules.json"


def write_sentence_transformers(job: Job) -> Differences:
    """The transformers form as the one module of a `SentenceTransformer`."""
    from transformers import CLIPModel

    twin = as_transformers(job.clip, job.tell)
    if type(twin.model) is not CLIPModel:
        raise ModelError(
            f"sentence-transformers opens CLIP here, and this model is a {type(twin.model).__name__}, which "
            "it would pad and pool otherwise: write the transformers or onnx form"
        )
    twin.require_inputs()
    job.tell(f"writing {weights_size(twin) / 1e6:,.1f} MB")
    folder = job.target / _FOLDER
    folder.mkdir()
    save_transformers_files(twin, folder)
    module = {
        "idx": 0,
        "name": "0",
        "path": _FOLDER,
        "type": "sentence_transformers.models.CLIPModel",
    }
    write_json(job.target / _MODULES, [module])
    write_json(job.target / "config_sentence_transformers.json", {"similarity_fn_name": "cosine"})
    return {}


SENTENCE_TRANSFORMERS = FormSpec(
    write_sentence_transformers,
    2,
    _MODULES,
    (
        "config_sentence_transformers.json",
        *inside(_FOLDER, "config.json", *TRANSFORMERS_FILES, *TOKENIZER_FILES),
    ),
)
