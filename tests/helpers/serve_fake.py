"""Serve a `FakeService` as `clipgraft serve` would: a program for tests of the web processes.

Usage: python serve_fake.py JSON_OF_WEB_ARGS [FOLDER_FOR_STARTS]
"""

from __future__ import annotations

import json
import logging
import sys
from pathlib import Path

from clipgraft.serve.args import WebArgs
from clipgraft.serve.launch import Launch, serve
from clipgraft.serve.listening import address_of, listen
from fake_service import Recipe


def main() -> int:
    """Serve, and print a line once a message was answered."""
    logging.basicConfig(level=logging.INFO, stream=sys.stderr, format="%(message)s")
    web = WebArgs(**json.loads(sys.argv[1]))
    log = Path(sys.argv[2]) if len(sys.argv) > 2 else None
    listening = listen(web)
    address = address_of(listening, web)
    code = serve(
        Launch(Recipe(log), web), listening, lambda found: print(f"ready {address} {found.base}", flush=True)
    )
    assert "torch" not in sys.modules
    return code


if __name__ == "__main__":
    sys.exit(main())
