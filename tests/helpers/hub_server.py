"""Serve folders at a local address like the Hugging Face hub, as far as downloads need it.

A file is at `/<owner>/<name>/resolve/<revision>/<path>`, with its commit in `X-Repo-Commit` and its hash in
`ETag`; `/api/models/<owner>/<name>` lists the files of a repository. Those of data sets are below `/datasets`
and `/api/datasets`. A refusal gives its reason in `X-Error-Code`. Repositories are the folders
`<root>/<owner>/<name>`; those of the owner `gated` are refused.
"""

from __future__ import annotations

import hashlib
import json
import re
import threading
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from urllib.parse import unquote, urlsplit

COMMIT = "0123456789abcdef0123456789abcdef01234567"
_FILE = re.compile(r"(?:/datasets)?/(?P<repo>[^/]+/[^/]+)/resolve/[^/]+/(?P<path>.+)")
_API = re.compile(r"/api/(?:models|datasets)/(?P<repo>[^/]+/[^/]+)(?P<tree>/tree/[^/]+)?(/.*)?")


class HubServer:
    """Serve the folder `root` until `stop`; `requests` lists what was asked for."""

    def __init__(self, root: Path) -> None:
        self.root = root
        self.requests: list[str] = []
        self._port = 0
        self.start()

    @property
    def handler(self) -> type[_Handler]:
        return _Handler

    @property
    def url(self) -> str:
        """The address for HF_ENDPOINT."""
        return f"http://127.0.0.1:{self._port}"

    def start(self) -> None:
        """Listen, at the same address as before."""
        handler = type("Handler", (self.handler,), {"hub": self})
        self._server = ThreadingHTTPServer(("127.0.0.1", self._port), handler)
        self._server.daemon_threads = True
        self._port = self._server.server_port
        threading.Thread(target=self._server.serve_forever, args=(0.05,), daemon=True).start()

    def stop(self) -> None:
        """Close the address."""
        self._server.shutdown()
        self._server.server_close()


class _Handler(BaseHTTPRequestHandler):
    hub: HubServer

    def do_HEAD(self) -> None:
        self._answer()

    def do_GET(self) -> None:
        self._answer()

    def _answer(self) -> None:
        path = unquote(urlsplit(self.path).path)
        self.hub.requests.append(f"{self.command} {path}")
        if path == "/":
            self._send(200, b"")
        elif match := _FILE.fullmatch(path):
            self._send_file(match["repo"], match["path"])
        elif match := _API.fullmatch(path):
            self._send_listing(match["repo"], bool(match["tree"]))
        else:
            self._refuse(404, "EntryNotFound")

    def _send_file(self, repo: str, path: str) -> None:
        if not self._readable(repo):
            return
        file = self.hub.root / repo / path
        if not file.is_file():
            self._refuse(404, "EntryNotFound")
            return
        content = file.read_bytes()
        self._send(200, content, ETag=f'"{hashlib.sha256(content).hexdigest()}"')

    def _send_listing(self, repo: str, tree: bool) -> None:
        if not self._readable(repo):
            return
        root = self.hub.root / repo
        files = sorted(path for path in root.rglob("*") if path.is_file())
        if tree:
            entries = [
                {
                    "type": "file",
                    "path": f.relative_to(root).as_posix(),
                    "size": f.stat().st_size,
                    "oid": COMMIT,
                }
                for f in files
            ]
            self._send(200, json.dumps(entries).encode())
            return
        siblings = [{"rfilename": file.relative_to(root).as_posix()} for file in files]
        self._send(200, json.dumps({"id": repo, "sha": COMMIT, "siblings": siblings}).encode())

    def _readable(self, repo: str) -> bool:
        if repo.startswith("gated/"):
            self._refuse(403, "GatedRepo")
        elif not (self.hub.root / repo).is_dir():
            self._refuse(401, "RepoNotFound")
        else:
            return True
        return False

    def _refuse(self, status: int, code: str) -> None:
        self._send(status, b"{}", **{"X-Error-Code": code, "X-Error-Message": f"{code} of the test hub"})

    def _send(self, status: int, content: bytes, **headers: str) -> None:
        self.send_response(status)
        self.send_header("Content-Length", str(len(content)))
        self.send_header("X-Repo-Commit", COMMIT)
        for name, value in headers.items():
            self.send_header(name, value)
        self.end_headers()
        if self.command != "HEAD":
            self.wfile.write(content)

    def log_message(self, format: str, *args: object) -> None:
        """Keep the test output clean."""
