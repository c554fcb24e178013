"""`clipgraft data`."""

from __future__ import annotations

import logging
from collections.abc import Sequence
from typing import TYPE_CHECKING

from clipgraft.cli import checks
from clipgraft.cli.flags.groups import AnyGroup, Group
from clipgraft.cli.flags.shared import ModelFlags, TableFlags, features_of
from clipgraft.cli.flags.tools import ExamineFlags
from clipgraft.cli.parser import parse
from clipgraft.cli.pretty import show
from clipgraft.errors import together
from clipgraft.text_tables import Table

if TYPE_CHECKING:
    from clipgraft.data.datasets import Pairs
    from clipgraft.data.examine import OddPairs

log = logging.getLogger("clipgraft")
_SUMMARY = "Look at images with captions before training on them, and split them by image without leaks."
_SHOWN = 10  # groups of images that are alike
# `--split` of other commands names a part to read; here it says how to make parts.
_KINDS: list[AnyGroup] = [ExamineFlags, ModelFlags, Group(TableFlags, names={"split": "part"})]


def run_data(argv: Sequence[str]) -> None:
    """Parse, read, print what is found, and write the parts and the contact sheet that are asked for."""
    spec, model, table = parse("data", _SUMMARY, _KINDS, argv)
    _check(spec, model)
    from clipgraft.data.contact_sheet import write_contact_sheet
    from clipgraft.data.examine import same_files
    from clipgraft.data.reader import read_pairs
    from clipgraft.progress import showing

    with showing(None, "checking images") as told:
        pairs = read_pairs(spec.source, table, workers=table.workers, progress=told)
    assert pairs.report is not None
    log.info("%s", pairs.report.summary())
    show(_lengths(pairs))
    alike = same_files(pairs)
    if "model" in model.model_fields_set:
        near, odd = _by_features(pairs, spec, model, table)
        show(_alike(pairs, near, spec.near), odd.table() if odd else "")
        alike += near
    else:
        log.info(
            "not looked for: images that are nearly the same, and odd pairs; a base finds them: add --model"
        )
    if spec.contact_sheet is not None:
        log.info("wrote %s", write_contact_sheet(pairs, spec.contact_sheet))
    if spec.split is not None:
        _split(pairs, alike, spec)


def _check(spec: ExamineFlags, model: ModelFlags) -> None:
    """Raise ConfigError with all faults that no flag alone shows."""
    from clipgraft.data.splitting import check_shares, part_files

    faults = []
    if (spec.split is None) != (spec.out is None):
        faults.append("--split and --out go together: how to split, and the folder that the parts go to")
    if spec.split is not None:
        faults += [f"--split: {fault}" for fault in checks.fault_of(lambda: check_shares(spec.split or ()))]
    given = sorted({"near", "odd"} & spec.model_fields_set)
    if given and "model" not in model.model_fields_set:
        faults.append(f"{' and '.join(f'--{name}' for name in given)}: needs a base, add --model")
    if spec.contact_sheet is not None and spec.contact_sheet.suffix.lower() not in (".jpg", ".jpeg", ".png"):
        faults.append(f"--contact-sheet {spec.contact_sheet}: name a .jpg or .png")
    for name, path in (("--out", spec.out), ("--contact-sheet", spec.contact_sheet)):
        if path is not None:
            faults += checks.output_faults(name, path, folder=name == "--out")
    if spec.split is not None and spec.out is not None:
        out, count = spec.out, len(spec.split)
        faults += checks.fault_of(lambda: part_files(out, count, spec.overwrite))
    if spec.contact_sheet is not None and spec.contact_sheet.exists() and not spec.overwrite:
        faults.append(
            f"--contact-sheet {spec.contact_sheet}: is there already; choose another name, or --overwrite"
        )
    if faults:
        raise together(faults)


def _by_features(
    pairs: Pairs, spec: ExamineFlags, model: ModelFlags, table: TableFlags
) -> tuple[list[tuple[int, ...]], OddPairs]:
    """Find images that are nearly the same, and the pairs that the base finds least similar."""
    from clipgraft.cli.common import load_model
    from clipgraft.data.examine import near_duplicates, oddest_pairs
    from clipgraft.data.features import encode_captions, encode_images

    clip = load_model(model)
    images = encode_images(clip, pairs.images, features_of(table, model.autocast))
    captions = encode_captions(clip, [caption for _, caption in pairs.rows()])
    return near_duplicates(images, spec.near), oddest_pairs(pairs, images, captions, spec.odd)


def _lengths(pairs: Pairs) -> Table:
    from clipgraft.data.examine import caption_lengths

    found = caption_lengths(pairs)
    row = (str(n) for n in (found.fewest, found.median, found.nineteen_of_twenty, found.most))
    columns = ("", "fewest", "median", "19 of 20 up to", "most")
    return Table("Lengths of captions", columns, (("words", *row),))


def _alike(pairs: Pairs, groups: Sequence[tuple[int, ...]], at_least: float) -> Table | str:
    if not groups:
        return f"No two images are nearly the same (cosine of {at_least:g} or more)."
    images = sum(map(len, groups))
    rows = [
        (
            str(len(group)),
            " ".join(pairs.images[i].name for i in group[:4]) + (" …" if len(group) > 4 else ""),
        )
        for group in sorted(groups, key=len, reverse=True)[:_SHOWN]
    ]
    title = (
        f"{images:,} images in {len(groups):,} groups are nearly the same (cosine of {at_least:g} or more)"
    )
    note = f"The {_SHOWN} largest groups." if len(groups) > _SHOWN else ""
    return Table(title, ("images", "files"), tuple(rows), note, left=(1,))


def _split(pairs: Pairs, alike: Sequence[tuple[int, ...]], spec: ExamineFlags) -> None:
    from clipgraft.data.splitting import split_pairs, write_parts

    assert spec.split is not None
    assert spec.out is not None
    parts = split_pairs(pairs, spec.split, alike, spec.seed)
    paths = write_parts(parts, spec.out, spec.overwrite)
    for path, part in zip(paths, parts, strict=True):
        log.info("wrote %s: %s images, %s captions", path, f"{len(part):,}", f"{len(part.rows()):,}")
    whole = sum(map(len, parts))
    log.info(
        "%s images of %s are in a part; those that are alike are in one", f"{whole:,}", f"{len(pairs):,}"
    )
