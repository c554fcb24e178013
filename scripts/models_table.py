"""Write docs/models.md: what holds for every model that open_clip lists, and for transformers' classes.

Models are built on torch's meta device, without weights. What needs weights is measured on small models of
the tests that are built alike (`tests/helpers/round_trips.py`). Run it after an update of open_clip or timm:

    python scripts/models_table.py
"""

from __future__ import annotations

import json
import logging
import os
import sys
import tempfile
from collections import Counter
from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

# Configurations of the hub would be waited for, one retry after the other.
os.environ["HF_HUB_OFFLINE"] = "1"

import open_clip
import torch
import transformers

from clipgraft.errors import ModelError
from clipgraft.models.clip import Clip, family_of
from clipgraft.models.meta import clip_on_meta
from clipgraft.models.names import is_module_of, path_site, site_path
from clipgraft.models.sites import EMBEDDING_ROLES, TOWERS, Site, Tower

sys.path.insert(0, str(Path(__file__).resolve().parent.parent / "tests" / "helpers"))

from round_trips import Kind, RoundTrip, kinds_of, peft_base, plain_towers, round_trips, stand_in

PAGE = Path(__file__).parents[1] / "docs" / "models.md"
_CLASSES = (
    *("CLIPModel", "SiglipModel", "Siglip2Model", "AltCLIPModel", "ChineseCLIPModel"),
    *("VisionTextDualEncoderModel", "CLIPTextModel", "CLIPTextModelWithProjection", "CLIPVisionModel"),
    *("CLIPVisionModelWithProjection", "CLIPSegModel", "ClapModel"),
)
# Sizes of the text towers that open_clip borrows, whose configurations lie on the hub.
_XLM = {"vocab_size": 250_002, "max_position_embeddings": 514, "type_vocab_size": 1}
_XLM_LARGE = {
    "hidden_size": 1024,
    "num_hidden_layers": 24,
    "num_attention_heads": 16,
    "intermediate_size": 4096,
}
_MT5 = {"vocab_size": 250_112}
_NLLB = {"vocab_size": 256_206, "d_model": 1024, "encoder_attention_heads": 16}
_BORROWED: dict[str, tuple[str, dict[str, int]]] = {
    "roberta-base": ("Roberta", {**_XLM, "vocab_size": 50_265}),
    "xlm-roberta-base": ("XLMRoberta", _XLM),
    "xlm-roberta-large": ("XLMRoberta", {**_XLM, **_XLM_LARGE}),
    "google/mt5-base": ("MT5", {**_MT5, "d_model": 768, "d_ff": 2048, "num_layers": 12, "num_heads": 12}),
    "google/mt5-xl": ("MT5", {**_MT5, "d_model": 2048, "d_ff": 5120, "num_layers": 24, "num_heads": 32}),
    "facebook/nllb-200-distilled-600M": (
        "M2M100",
        {**_NLLB, "encoder_layers": 12, "encoder_ffn_dim": 4096},
    ),
    "facebook/nllb-200-distilled-1.3B": (
        "M2M100",
        {**_NLLB, "encoder_layers": 24, "encoder_ffn_dim": 8192},
    ),
}
_HEAD = """\
# Models and their sites

This page is written by `python scripts/models_table.py` (open_clip {open_clip}, transformers {transformers}).
Each model is built without its weights, and asked what clipgraft can do with it.

- **Sites** are the places that can carry LoRA. `12 × (q k v out fc1 fc2)` are the roles of twelve blocks; the
  others are of the whole tower. A role that only some blocks have is listed for all. `--lora-targets` takes
  sets (`linear`, `vision-attention`, `pooling`, `convolutions`), patterns (`vision.*.gate`) and sites
  (`vision.pool_q`). A set that reaches only a part of a tower says so before training.
- **Text cut**: the pooled token sees nothing behind it, so that padding is cut off. A tower without a causal
  mask, or pooled at its last position as SigLIP's, attends to its padding: its texts are never cut.
- **Plain**: towers (`T` text, `V` vision) that clipgraft's own engine computes ([speed](speed.md)). Others
  run their library's own forward, which is exact and slower. Features of a frozen tower are cached for all.
- **Files**: the class of transformers in whose names an adapter is saved. `all` sites open in stock PEFT on
  that class, or all but those that are named: PEFT refuses an adapter of these, and clipgraft opens it. A
  model with a text tower of transformers inside open_clip is opened by PEFT itself, on the open_clip model.
  `–` stands where there is no such class: there the adapter is clipgraft's own.
- **Round trip**: an adapter of all sites, with random A and B, is saved and loaded into a fresh copy of the
  base (`file`), and one of the sites that PEFT has modules for is opened with stock PEFT. **Merge**: the
  adapter is merged, and unmerged again, which gives back every weight to the bit. Numbers are the largest
  difference of the features over the largest feature, of the worse tower; `exact` is the same to the bit.
  They are **measured on** [small models](#small-models) with random weights whose towers are built alike:
  their sites have the same roles, in modules and weights of the same names and kinds.
- Text towers that open_clip borrows from transformers are built in the sizes of their configurations on the
  hub, which the script holds.

Gradients, and every site alone, are compared with explicit weights W + s·B·A on small versions, too
(`tests/parity/test_vision_towers.py`, `tests/parity/test_text_towers.py`, `tests/parity/test_siglip.py` and
`tests/parity/test_site_roles.py`). Where a weight is read without its module being called (EVA-01, EVA-02-E,
attention pooling of ResNets, position tables, SigLIP's pooling attention in transformers), dropout does not
act on the adapter's path, and training says so.

Stems of several convolutions, squeeze-and-excitation and tables of relative positions carry no LoRA.

"""
_COLUMNS = (
    "| model | tower | text sites | vision sites | text cut | plain "
    "| files | round trip | merge | measured on |\n|---|---|---|---|---|---|---|---|---|---|\n"
)
_SMALL_MODELS = """
## Small models

What the numbers above are measured on. **Weights** are where an adapter finds them: modules of their own
(`linear`, `embedding`, `conv`), rows of a module that is called (`rows`), what attention reads without a call
(`fused`, `read`), and Parameters (`table`, `projection`). **Models** counts the rows above that a small tower
stands for. **Moved** is how far the adapter moves the features, which the errors are to be compared with.

| small model | tower | weights | models | moved | file | PEFT | merge |
|---|---|---|---|---|---|---|---|
"""


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
    trip: str = ""
    merge: str = ""
    kinds: tuple[Kind, ...] = ()
    failure: str = ""

    def line(self) -> str:
        """The row of the table."""
        if self.failure:
            return f"| {self.name} | {self.failure} {'| ' * 8}|"
        measured = " + ".join(dict.fromkeys(stand_in(kind) or "nothing" for kind in self.kinds))
        sites = (self.text, self.vision, self.cut, self.plain, self.files)
        cells = (self.name, self.tower, *sites, self.trip, self.merge, measured)
        return f"| {' | '.join(cells)} |"


