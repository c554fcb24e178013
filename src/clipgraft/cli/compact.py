"""`clipgraft compact`."""

from __future__ import annotations

import logging
import shlex
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from clipgraft.cli import checks
from clipgraft.cli.flags.groups import AnyGroup, flag, recorded
from clipgraft.cli.flags.shared import DeviceFlags, ModelFlags, TableFlags, features_of
from clipgraft.cli.flags.tools import COMPACT, DISTILL, CompactFlags, DistillFlags
from clipgraft.cli.parser import parse
from clipgraft.locks import sole_owner
from clipgraft.options import part
from clipgraft.train.args import TrainArgs

if TYPE_CHECKING:
    from clipgraft.compact.model import Compacted
    from clipgraft.data.datasets import Pairs
    from clipgraft.models.clip import Clip

log = logging.getLogger("clipgraft")
_SUMMARY = (
    "Build a smaller CLIP from some blocks and tokens of a base; --distill-data distils the base into it."
)


def run_compact(argv: Sequence[str]) -> None:
    """Parse, cut, distil if asked to, write, and say what was written."""
    kinds: list[AnyGroup] = [COMPACT, DISTILL, TableFlags, TrainArgs, DeviceFlags]
    spec, teaching, table, train, device = parse("compact", _SUMMARY, kinds, argv)
    _check_together(spec, teaching, table, train, device)
    folder = teaching.run or spec.out.with_name(f"{spec.out.name}-distill")
    from clipgraft.compact.model import check_out
    from clipgraft.train.run_folder import refuse_used

    check_out(spec.out)
    if teaching.distill_data is not None:
        refuse_used(folder, teaching.resume is not None)
    lock = spec.out.with_name(f".{spec.out.name}.lock")
    with sole_owner(lock, str(spec.out), "wait until it is written, or choose another path"):
        _make(argv, (spec, teaching, table, train, device), folder)


def _make(argv: Sequence[str], specs: Sequence[Any], folder: Path) -> None:
    """Cut, distil if asked to, write, and say what was written."""
    spec, teaching, table, _, device = specs
    from clipgraft.cli.common import load_model
    from clipgraft.compact.model import write_compact
    from clipgraft.train.loop import Interrupted
    from clipgraft.train.run_folder import early_lines

    try:
        with early_lines():
            base = load_model(ModelFlags(model=spec.model, pretrained=spec.pretrained, **device.model_dump()))
            compacted = _cut(base, spec, table)
            _train(base, compacted, specs, folder)
    except Interrupted as stop:
        more = "" if teaching.resume is not None else " --resume latest"
        raise Interrupted(
            f"{stop}; go on with: {shlex.join(['clipgraft', 'compact', *argv])}{more}"
        ) from None
    write_compact(compacted, spec.out)
    _report(spec.out)


def _check_together(
    spec: CompactFlags, teaching: DistillFlags, table: TableFlags, train: TrainArgs, device: DeviceFlags
) -> None:
    """Raise ConfigError for flags that do not go together, and for data that is not there."""
    faults = []
    given = sorted((teaching.model_fields_set - {"val_data"}) | train.model_fields_set)
    if given and teaching.distill_data is None:
        faults.append(f"{', '.join(map(flag, given))} given without --distill-data: add it, or drop them")
    if spec.vocab_lossy and (spec.vocab_from is None or spec.vocab_size is None):
        faults.append(
            "--vocab-lossy needs both --vocab-from and --vocab-size: the texts, and how many tokens"
        )
    for name in ("distill_data", "val_data"):
        path = getattr(teaching, name)
        if path is not None and not path.exists():
            faults.append(f"{flag(name)} {path}: there is no such file or folder; check the path")
        faults += checks.table_faults(flag(name), path, table)
    faults += train.epoch_faults() + checks.output_faults("OUT", spec.out, folder=True)
    faults += checks.output_faults("--run", teaching.run, folder=True) + checks.device_faults(device.device)
    if teaching.distill_data is not None:
        faults += checks.batch_faults(teaching.distill_data, table, train)
    checks.refuse(faults)


def _cut(base: Clip, spec: CompactFlags, table: TableFlags) -> Compacted:
    from clipgraft.compact.args import CompactArgs
    from clipgraft.compact.model import compact_model
    from clipgraft.data.args import TableArgs
    from clipgraft.data.reader import read_texts
    from clipgraft.options import part

    texts: dict[str, None] = {}
    for source in spec.vocab_from or ():
        found = read_texts(Path(source).expanduser(), part(table, TableArgs))
        log.info("%s: %d texts", source, len(found))
        texts.update(dict.fromkeys(found))
    if base.family.name != "transformers":
        log.info("converting to transformers")
    wanted = None if spec.vocab_from is None else tuple(texts)
    compacted = compact_model(base, part(spec, CompactArgs), texts=wanted)
    _describe(compacted)
    return compacted


def _describe(compacted: Compacted) -> None:
    """Log what is kept of the base."""
    for tower, blocks in (("text", compacted.text_blocks), ("vision", compacted.vision_blocks)):
        log.info("%s blocks kept: %s", tower, ", ".join(map(str, blocks)))
    if (cut := compacted.vocabulary) is not None:
        log.info("tokens kept: %s of %s", f"{len(cut.token_ids):,}", f"{cut.before:,}")
        if cut.unchanged < cut.texts:
            log.info(
                "%s of %s texts are split as before, the others into smaller pieces",
                f"{cut.unchanged:,}",
                f"{cut.texts:,}",
            )
    share = 100 * compacted.parameters / compacted.base_parameters
    log.info(
        "parameters: %s of %s (%.1f %%)",
        f"{compacted.parameters:,}",
        f"{compacted.base_parameters:,}",
        share,
    )


def _train(base: Clip, compacted: Compacted, specs: Sequence[Any], folder: Path) -> None:
    """Measure base and smaller model if there is validation data, and distil if asked to."""
    from clipgraft.cli.read_data import read_table

    _, teaching, table, train, device = specs
    val = None
    if teaching.val_data is not None:
        val = read_table(compacted.clip, teaching.val_data, table, "validation data")
        for name, clip in (("base", base), ("smaller model", compacted.clip)):
            _measure(name, clip, val, table, device)
    if teaching.distill_data is None:
        return
    from clipgraft.train.args import DistillArgs, RunArgs
    from clipgraft.train.fit import distill

    pairs = read_table(compacted.clip, teaching.distill_data, table, "training data")
    given = recorded([COMPACT, DISTILL, TableFlags, TrainArgs, DeviceFlags], specs)
    resume = teaching.resume is not None
    distill(
        compacted.clip,
        base,
        pairs,
        val,
        weights=part(teaching, DistillArgs),
        run=RunArgs(out=folder, resume=resume, save_frequency=0, params=given),
        train=train,
        features=features_of(table, device.autocast),
    )


def _measure(name: str, clip: Clip, val: Pairs, table: TableFlags, device: DeviceFlags) -> None:
    from clipgraft.data.args import FeatureArgs
    from clipgraft.evaluate.metrics import headline
    from clipgraft.evaluate.retrieval import evaluate_retrieval

    metrics = evaluate_retrieval(
        clip, val, part(table, FeatureArgs, autocast=device.autocast, feature_cache=None)
    )
    log.info("%s: %s", name, headline(metrics))


def _report(out: Path) -> None:
    from clipgraft.models.export import size_on_disk

    log.info("wrote transformers: %s (%.1f MB)", out, size_on_disk(out) / 1e6)
