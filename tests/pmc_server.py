"""A server of article packages for tests, on this machine, with faults on demand.

    with PmcServer({"oa_package/aa/PMC1.tar.gz": bytes}) as server:
        server.cut["oa_package/aa/PMC1.tar.gz"] = [1000, 500]   # the next two bodies end early and the connection is closed

Understands Range and If-Range, as PMC's does. `status` makes a path answer with an error a number of times.
"""

from __future__ import annotations

import hashlib
import threading
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from typing import Any


class PmcServer:
    """Serves `files` by path, without a leading slash."""

    def __init__(self, files: dict[str, bytes]) -> None:
        self.files = files
        # Lengths after which the next bodies of a path are cut.
        self.cut: dict[str, list[int]] = {}
        # (status, headers) of the next answers of a path.
        self.status: dict[str, list[tuple[int, dict[str, str]]]] = {}
        self.ranges = True
        self.lengths = True
        self.requests: list[tuple[str, str | None]] = []
        self._server = ThreadingHTTPServer(("127.0.0.1", 0), _handler(self))
        self._server.daemon_threads = True

    @property
    def url(self) -> str:
        return f"http://127.0.0.1:{self._server.server_address[1]}"

    def __enter__(self) -> PmcServer:
        threading.Thread(target=self._server.serve_forever, args=(0.05,), daemon=True).start()
        return self

    def __exit__(self, *exc: object) -> None:
        self._server.shutdown()
        self._server.server_close()

    def count(self, path: str) -> int:
        """Requests for a path."""
        return sum(asked == path for asked, _ in self.requests)


def _handler(server: PmcServer) -> type[BaseHTTPRequestHandler]:
    class Handler(BaseHTTPRequestHandler):
        def log_message(self, format: str, *args: Any) -> None:
            pass

        def do_GET(self) -> None:
            path, asked = self.path.lstrip("/"), self.headers.get("Range")
            server.requests.append((path, asked))
            if server.status.get(path):
                status, headers = server.status[path].pop(0)
                return self.answer(status, b"", headers)
            if path not in server.files:
                return self.answer(404, b"", {})
            data = server.files[path]
            tag = f'"{hashlib.sha256(data).hexdigest()[:16]}"'
            if asked and server.ranges and self.headers.get("If-Range") == tag:
                start = int(asked.removeprefix("bytes=").rstrip("-"))
                if start >= len(data):
                    return self.answer(416, b"", {"Content-Range": f"bytes */{len(data)}"})
                headers = {"ETag": tag, "Content-Range": f"bytes {start}-{len(data) - 1}/{len(data)}"}
                return self.answer(206, data[start:], headers, path)
            return self.answer(200, data, {"ETag": tag}, path)

        def answer(self, status: int, data: bytes, headers: dict[str, str], path: str = "") -> None:
            self.send_response(status)
            for name, value in headers.items():
                self.send_header(name, value)
            if server.lengths:
                self.send_header("Content-Length", str(len(data)))
            self.end_headers()
            if server.cut.get(path):
                data = data[: server.cut[path].pop(0)]
            self.wfile.write(data)

    return Handler
