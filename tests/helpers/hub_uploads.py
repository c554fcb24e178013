"""A local address like the Hugging Face hub that takes uploads, as far as `HfApi.upload_folder` needs it.

Small files come in the commit itself, weights through the protocol of Git LFS. Whoever sends the token `read`
may not write; without a token nobody may.
"""

from __future__ import annotations

import base64
import hashlib
import json
import re
from pathlib import Path
from typing import Any
from urllib.parse import unquote, urlsplit

from hub_server import COMMIT, HubServer, _Handler

_COMMIT = re.compile(r"/api/models/(?P<repo>[^/]+/[^/]+)/commit/[^/]+")
_PREUPLOAD = re.compile(r"/api/models/(?P<repo>[^/]+/[^/]+)/preupload/[^/]+")
_BATCH = re.compile(r"/(?P<repo>[^/]+/[^/]+)\.git/info/lfs/objects/batch")


class UploadHub(HubServer):
    """Keep what is uploaded below `root/OWNER/NAME`; `private` lists the repositories that are."""

    def __init__(self, root: Path) -> None:
        self.blobs: dict[str, bytes] = {}
        self.private: set[str] = set()
        super().__init__(root)

    @property
    def handler(self) -> type[_Handler]:
        return _UploadHandler


class _UploadHandler(_Handler):
    hub: UploadHub

    def do_POST(self) -> None:
        path = unquote(urlsplit(self.path).path)
        body = self.rfile.read(int(self.headers.get("Content-Length") or 0))
        self.hub.requests.append(f"POST {path}")
        if path == "/api/validate-yaml":
            self._json({"errors": [], "warnings": []})
        elif self.headers.get("Authorization") != "Bearer write":
            self._refuse(401 if "Authorization" not in self.headers else 403, "")
        elif path == "/api/repos/create":
            self._create(json.loads(body))
        elif match := _PREUPLOAD.fullmatch(path):
            files = json.loads(body)["files"]
            self._json(
                {
                    "files": [
                        {
                            "path": file["path"],
                            "uploadMode": "lfs" if file["path"].endswith(".safetensors") else "regular",
                            "shouldIgnore": False,
                        }
                        for file in files
                    ]
                }
            )
        elif _BATCH.fullmatch(path):
            asked = json.loads(body)["objects"]
            objects = [
                {**o, "actions": {"upload": {"href": f"{self.hub.url}/blob/{o['oid']}"}}} for o in asked
            ]
            self._json({"transfer": "basic", "objects": objects})
        elif match := _COMMIT.fullmatch(path):
            self._commit(match["repo"], body)
        else:
            self._refuse(404, "EntryNotFound")

    def do_PUT(self) -> None:
        oid = self.path.rpartition("/")[2]
        body = self.rfile.read(int(self.headers["Content-Length"]))
        assert hashlib.sha256(body).hexdigest() == oid
        self.hub.blobs[oid] = body
        self._send(200, b"")

    def _create(self, asked: dict[str, Any]) -> None:
        repo = f"{asked.get('organization') or 'someone'}/{asked['name']}"
        folder = self.hub.root / repo
        if asked.get("private"):
            self.hub.private.add(repo)
        status = 409 if folder.is_dir() else 200
        folder.mkdir(parents=True, exist_ok=True)
        self._json({"url": f"{self.hub.url}/{repo}"}, status)

    def _commit(self, repo: str, body: bytes) -> None:
        folder = self.hub.root / repo
        for line in body.decode().splitlines():
            entry = json.loads(line)
            value = entry["value"]
            if entry["key"] == "file":
                (folder / value["path"]).write_bytes(base64.b64decode(value["content"]))
            elif entry["key"] == "lfsFile":
                (folder / value["path"]).write_bytes(self.hub.blobs[value["oid"]])
        self._json({"commitUrl": f"{self.hub.url}/{repo}/commit/{COMMIT}", "commitOid": COMMIT})

    def _json(self, value: Any, status: int = 200) -> None:
        self._send(status, json.dumps(value).encode())
