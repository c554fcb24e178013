"""The exceptions clipgraft raises on purpose.

Every message says what was wrong, where, and what to do now, in one line. The command line turns an
exception into its message and `exit_code`; anything that is not a `ClipgraftError` is a bug.
"""

from __future__ import annotations

from collections.abc import Iterable

from clipgraft.shown import one_line


class ClipgraftError(Exception):
    """Base of every error clipgraft raises on purpose."""

    exit_code = 2
    faults: tuple[str, ...] = ()

    @property
    def lines(self) -> tuple[str, ...]:
        """The message by lines: one, or one for each fault; line ends within it are those of names."""
        return self.faults or (one_line(str(self)),)


class ConfigError(ClipgraftError):
    """A flag, spec field or argument has a value that cannot be used."""


def together(faults: Iterable[str]) -> ConfigError:
    """One error that tells several faults, a line each."""
    lines = tuple(one_line(fault) for fault in faults)
    error = ConfigError("\n".join(lines))
    error.faults = lines
    return error


class ModelError(ClipgraftError):
    """A base model cannot be found, read or understood."""


class TargetError(ClipgraftError):
    """A target set or a per-site override matches no site of the model."""


class DataError(ClipgraftError):
    """Images, captions or the table that pairs them cannot be used."""


class AdapterError(ClipgraftError):
    """An adapter file is damaged, foreign, or was made for another base."""


class CheckpointError(ClipgraftError):
    """A training checkpoint is missing, damaged, or belongs to another run."""


class TrainingError(ClipgraftError):
    """Training started and cannot go on: NaN loss, wrong gradients."""

    exit_code = 1


class ClusterError(ClipgraftError):
    """The machines or processes that work was spread over failed it; what they finished is kept."""

    exit_code = 1


class HubError(ClipgraftError):
    """The Hugging Face hub refuses an upload, or cannot be reached."""

    exit_code = 1


class BusyError(ClipgraftError):
    """Another process is at work in a folder that this one wants to write to."""


class WriteError(ClipgraftError):
    """A file cannot be written: no room, no permission, a quota. Nothing half written is left.

    Attributes:
        what: which file, and why.
        advice: what to do now.
    """

    def __init__(self, what: str, advice: str = "then run it again") -> None:
        super().__init__(f"{what}; {advice}")
        self.what = what
        self.advice = advice

    def __reduce__(self) -> tuple[type[WriteError], tuple[str, str]]:
        return WriteError, (self.what, self.advice)


class UnknownNameError(ClipgraftError):
    """A request names an adapter, folder or model that is not served."""


class ItemError(DataError):
    """One item of a request cannot be used.

    Attributes:
        index: its number among the items, from 0.
        reason: why, in a few words.
    """

    def __init__(self, index: int, reason: str) -> None:
        super().__init__(f"item {index}: {reason}")
        self.index = index
        self.reason = reason

    def __reduce__(self) -> tuple[type[ItemError], tuple[int, str]]:
        return ItemError, (self.index, self.reason)


class RetryError(ClipgraftError):
    """A server cannot answer now, and may later.

    Attributes:
        reason: why.
        retry_after: seconds until it is worth another try.
    """

    exit_code = 1

    def __init__(self, reason: str, retry_after: float = 1.0) -> None:
        super().__init__(f"{reason}; try again in {retry_after:.0f} s")
        self.reason = reason
        self.retry_after = retry_after

    def __reduce__(self) -> tuple[type[RetryError], tuple[str, float]]:
        return type(self), (self.reason, self.retry_after)


class OverloadedError(RetryError):
    """More is waiting than can be answered in time."""


class UnavailableError(RetryError):
    """The model is starting, was lost, is stopping, or did not answer in time."""
