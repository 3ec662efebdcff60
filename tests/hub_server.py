"""A hub for tests, on this machine: what huggingface_hub's client needs of one, with faults on demand.

    with HubServer({"me/model": {"config.json": b"{}", "model.safetensors": b"..."}}) as hub:
        monkeypatch.setenv("HF_ENDPOINT", hub.url)
        hub.cut_after = 1000        # the next body ends after 1,000 bytes and the connection is closed

Files ending in .safetensors or .bin are served as large files, with their SHA-256, by a redirect to another host name (localhost for
127.0.0.1), as hubs do; the others by git's hash.
"""

from __future__ import annotations

import hashlib
import json
import threading
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from typing import Any
from urllib.parse import unquote, urlsplit

COMMIT = "0123456789abcdef0123456789abcdef01234567"
_LARGE = (".safetensors", ".bin")


def blob_sha1(data: bytes) -> str:
    return hashlib.sha1(b"blob %d\0" % len(data) + data).hexdigest()


class HubServer:
    """Serves repositories: {repo: {file: bytes}}, each at the one commit COMMIT, which is also `main`."""

    def __init__(self, repos: dict[str, dict[str, bytes]]) -> None:
        self.repos = repos
        # The next body of a large file is cut after so many bytes; None: not. Used up by one request unless `cut_always`.
        self.cut_after: int | None = None
        self.cut_always = False
        # Served instead of the file's own bytes, with the file's own headers.
        self.corrupt: dict[str, bytes] = {}
        # Status that every request gets.
        self.refuse: int | None = None
        # (method, path, Range header) of each request, and which of those to the second host carried a token.
        self.requests: list[tuple[str, str, str | None]] = []
        self.leaked_tokens: list[str] = []
        self._server = ThreadingHTTPServer(("127.0.0.1", 0), _handler(self))
        self._server.daemon_threads = True

    @property
    def url(self) -> str:
        return f"http://127.0.0.1:{self._server.server_address[1]}"

    def __enter__(self) -> HubServer:
        threading.Thread(target=self._server.serve_forever, args=(0.05,), daemon=True).start()
        return self

    def __exit__(self, *exc: object) -> None:
        self._server.shutdown()
        self._server.server_close()

    def listing(self, repo: str) -> dict[str, Any]:
        siblings = []
        for name, data in self.repos[repo].items():
            row: dict[str, Any] = {"rfilename": name, "size": len(data), "blobId": blob_sha1(data)}
            if name.endswith(_LARGE):
                row["lfs"] = {"size": len(data), "sha256": hashlib.sha256(data).hexdigest(), "pointerSize": 130}
            siblings.append(row)
        return {"_id": "1", "id": repo, "modelId": repo, "sha": COMMIT, "siblings": siblings, "tags": [], "private": False, "downloads": 0}


def _handler(hub: HubServer) -> type[BaseHTTPRequestHandler]:
    class Handler(BaseHTTPRequestHandler):
        protocol_version = "HTTP/1.1"

        def log_message(self, format: str, *args: Any) -> None:
            pass

        def do_HEAD(self) -> None:
            self.answer(body=False)

        def do_GET(self) -> None:
            self.answer(body=True)

        def answer(self, body: bool) -> None:
            path = unquote(urlsplit(self.path).path)
            hub.requests.append((self.command, path, self.headers.get("Range")))
            if hub.refuse:
                return self.send(hub.refuse, b"{}", {})
            parts = path.strip("/").split("/")
            if parts[:2] == ["api", "models"]:
                return self.answer_listing("/".join(parts[2:4]), parts[5] if len(parts) > 5 else "main")
            repo = "/".join(parts[:2])
            if parts[0] == "cdn":
                if self.headers.get("Authorization"):
                    hub.leaked_tokens.append(path)
                return self.answer_file("/".join(parts[1:3]), "/".join(parts[3:]), body)
            if len(parts) > 4 and parts[2] == "resolve" and parts[3] in (COMMIT, "main") and "/".join(parts[4:]) in hub.repos.get(repo, {}):
                name = "/".join(parts[4:])
                if name.endswith(_LARGE):
                    port = self.server.server_address[1]  # type: ignore[index]
                    return self.send(302, b"", {"Location": f"http://localhost:{port}/cdn/{repo}/{name}"})
                return self.answer_file(repo, name, body)
            return self.send(404, b"", {"X-Error-Code": "EntryNotFound"})

        def answer_listing(self, repo: str, revision: str) -> None:
            if repo not in hub.repos:
                return self.send(404, b"{}", {"X-Error-Code": "RepoNotFound"})
            if revision not in (COMMIT, "main"):
                return self.send(404, b"{}", {"X-Error-Code": "RevisionNotFound"})
            return self.send(200, json.dumps(hub.listing(repo)).encode(), {"Content-Type": "application/json"})

        def answer_file(self, repo: str, name: str, body: bool) -> None:
            data = hub.corrupt.get(name, hub.repos[repo][name])
            large = name.endswith(_LARGE)
            etag = hashlib.sha256(hub.repos[repo][name]).hexdigest() if large else blob_sha1(hub.repos[repo][name])
            headers = {"ETag": f'"{etag}"', "X-Repo-Commit": COMMIT, "Accept-Ranges": "bytes"}
            status = 200
            asked = self.headers.get("Range")
            if asked:
                start = int(asked.removeprefix("bytes=").split("-")[0])
                headers["Content-Range"] = f"bytes {start}-{len(data) - 1}/{len(data)}"
                data, status = data[start:], 206
            self.send(status, data, headers, body=body, cut=large)

        def send(self, status: int, data: bytes, headers: dict[str, str], body: bool = True, cut: bool = False) -> None:
            self.send_response(status)
            for name, value in headers.items():
                self.send_header(name, value)
            self.send_header("Content-Length", str(len(data)))
            self.end_headers()
            if not body:
                return
            if cut and hub.cut_after is not None:
                data = data[: hub.cut_after]
                if not hub.cut_always:
                    hub.cut_after = None
                self.close_connection = True
            self.wfile.write(data)

    return Handler
