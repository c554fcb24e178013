"""A compact model as a folder that stock transformers opens."""

from __future__ import annotations

from dataclasses import asdict
from pathlib import Path

from clipgraft.compact.model import Compacted
from clipgraft.compact.tokens import write_vocabulary
from clipgraft.errors import ModelError
from clipgraft.files import atomic_folder, write_json
from clipgraft.models.export import save_transformers_files, weights_size
from clipgraft.models.processors import HfTokenizer

RECORD = "compact.json"


def check_out(out: Path) -> None:
    """Make sure that writing to `out` destroys nothing; raises ModelError where something is there."""
    if out.is_symlink() or (out.exists() and not (out.is_dir() and not any(out.iterdir()))):
        raise ModelError(
            f"{out} exists already and is left as it is: choose another path, or remove it first"
        )


def write_compact(compacted: Compacted, out: str | Path) -> Path:
    """Write a folder for `CLIPModel`, `AutoTokenizer`, `AutoImageProcessor` and `clipgraft.load`.

    `compact.json` says which blocks and tokens of which base it is made of. All of it is there, or nothing.

    Raises:
        ModelError: `out` exists, or the model came without tokenizer or preprocessing.
    """
    out = Path(out)
    check_out(out)
    clip = compacted.clip
    clip.tokenize("")
    clip.require_preprocess()
    with atomic_folder(out, weights_size(clip)) as folder:
        save_transformers_files(clip, folder)
        if compacted.vocabulary is not None and isinstance(clip.tokenizer, HfTokenizer):
            write_vocabulary(clip.tokenizer.inner, folder)
        write_json(folder / RECORD, _record(compacted))
    return out


def _record(compacted: Compacted) -> dict[str, object]:
    cut = compacted.vocabulary
    return {
        "base": {**asdict(compacted.base), "fingerprint": compacted.fingerprint},
        "text_blocks": compacted.text_blocks,
        "vision_blocks": compacted.vision_blocks,
        "token_ids": None if cut is None else cut.token_ids,
    }
