"""Flags of serving, declared once: all of them are options of the library."""

from __future__ import annotations

from clipgraft.cli.flags.shared import ModelFlags
from clipgraft.serve.args import ServiceArgs, WebArgs

SERVE = (ModelFlags, ServiceArgs, WebArgs)