def openclip_row(name: str) -> Row:
    """A model of open_clip's list."""
    config = open_clip.get_model_config(name)
    borrowed = config["text_cfg"].get("hf_model_name")
    try:
        if not borrowed:
            return _row(name, clip_on_meta(name))
        with tempfile.TemporaryDirectory() as folder:
            kind, sizes = _BORROWED[borrowed]
            getattr(transformers, f"{kind}Config")(**sizes).save_pretrained(folder)
            config["text_cfg"] |= {"hf_model_name": folder, "hf_tokenizer_name": folder}
            path = Path(folder) / "model.json"
            path.write_text(json.dumps(config), encoding="utf-8")
            return _row(name, clip_on_meta(path))
    except ModelError as error:
        return Row(name, failure=str(error))


def transformers_row(kind: str) -> Row:
    """A class of transformers with its default configuration."""
    name, build = f"transformers.{kind}", getattr(transformers, kind)
    with torch.device("meta"):
        model = build(_default_config(build))
    try:
        return _row(name, Clip(model, family_of(model)))
    except ModelError as error:
        return Row(name, failure=str(error))


def _default_config(build: Any) -> Any:
    """The configuration of a class as it comes; one of several towers gets BERT and ViT."""
    kind = build.config_class
    if kind is not transformers.VisionTextDualEncoderConfig:
        return kind()
    towers = transformers.ViTConfig(), transformers.BertConfig()
    return kind.from_vision_text_configs(*towers)


def _row(name: str, clip: Clip) -> Row:
    sites, family = clip.sites, clip.family
    has_texts = any(site.tower == "text" for site in sites)
    tokens = torch.zeros(1, clip.context_length if has_texts else 1, dtype=torch.long)
    plain = plain_towers(clip)
    cut = "yes" if has_texts and family.text_ends(clip.model, tokens) is not None else "no"
    kinds, no_peft = tuple(kinds_of(clip).values()), _why_no_peft(clip)
    return Row(
        name,
        _tower_name(clip),
        _summary(sites, "text"),
        _summary(sites, "vision"),
        cut if has_texts else "–",
        " ".join(tower[0].upper() for tower in TOWERS if plain[tower]) or "–",
        _files(clip, no_peft),
        _round_trip(kinds, no_peft),
        _merge(kinds),
        kinds,
    )


