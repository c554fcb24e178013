"""Write docs/models.md: what holds for every model that open_clip lists, and for transformers' classes.

Models are built on torch's meta device, without weights. Run it after an update of open_clip or timm:

    python scripts/models_table.py
"""

from __future__ import annotations

import json
import os
import tempfile
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

# Configurations of the hub would be waited for, one retry after the other.
os.environ["HF_HUB_OFFLINE"] = "1"

import open_clip
import torch
import transformers

from clipgraft.errors import ModelError
from clipgraft.models.clip import Clip, family_of
from clipgraft.models.load_hf import CLASSES
from clipgraft.models.meta import clip_on_meta
from clipgraft.models.names import is_module_of, path_site, site_path
from clipgraft.models.sites import EMBEDDING_ROLES, Site, Tower

PAGE = Path(__file__).parents[1] / "docs" / "models.md"
_CLASSES = ("CLIP", "Siglip", "Siglip2", "AltCLIP", "ChineseCLIP", "VisionTextDualEncoder")
_M2M = {f"{part}_layers": 12 for part in ("encoder", "decoder")}
# What the hub says of the text towers that open_clip borrows, as far as their sites depend on it.
_BORROWED: dict[str, transformers.PreTrainedConfig] = {
    "roberta-base": transformers.RobertaConfig(),
    "xlm-roberta-base": transformers.XLMRobertaConfig(),
    "xlm-roberta-large": transformers.XLMRobertaConfig(
        hidden_size=1024, num_hidden_layers=24, num_attention_heads=16, intermediate_size=4096
    ),
    "facebook/nllb-200-distilled-600M": transformers.M2M100Config(**_M2M),
    "facebook/nllb-200-distilled-1.3B": transformers.M2M100Config(
        **dict.fromkeys(_M2M, 24), encoder_ffn_dim=8192, decoder_ffn_dim=8192
    ),
    "google/mt5-base": transformers.MT5Config(d_model=768, num_layers=12, num_heads=12, d_ff=2048),
    "google/mt5-xl": transformers.MT5Config(d_model=2048, num_layers=24, num_heads=32, d_ff=5120),
}
_HEAD = """\
# Models and their sites

This page is written by `python scripts/models_table.py` (open_clip {open_clip}, transformers {transformers}).
Each model is built without its weights, and asked what clipgraft can do with it.

- **Sites** are the places that can carry LoRA. `12 × (q k v out fc1 fc2)` are the roles of twelve blocks; the
  others are of the whole tower. A role that only some blocks have is listed for all. `--lora-targets` takes
  sets (`linear`, `vision-attention`, `pooling`, `convolutions`), patterns (`vision.*.gate`) and sites
  (`vision.pool_q`). A set that reaches only a part of a tower says so before training.
- **Text cut**: the pooled token sees nothing behind it, or a mask hides the padding from all tokens (XLM-R,
  NLLB, mT5, BERT), so that padding is cut off. A tower that attends to its padding, as SigLIP's and CoCa's,
  gets its texts whole.
- **Plain**: towers (`T` text, `V` vision) that clipgraft's own engine computes ([speed](speed.md)). Others
  run their library's own forward, which is exact and slower. Features of a frozen tower are cached for all.
- **Files**: the class of transformers in whose names an adapter is saved. `all` sites open in stock PEFT on
  that class, or all but those that are named: PEFT refuses an adapter of these, and clipgraft opens it. `–`
  stands where transformers has no such model: there the adapter is clipgraft's own. `itself` means the
  model's own module names: stock PEFT opens the adapter on a model of the same class.

Merging, gradients and files of every kind of tower are compared with explicit weights W + s·B·A on small
versions of it (`tests/parity/test_vision_towers.py`, `tests/parity/test_siglip.py` and
`tests/parity/test_site_roles.py`). Where a weight is read without its module being called (EVA-01, EVA-02-E,
attention pooling of ResNets, position tables, SigLIP's pooling attention in transformers), dropout does not
act on the adapter's path, and training says so.

Text towers of transformers, towers alone, and two towers of your own: [other towers](towers.md).

Stems of several convolutions, squeeze-and-excitation and tables of relative positions carry no LoRA.

"""
_COLUMNS = (
    "| model | tower | text sites | vision sites | text cut | plain | files |\n"
    "|---|---|---|---|---|---|---|\n"
)


@dataclass(frozen=True)
class Row:
    """What holds for one model; `failure` is why nothing does."""

    name: str
    tower: str = ""
    text: str = ""
    vision: str = ""
    cut: str = ""
    plain: str = ""
    files: str = ""
    failure: str = ""

    def line(self) -> str:
        """The row of the table."""
        if self.failure:
            return f"| {self.name} | {self.failure} | | | | | |"
        cells = (self.name, self.tower, self.text, self.vision, self.cut, self.plain, self.files)
        return f"| {' | '.join(cells)} |"


