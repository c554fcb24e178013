"""`clipgraft report`."""

from __future__ import annotations

import logging
from collections.abc import Sequence
from typing import TYPE_CHECKING

from clipgraft.cli import checks
from clipgraft.cli.flags.groups import flag
from clipgraft.cli.flags.shared import ClassFlags, PromptFlags, features_of
from clipgraft.cli.flags.tools import ReportFlags
from clipgraft.cli.parser import parse
from clipgraft.data.args import CacheArgs, ColumnArgs
from clipgraft.errors import ConfigError, together
from clipgraft.options import Options
from clipgraft.ours import refuse_foreign

if TYPE_CHECKING:
    from clipgraft.report.evaluate_run import ComputeOptions
    from clipgraft.report.examples import RetainedData

log = logging.getLogger("clipgraft")
_SUMMARY = "Write one HTML page on runs and sweeps: table, curves, retrieved images, what was forgotten."


def run_report(argv: Sequence[str]) -> None:
    """Parse, read runs, measure what is missing, and write the page."""
    kinds: list[type[Options]] = [ReportFlags, ColumnArgs, PromptFlags, CacheArgs]
    spec, columns, prompts, images = parse("report", _SUMMARY, kinds, argv)
    _check(spec, columns, prompts)
    from clipgraft.report.write_report import require_packages, write_report

    require_packages()

    def computing() -> ComputeOptions:
        from clipgraft.cli.common import pick_device
        from clipgraft.report.evaluate_run import ComputeOptions

        return ComputeOptions(pick_device(spec.device), features_of(images))

    retained = _retained(spec, columns, prompts)
    out = write_report(
        spec.runs,
        spec.out,
        examples=spec.examples,
        retained=retained,
        computing=computing,
        overwrite=spec.overwrite,
    )
    log.info("wrote %s (%.1f MB)", out, out.stat().st_size / 1e6)


def _check(spec: ReportFlags, columns: ColumnArgs, prompts: PromptFlags) -> None:
    """Raise ConfigError with all faults that no field alone can see."""
    faults = []
    given = sorted(columns.model_fields_set | prompts.model_fields_set)
    given += ["retained_task"] if "retained_task" in spec.model_fields_set else []
    if given and spec.retained is None:
        faults.append(f"{', '.join(map(flag, given))} belong to --retained: name those data too")
    for name, path in (("retained", spec.retained), ("prompts", prompts.prompts)):
        if path is not None and not path.exists():
            faults.append(f"{flag(name)} {path}: there is no such file or folder; check the path")
    if spec.out.is_dir():
        faults.append(f"--out {spec.out} is a folder: name a file in it, like {spec.out / 'report.html'}")
    else:
        faults += checks.output_faults("--out", spec.out)
    classification = ClassFlags(**prompts.model_dump(exclude_unset=True), task=spec.retained_task)
    faults += checks.table_faults("--retained", spec.retained, columns, classification)
    faults += checks.device_faults(spec.device)
    if faults:
        raise together(faults)
    refuse_foreign(spec.out, spec.overwrite, ConfigError, "--out")


def _retained(spec: ReportFlags, columns: ColumnArgs, prompts: PromptFlags) -> RetainedData | None:
    from clipgraft.report.examples import RetainedData

    if spec.retained is None:
        return None
    captions = spec.retained_task == "retrieval"
    key = {} if captions else {"csv_label_key": prompts.csv_label_key}
    return RetainedData(
        spec.retained,
        spec.retained_task,
        {**columns.model_dump(), **key},
        prompts.prompts,
        prompts.templates,
    )
