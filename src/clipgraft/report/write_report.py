"""Write one HTML page on runs, sweeps and few-shot comparisons."""

from __future__ import annotations

import importlib.util
import logging
from collections.abc import Callable, Sequence
from datetime import datetime
from pathlib import Path
from typing import TYPE_CHECKING

from clipgraft.errors import ClipgraftError, ConfigError
from clipgraft.files import write_text
from clipgraft.ours import refuse_foreign

if TYPE_CHECKING:
    from clipgraft.report.evaluate_run import ComputeOptions
    from clipgraft.report.examples import Examples, RetainedData, Retention
    from clipgraft.report.page import Section
    from clipgraft.report.runs import Run, Sweep

log = logging.getLogger("clipgraft")
_NEEDED = ("matplotlib", "jinja2")


def write_report(
    paths: Sequence[Path | str],
    out: Path | str,
    *,
    examples: bool = True,
    retained: RetainedData | None = None,
    computing: Callable[[], ComputeOptions] | None = None,
    overwrite: bool = False,
) -> Path:
    """Write one HTML page on runs, sweeps and few-shot comparisons that needs no other file and no network.

    Args:
        paths: run folders, as `train` and `fit` leave them, and folders of sweeps and of `fewshot`.
        out: the file to write; appears whole or not at all.
        examples: also show retrieved images, confusions and similarities. They need the base and the
            validation data, are computed once, and are kept in `results/` of each run. Where that is not
            possible, the page says why.
        retained: other data on which to measure what was forgotten.
        computing: gives the device and how images become features when something must be computed; by
            default the CPU, without a feature cache.
        overwrite: replace a file that is no page of ours.

    Returns:
        The file.

    Raises:
        ConfigError: matplotlib or jinja2 is not installed, or nothing is to be reported on.
        DataError: a path is none of them.
        CheckpointError: a file of a run is damaged.
    """
    require_packages()
    refuse_foreign(Path(out), overwrite, ConfigError, "`out`")
    if not paths:
        raise ConfigError("nothing to report on: name the folder of a run or of a sweep, like logs/NAME")
    from clipgraft.report.few_shot import FewShot
    from clipgraft.report.page import render
    from clipgraft.report.runs import read_sources
    from clipgraft.train.fewshot.results import is_comparison, read_comparison

    folders = list(dict.fromkeys(Path(path) for path in paths))
    few = [FewShot(path, read_comparison(path)) for path in folders if is_comparison(path)]
    sources = read_sources([path for path in folders if not is_comparison(path)])
    shown = [_section(source, examples, retained, computing or _on_the_cpu) for source in sources]
    name = "" if retained is None else str(retained.path)
    page = render(shown, few, with_examples=examples, retained=name, now=datetime.now())
    write_text(Path(out), page)
    return Path(out)


def require_packages() -> None:
    """Raise ConfigError if a package that only reports need is not installed."""
    missing = [name for name in _NEEDED if importlib.util.find_spec(name) is None]
    if missing:
        raise ConfigError(f"a report needs {' and '.join(missing)}: pip install 'clipgraft[report]'")


def _section(
    source: Run | Sweep,
    examples: bool,
    retained: RetainedData | None,
    computing: Callable[[], ComputeOptions],
) -> Section:
    """Measure what the page shows of a run or sweep; what cannot be measured becomes a note on the page."""
    from clipgraft.report.page import Section
    from clipgraft.report.runs import run_of

    run = run_of(source)
    notes: list[str] = []
    made = forgotten = None
    if run is not None and examples:
        try:
            made = _examples(run, computing)
        except ClipgraftError as error:
            notes.append(f"{source.name}: no examples. {error}.")
    if made is not None and made.missing:
        images = "image is" if made.missing == 1 else "images are"
        lost = f"{made.missing:,} validation {images} missing or unreadable"
        notes.append(f"{source.name}: {lost}, and left out.")
    if run is not None and retained is not None:
        try:
            forgotten = _forgotten(run, retained, computing)
        except ClipgraftError as error:
            notes.append(f"{source.name}: what was forgotten could not be measured. {error}.")
    for note in notes:
        log.info("%s", note)
    return Section(source, run, made, forgotten, tuple(notes))


def _examples(run: Run, computing: Callable[[], ComputeOptions]) -> Examples:
    """Read the examples from the run's folder, or compute them and keep them there."""
    from clipgraft.report.examples import store_examples, stored_examples

    known = stored_examples(run)
    if known is None:
        from clipgraft.report.evaluate_run import compute_examples

        log.info("choosing examples of %s, once", run.path)
        known = compute_examples(run, computing())
        store_examples(run, known)
    return known


def _forgotten(run: Run, retained: RetainedData, computing: Callable[[], ComputeOptions]) -> Retention:
    """Read the retention from the run's folder, or measure it and keep it there."""
    from clipgraft.report.examples import store_retention, stored_retention

    known = stored_retention(run, retained)
    if known is None:
        from clipgraft.report.evaluate_run import compute_retention

        log.info("measuring what %s forgot of %s, once", run.path, retained.path)
        known = compute_retention(run, retained, computing())
        store_retention(run, retained, known)
    return known


def _on_the_cpu() -> ComputeOptions:
    import torch

    from clipgraft.data.args import FeatureArgs
    from clipgraft.report.evaluate_run import ComputeOptions

    return ComputeOptions(torch.device("cpu"), FeatureArgs())