def openclip_row(name: str) -> Row:
    """A model of open_clip's list."""
    config = open_clip.get_model_config(name)
    borrowed = config["text_cfg"].get("hf_model_name")
    try:
        if not borrowed:
            return _row(name, clip_on_meta(name))
        if borrowed not in _BORROWED:
            return Row(
                name, failure=f"text tower of transformers ({borrowed}), which this page does not know"
            )
        with tempfile.TemporaryDirectory() as folder:
            _BORROWED[borrowed].save_pretrained(folder)
            config["text_cfg"]["hf_model_name"] = folder
            path = Path(folder) / "model.json"
            path.write_text(json.dumps(config), encoding="utf-8")
            return _row(name, clip_on_meta(str(path)), borrowed)
    except ModelError as error:
        return Row(name, failure=str(error))


def transformers_row(kind: str) -> Row:
    """A class of transformers with its default configuration."""
    name = f"transformers.{kind}Model"
    config = getattr(transformers, f"{kind}Config")
    if kind == "VisionTextDualEncoder":
        parts = transformers.ViTConfig(), transformers.XLMRobertaConfig()
        made = config.from_vision_text_configs(*parts)
        name, borrowed = f"{name}, of ViT and XLM-R", "xlm-roberta-base"
    else:
        made, borrowed = config(), ""
    with torch.device("meta"):
        model = getattr(transformers, f"{kind}Model")(made)
    row = _row(name, Clip(model, family_of(model)), borrowed)
    return row if model.config.model_type in CLASSES else Row(name, failure="not loaded yet")


def _row(name: str, clip: Clip, borrowed: str = "") -> Row:
    sites, family = clip.sites, clip.family
    tokens = torch.zeros(1, clip.context_length, dtype=torch.long)
    plain = {"T": family.text_tower(clip.model), "V": family.vision_tower(clip.model)}
    return Row(
        name,
        _tower_name(clip) + (f", text {borrowed}" if borrowed else ""),
        _summary(sites, "text"),
        _summary(sites, "vision"),
        "no" if family.text_ends(clip.model, tokens) is None else "yes",
        " ".join(letter for letter, tower in plain.items() if tower is not None) or "–",
        _files(clip),
    )


def _tower_name(clip: Clip) -> str:
    visual = getattr(clip.model, "visual", None) or clip.model.vision_model
    trunk = getattr(visual, "trunk", None)
    return type(visual).__name__ if trunk is None else f"timm {type(trunk).__name__}"


def _summary(sites: tuple[Site, ...], tower: Tower) -> str:
    """`12 × (q k v out fc1 fc2), proj`."""
    own = [site for site in sites if site.tower == tower]
    blocks = {site.block for site in own if site.block is not None}
    inside = dict.fromkeys(site.role for site in own if site.block is not None)
    rest = [site.role for site in own if site.block is None and site.role not in EMBEDDING_ROLES]
    first = [site.role for site in own if site.role in EMBEDDING_ROLES]
    parts = [" ".join(first), f"{len(blocks)} × ({' '.join(inside)})" if blocks else "", " ".join(rest)]
    return ", ".join(part for part in parts if part) or "none"


def _files(clip: Clip) -> str:
    twin = clip.family.twin(clip.model)
    wrong = [site for site in clip.sites if path_site(site_path(site, twin), twin) != site]
    if wrong:
        return f"cannot be saved: {wrong[0]}"
    if not _has_twin(clip):
        return "–"
    if twin.paths and not is_module_of(Site("vision", 0, "q"), twin):
        return f"{twin.name} itself: all of text"
    foreign = [site for site in clip.sites if not is_module_of(site, twin)]
    return f"{twin.name}: all" + (f" but {', '.join(map(str, foreign))}" if foreign else "")


def _has_twin(clip: Clip) -> bool:
    """Whether transformers has a class for the model: SigLIP, or two plain towers."""
    if clip.family.name == "transformers" or clip.family.twin(clip.model).name != "CLIPModel":
        return True
    return None not in (clip.family.text_tower(clip.model), clip.family.vision_tower(clip.model))


def page() -> str:
    """The whole page."""
    versions = {"open_clip": open_clip.__version__, "transformers": transformers.__version__}
    rows: Iterator[Row] = (openclip_row(name) for name in open_clip.list_models())
    lines = [row.line() for row in (*map(transformers_row, _CLASSES), *rows)]
    return _HEAD.format(**versions) + _COLUMNS + "\n".join(lines) + "\n"


if __name__ == "__main__":
    PAGE.write_text(page(), encoding="utf-8")
