"""The command line: parse, call the library, print."""

from clipgraft.cli.main import main

__all__ = ["main"]
