"""Whether this process is one of several, found out without importing torch."""

from __future__ import annotations

import os
from collections.abc import Mapping

_VARIABLES = ("RANK", "WORLD_SIZE", "MASTER_ADDR", "MASTER_PORT")


def several(environment: Mapping[str, str] = os.environ) -> bool:
    """Whether torchrun, or another launcher that sets its variables, started more processes than this one."""
    return all(environment.get(name) for name in _VARIABLES) and environment["WORLD_SIZE"] != "1"
