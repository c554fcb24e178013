"""`clipgraft push`."""

from __future__ import annotations

import logging
import tempfile
from collections.abc import Sequence
from pathlib import Path

from clipgraft.cli.flags.groups import AnyGroup
from clipgraft.cli.flags.tools import PushFlags
from clipgraft.cli.parser import parse
from clipgraft.report.args import PushArgs

log = logging.getLogger("clipgraft")
_SUMMARY = "Publish an adapter on the Hugging Face hub, with a model card made from its run."


def run_push(argv: Sequence[str]) -> None:
    """Parse, upload, and say where it is; with `--dry-run` print what would be uploaded."""
    kinds: list[AnyGroup] = [PushFlags, PushArgs]
    spec, args = parse("push", _SUMMARY, kinds, argv)
    if spec.dry_run:
        _show(spec.run, spec.repository, args)
        return
    publish(spec.run, spec.repository, args)


def publish(source: Path, repository: str, args: PushArgs) -> None:
    """Upload, and say what was uploaded and what its user should know."""
    from clipgraft.report.publish import push

    pushed = push(source, repository, args)
    for note in pushed.notes:
        log.warning("%s", note)
    log.info("pushed %s (%.2f MB) to %s", ", ".join(pushed.files), pushed.bytes / 1e6, pushed.url)


def _show(source: Path, repository: str, args: PushArgs) -> None:
    from clipgraft.report.publish import stage

    with tempfile.TemporaryDirectory() as folder:
        staged = Path(folder)
        notes = stage(source, repository, args, staged)
        print((staged / "README.md").read_text(encoding="utf-8"))
        for path in sorted(staged.iterdir()):
            print(f"{path.name:<28} {path.stat().st_size:>12,} bytes")
        for note in notes:
            log.warning("%s", note)
        log.info("nothing was uploaded: a dry run")