def _measured(kinds: Iterable[Kind]) -> list[RoundTrip] | None:
    """What was measured on the small towers of these kinds; None where one of them has none."""
    named = [(kind, stand_in(kind)) for kind in kinds]
    found = [round_trips(small)[kind.tower] for kind, small in named if small is not None]
    return found if len(found) == len(named) else None


def _round_trip(kinds: tuple[Kind, ...], no_peft: str) -> str:
    measured = _measured(kinds)
    if measured is None:
        return _unmeasured(kinds)
    file = f"file {_error(max(trip.file for trip in measured))}"
    if no_peft:
        return f"{file}; no PEFT: {no_peft}"
    errors = [trip.peft for trip in measured if trip.peft is not None]
    return f"{file}; PEFT {_error(max(errors)) if errors else 'not measured'}"


def _merge(kinds: tuple[Kind, ...]) -> str:
    measured = _measured(kinds)
    if measured is None:
        return _unmeasured(kinds)
    error = _error(max(trip.merged for trip in measured))
    return error if all(trip.undone for trip in measured) else f"{error}, not undone to the bit"


def _unmeasured(kinds: tuple[Kind, ...]) -> str:
    towers = [kind.tower for kind in kinds if stand_in(kind) is None]
    return f"not measured: no small model has such a {' and '.join(towers)} tower"


def _why_no_peft(clip: Clip) -> str:
    """Why no class of transformers holds a model, so that PEFT has nothing to open its adapter on."""
    try:
        peft_base(clip)
    except ModelError as error:
        return str(error).rpartition(": ")[2].partition(";")[0]
    return ""


def _error(share: float) -> str:
    """`3e-7`."""
    number, _, power = f"{share:.0e}".partition("e")
    return f"{number}e{int(power)}" if share else "exact"


def _tower_name(clip: Clip) -> str:
    model = clip.model
    visual = getattr(model, "visual", None) or getattr(model, "vision_model", None) or model
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


def _files(clip: Clip, no_peft: str) -> str:
    twin = clip.family.twin(clip.model)
    wrong = [site for site in clip.sites if path_site(site_path(site, twin), twin) != site]
    if wrong:
        return f"cannot be saved: {wrong[0]}"
    if no_peft:
        return "–"
    foreign = [site for site in clip.sites if not is_module_of(site, twin)]
    if len(foreign) == len(clip.sites):
        return "–"
    whole = [tower for tower in TOWERS if {site for site in clip.sites if site.tower == tower} <= {*foreign}]
    towers = [f"the {tower} tower" for tower in whole if any(site.tower == tower for site in clip.sites)]
    others = [*towers, *(str(site) for site in foreign if site.tower not in whole)]
    return f"{twin.name}: all" + (f" but {', '.join(others)}" if others else "")


def page() -> str:
    """The whole page."""
    versions = {"open_clip": open_clip.__version__, "transformers": transformers.__version__}
    listed: Iterator[Row] = (openclip_row(name) for name in open_clip.list_models())
    rows = [*map(transformers_row, _CLASSES), *listed]
    lines = "\n".join(row.line() for row in rows)
    return _HEAD.format(**versions) + _COLUMNS + lines + "\n" + _SMALL_MODELS + _small_models(rows)


def _small_models(rows: Iterable[Row]) -> str:
    """A line for each small tower that stands for one of a row."""
    counts = Counter(kind for row in rows for kind in row.kinds)
    return "".join(
        f"{_small_line(kind, small, count)}\n"
        for kind, count in counts.items()
        if (small := stand_in(kind)) is not None
    )


def _small_line(kind: Kind, small: str, count: int) -> str:
    trip = round_trips(small)[kind.tower]
    weights = " ".join(sorted({place.kind for place in kind.places}))
    peft = "–" if trip.peft is None else _error(trip.peft)
    numbers = (f"{trip.moved:.1f}", _error(trip.file), peft, _error(trip.merged))
    return f"| {' | '.join((small, kind.tower, weights, str(count), *numbers))} |"


if __name__ == "__main__":
    # What stock PEFT has no module for stands in the table.
    logging.getLogger("clipgraft").setLevel(logging.ERROR)
    PAGE.write_text(page(), encoding="utf-8")
