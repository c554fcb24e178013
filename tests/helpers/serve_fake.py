"""Serve a `FakeService` as `clipgraft serve` would: a program for tests of the web processes.

Usage: python serve_fake.py JSON_OF_WEB_ARGS JSON_OF_RECIPE
"""

from __future__ import annotations

import json
import logging
import sys
from pathlib import Path

from clipgraft.errors import ClipgraftError
from clipgraft.serve.args import WebArgs
from clipgraft.serve.launch import serve
from clipgraft.serve.listening import address_of, listen
from clipgraft.serve.web_process import Launch
from fake_service import Recipe


def main() -> int:
    """Serve, and print a line once a message was answered."""
    logging.basicConfig(level=logging.INFO, stream=sys.stderr, format="%(message)s")
    web = WebArgs(**json.loads(sys.argv[1]))
    recipe = json.loads(sys.argv[2])
    listening = listen(web)
    address = address_of(listening, web)
    launch = Launch(Recipe(**recipe | {"log": Path(recipe["log"])}), web)
    try:
        code = serve(launch, listening, lambda found: print(f"ready {address} {found.base}", flush=True))
    except ClipgraftError as error:
        print(error, file=sys.stderr)
        code = error.exit_code
    assert "torch" not in sys.modules
    return code


if __name__ == "__main__":
    sys.exit(main())
