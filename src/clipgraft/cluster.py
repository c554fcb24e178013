"""A connection to a Ray cluster, or to one that is started on this machine for the duration."""

from __future__ import annotations

import logging
import os
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

from clipgraft.errors import ConfigError

_LOCAL = "local"


@contextmanager
def connected(address: str | None) -> Iterator[Any]:
    """Yield Ray, connected or started for the duration if it is not connected already.

    Raises:
        ConfigError: there is no cluster at the address.
    """
    import ray
    import ray.util.scheduling_strategies

    if ray.is_initialized():
        yield ray
        return
    where = address or os.environ.get("RAY_ADDRESS") or _LOCAL
    options: dict[str, Any] = {"log_to_driver": False, "logging_level": logging.ERROR}
    if where == _LOCAL:
        os.environ.setdefault("RAY_USAGE_STATS_ENABLED", "0")
        options["include_dashboard"] = False
    try:
        ray.init(address=where, **options)
    # Ray raises whatever its network library does.
    except Exception as error:
        raise ConfigError(
            f"`ray_address={where!r}`: cannot be reached ({last_line(error)}); check the address and its "
            "token, start Ray there by `ray start --head`, or give local"
        ) from error
    try:
        yield ray
    finally:
        ray.shutdown()


def last_line(error: BaseException) -> str:
    """Return the last line of a message: of errors that passed through Ray, the one with the cause."""
    lines = [line.strip() for line in str(error).splitlines() if line.strip()]
    return f"{type(error).__name__}: {lines[-1]}" if lines else type(error).__name__
