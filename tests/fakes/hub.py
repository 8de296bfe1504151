"""A model hub of one repository, as far as its own client's uploads go, written from that client's requests.

Independent of vitdeploy. Every file is taken in the commit itself, as the hub takes small ones.
"""

from __future__ import annotations

import base64
import json
import threading
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from typing import Any, Self

COMMIT = "c0ffee" * 6 + "beef"


class FakeHub:
    """A server in a thread of this process; a context manager.

    Args:
        token: what a request has to carry.
    """

    def __init__(self, token: str) -> None:
        self.token = token
        self.created: list[dict[str, Any]] = []
        """What repositories were asked for with."""
        self.files: dict[str, bytes] = {}
        """What has been committed."""
        hub = self

        class Handler(BaseHTTPRequestHandler):
            def do_GET(self) -> None:
                self._answer(404, {"error": "Repository not found"})

            def do_HEAD(self) -> None:
                self._answer(404, {})

            def do_POST(self) -> None:
                body = self.rfile.read(int(self.headers.get("Content-Length", 0)))
                if self.headers.get("Authorization") != f"Bearer {hub.token}":
                    self._answer(401, {"error": "Invalid username or password."})
                else:
                    self._answer(*hub.answer(self.path, body))

            def _answer(self, status: int, document: dict[str, Any]) -> None:
                data = json.dumps(document).encode()
                self.send_response(status)
                self.send_header("Content-Type", "application/json")
                self.send_header("Content-Length", str(len(data)))
                self.end_headers()
                if self.command != "HEAD":
                    self.wfile.write(data)

            def log_message(self, format: str, *args: object) -> None:
                pass

        self._server = ThreadingHTTPServer(("127.0.0.1", 0), Handler)
        self.url = f"http://127.0.0.1:{self._server.server_port}"

    def __enter__(self) -> Self:
        threading.Thread(target=self._server.serve_forever, daemon=True).start()
        return self

    def __exit__(self, *error: object) -> None:
        self._server.shutdown()
        self._server.server_close()

    def answer(self, path: str, body: bytes) -> tuple[int, dict[str, Any]]:
        """The status and the document for a POST."""
        if path == "/api/repos/create":
            wanted = json.loads(body)
            private = wanted.get("visibility") == "private" or bool(wanted.get("private"))
            self.created.append(
                {"name": wanted["name"], "organization": wanted["organization"], "private": private}
            )
            return 200, {"url": f"{self.url}/{wanted['organization']}/{wanted['name']}"}
        if path == "/api/validate-yaml":
            return 200, {"errors": [], "warnings": []}
        if path.endswith("/preupload/main"):
            paths = [file["path"] for file in json.loads(body)["files"]]
            return 200, {
                "files": [{"path": p, "uploadMode": "regular", "shouldIgnore": False} for p in paths]
            }
        if path.endswith("/commit/main"):
            for line in body.splitlines():
                entry = json.loads(line)
                if entry["key"] == "file":
                    value = entry["value"]
                    self.files[value["path"]] = base64.b64decode(value["content"])
            repository = path.removeprefix("/api/models/").removesuffix("/commit/main")
            url = f"{self.url}/{repository}/commit/{COMMIT}"
            return 200, {"success": True, "commitUrl": url, "commitOid": COMMIT, "hookOutput": ""}
        return 404, {"error": f"nothing at {path}"}
