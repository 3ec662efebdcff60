"""llama-server's first token, over HTTP: through its template, and without one where that refuses the image."""

from __future__ import annotations

import json
import threading
from collections.abc import Iterator
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from typing import Any

import numpy as np
import pytest

from bench.peers import _stream


class Server(BaseHTTPRequestHandler):
    """Answers as llama-server does; `refuses`: its template has no place for an image."""

    refuses = False
    asked: list[dict[str, Any]] = []

    def do_GET(self) -> None:
        self.reply(200, json.dumps({"media_marker": "<mark>"}))

    def do_POST(self) -> None:
        body = json.loads(self.rfile.read(int(self.headers["Content-Length"])))
        self.asked.append(body)
        chat = self.path.startswith("/v1")
        if chat and self.refuses:
            return self.reply(400, "no marker")
        pieces = ["", "a", "b"]
        events = [{"choices": [{"delta": {"content": piece}}]} if chat else {"content": piece} for piece in pieces]
        last = {"choices": []} if chat else {"content": "", "stop": True}
        self.reply(200, "".join(f"data: {json.dumps(e)}\n\n" for e in [*events, last | {"timings": {"predicted_per_second": 7.5}}]))

    def reply(self, code: int, text: str) -> None:
        self.send_response(code)
        self.end_headers()
        self.wfile.write(text.encode())

    def log_message(self, *_: object) -> None:
        pass


@pytest.fixture
def url() -> Iterator[str]:
    server = ThreadingHTTPServer(("127.0.0.1", 0), Server)
    thread = threading.Thread(target=server.serve_forever, daemon=True)
    thread.start()
    yield f"http://127.0.0.1:{server.server_address[1]}"
    server.shutdown()
    server.server_close()
    thread.join()


@pytest.mark.parametrize("refuses", [False, True])
def test_the_first_token_is_timed_either_way(url: str, refuses: bool, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(Server, "refuses", refuses)
    monkeypatch.setattr(Server, "asked", [])
    first_s, speed = _stream(url, np.zeros((4, 4, 3), np.uint8))
    assert 0 < first_s < 60 and speed == 7.5
    assert len(Server.asked) == 1 + refuses
    if refuses:
        assert "<mark>Describe" in Server.asked[-1]["prompt"]["prompt_string"]
