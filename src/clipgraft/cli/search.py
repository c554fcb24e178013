"""`clipgraft index` and `clipgraft search`: find vectors of an encoded folder."""

from __future__ import annotations

import json
import logging
import sys
from collections.abc import Sequence
from datetime import datetime
from pathlib import Path
from typing import TYPE_CHECKING, Any

from clipgraft.cli import checks
from clipgraft.cli.flags.search import IndexFlags, SearchFlags
from clipgraft.cli.parser import parse
from clipgraft.errors import ClipgraftError, ConfigError, together
from clipgraft.ours import refuse_foreign
from clipgraft.shown import shown, shown_line
from clipgraft.text_tables import aligned

if TYPE_CHECKING:
    from clipgraft.models.clip import Clip
    from clipgraft.search.searcher import Hit

log = logging.getLogger("clipgraft")
_INDEX = "Build a FAISS index beside the vectors of an encoded folder, or copy them into a vector store."
_SEARCH = "Find encoded images or texts by text, by image, or by both."
_CAPTION = 60  # characters of a caption in the table


def run_index(argv: Sequence[str]) -> None:
    """Parse, build the index, and print its recall; or copy the vectors, and print how many rows changed."""
    (spec,) = parse("index", _INDEX, [IndexFlags], argv)
    if spec.out.is_dir():
        checks.refuse(checks.output_faults("OUT", spec.out, folder=True))
    if spec.to is not None:
        if "factory" in spec.model_fields_set:
            raise ConfigError(f"--factory {spec.factory} is FAISS's, and --to builds none: drop one of them")
        copy_vectors(spec.out, spec.to, spec.overwrite)
        return
    from clipgraft.search.index import build_index

    for place, record in build_index(spec.out, spec.factory):
        if record.recall is None:
            found = "exact"
        else:
            found = f"recall@10 {record.recall:.3f} of exact search on stored vectors"
            found += "".join(f", {name} {value}" for name, value in (record.settings or {}).items())
        log.info("%s: %s, %s vectors of %d, %s", place, record.factory, f"{record.rows:,}", record.dim, found)


def copy_vectors(out: Path, to: str, overwrite: bool = False) -> None:
    """Copy the vectors of an encoded folder, and print how many rows changed in each place."""
    from clipgraft.search.export.driver import export_vectors

    for made in export_vectors(out, to, overwrite=overwrite):
        log.info(
            "%s: %s rows: %s added, %s updated, %s unchanged; %s removed; %s",
            made.target,
            *(f"{n:,}" for n in (made.rows, made.added, made.updated, made.unchanged, made.removed)),
            made.note,
        )


def run_search(argv: Sequence[str]) -> None:
    """Parse, load the base that the folder names, search, and print the results."""
    (spec,) = parse("search", _SEARCH, [SearchFlags], argv)
    faults = []
    if spec.text is None and spec.image is None:
        faults.append('nothing to search for: give a text in quotes, "a red shoe", or --image, or both')
    if spec.pretrained is not None and spec.model is None:
        faults.append(f"--pretrained {spec.pretrained} belongs to a --model: name it too")
    if faults:
        raise together(faults)
    if spec.text == "-" and (spec.html is not None or spec.image is not None):
        raise ConfigError("- reads texts from standard input: drop --html and --image, or give one text")
    if spec.html is not None:
        refuse_foreign(spec.html, spec.overwrite, ConfigError, "--html")
    swapped = spec.text is not None and (Path(spec.text) / "manifest.json").is_file()
    if swapped and not (spec.out / "manifest.json").exists():
        raise ConfigError(f"the encoded folder comes first: clipgraft search {spec.text} {str(spec.out)!r}")
    if spec.format == "json":
        _log_to_stderr()
    from clipgraft.cli.common import pick_device
    from clipgraft.search.searcher import load_model, query

    clip = load_model(
        spec.out,
        spec.adapter,
        model=spec.model,
        pretrained=spec.pretrained,
        device=pick_device(spec.device),
        force=spec.force,
        peft_out_proj=spec.peft_out_proj,
    )
    if spec.text == "-":
        _answer_lines(clip, spec)
        return
    hits = query(
        spec.out,
        spec.text,
        image=spec.image,
        image_weight=spec.image_weight,
        k=spec.k,
        where=spec.where,
        model=clip,
    )
    print(as_json(hits) if spec.format == "json" else as_table(hits))
    if spec.html is not None:
        from clipgraft.search.searcher import write_page

        title = " + ".join([part for part in (spec.text, spec.image and spec.image.name) if part])
        log.info("wrote %s", write_page(spec.html, title, hits, spec.image, spec.overwrite))


def _answer_lines(clip: Clip, spec: SearchFlags) -> None:
    """Answer each line of standard input as it comes; with --format json, each with a line of JSON.

    A line that cannot be answered is told, in its place, and the next one is read.
    """
    from clipgraft.search.searcher import query

    if hasattr(sys.stdin, "reconfigure"):
        sys.stdin.reconfigure(encoding="utf-8", errors="replace")
    for line in sys.stdin:
        text = line.strip()
        if not text:
            continue
        as_lines = spec.format == "json"
        try:
            hits = query(spec.out, text, k=spec.k, where=spec.where, model=clip)
        except ClipgraftError as error:
            answer = _json_line({"query": text, "error": str(error)}) if as_lines else f"{text}: {error}"
        else:
            rows = [hit.to_dict() for hit in hits]
            answer = _json_line({"query": text, "hits": rows}) if as_lines else f"{text}\n{as_table(hits)}\n"
        print(answer, flush=True)


def _json_line(value: dict[str, Any]) -> str:
    return shown(json.dumps(value, ensure_ascii=False, default=datetime.isoformat))


def as_table(hits: Sequence[Hit]) -> str:
    """Write one line per result: rank, score, path and caption; a long caption is cut."""
    if not hits:
        return "nothing was found"
    paths = any(hit.path for hit in hits)
    rows = [
        (f"{hit.rank:>4}", f"{hit.score:.4f}", *((hit.path or "",) if paths else ()), _cut(hit.caption or ""))
        for hit in hits
    ]
    return "\n".join(aligned(rows, left=(2, 3)))


def _cut(caption: str) -> str:
    caption = shown_line(caption)
    return caption if len(caption) <= _CAPTION else caption[: _CAPTION - 1] + "…"


def as_json(hits: Sequence[Hit]) -> str:
    """Write results as a JSON list of objects with rank, score, path, metadata; times in ISO 8601."""
    rows = [hit.to_dict() for hit in hits]
    return shown(json.dumps(rows, indent=2, ensure_ascii=False, default=datetime.isoformat))


def _log_to_stderr() -> None:
    """Send log lines to standard error, so that standard output holds only the JSON."""
    for handler in log.handlers:
        if isinstance(handler, logging.StreamHandler):
            handler.setStream(sys.stderr)
