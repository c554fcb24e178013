"""The HTTP server's routes: one file a dialect, over a `clipgraft.serve.messages.Backend`; no torch here."""

from clipgraft.serve.api.app import create_app as create_app

__all__ = ["create_app"]
