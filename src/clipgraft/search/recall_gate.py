"""Measure what int8 loses on the user's own pairs before anything is encoded in it, and refuse too much."""

from __future__ import annotations

import logging
from collections.abc import Iterator
from pathlib import Path

from torch import Tensor

from clipgraft.data.args import FeatureArgs
from clipgraft.data.datasets import Pairs
from clipgraft.data.features import encode_captions, encode_images
from clipgraft.data.reader import read_pairs
from clipgraft.engine.encoder import Encoder
from clipgraft.errors import ConfigError, ModelError
from clipgraft.evaluate.recall_loss import BothSides, RecallLoss, recall_lost
from clipgraft.lora.control import set_adapter
from clipgraft.search.args import EncodeArgs
from clipgraft.search.folder import adapters_as_they_were
from clipgraft.search.manifest import Manifest, RecallNote, VectorSet

log = logging.getLogger("clipgraft")


def passed(encoder: Encoder, manifest: Manifest, args: EncodeArgs, switch: bool) -> tuple[RecallNote, ...]:
    """Return what int8 loses for each set of vectors: measured now, or as it was when the folder was begun.

    `encoder` computes in int8; fp32 is what it is compared with. The side that is not encoded, which queries
    are on, stays in fp32. `switch` chooses the adapter of each set in turn.

    Raises:
        ConfigError: there is nothing to measure it on, or it loses more than `args.max_recall_loss`.
        DataError: the table of pairs cannot be used.
        ModelError: the tower runs its own forward, which int8 would leave as it is.
    """
    tower = manifest.origin.tower
    if not encoder.is_plain(tower):
        raise ModelError(f"the {tower} tower of {manifest.origin.base} has no int8 form: leave int8 out")
    if args.gate is None:
        if manifest.recall:
            return manifest.recall
        raise ConfigError(
            "`int8` loses some recall, and there is nothing to measure it on: add `gate`, a table of images "
            "and captions of your own"
        )
    pairs = read_pairs(args.gate, workers=args.workers)
    notes = []
    for part, loss in _losses(encoder, manifest.sets, pairs, args, switch):
        by = f" with adapter {part.adapter}" if part.adapter else ""
        loss.require_at_most(args.max_recall_loss, f"int8{by}")
        log.info("int8%s loses %.2f points of recall at most: %s of %s", by, loss.points, loss, args.gate)
        notes.append(_note(part, loss, args.gate, args.max_recall_loss))
    return tuple(notes)


def _losses(
    encoder: Encoder, sets: tuple[VectorSet, ...], pairs: Pairs, args: EncodeArgs, switch: bool
) -> Iterator[tuple[VectorSet, RecallLoss]]:
    exact = Encoder(encoder.clip, False, encoder.attention, pack=False)
    with adapters_as_they_were(encoder.clip):
        for part in sets:
            if switch:
                set_adapter(encoder.clip, part.adapter)
            reference = (_images(exact, pairs, args), _texts(exact, pairs))
            lossy: BothSides = (
                (reference[0], _texts(encoder, pairs))
                if args.texts
                else (_images(encoder, pairs, args), reference[1])
            )
            yield part, recall_lost(reference, lossy, pairs)


def _images(encoder: Encoder, pairs: Pairs, args: EncodeArgs) -> Tensor:
    features = FeatureArgs(workers=args.workers, exact_preprocess=args.exact_preprocess)
    return encode_images(
        encoder.clip, pairs.images, features, encoder=encoder, batch_size=args.batch_size, label="gate"
    )


def _texts(encoder: Encoder, pairs: Pairs) -> Tensor:
    captions = [caption for group in pairs.captions for caption in group]
    return encode_captions(encoder.clip, captions, encoder=encoder)


def _note(part: VectorSet, loss: RecallLoss, table: Path, limit: float) -> RecallNote:
    return RecallNote(
        part.folder, str(table), loss.captions, loss.points, limit, loss.reference, loss.approximate
    )
