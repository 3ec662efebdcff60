"""An OpenAI-compatible server on this machine, for tests, with faults on demand.

    with OpenAiServer(lambda body: "8 9\\nBecause …") as server:
        server.faults = ["prose", "half", 500]      # what the next requests get instead, one each

Faults: a status number; "prose", "half", "empty" (replies without two scores); "null" (no content); "no choices"; "html" (200 and a page);
"torn" (the connection dies midway in the body); "hang up" (it dies before any). `die_after`: hang up on everything from that request on.
"""

from __future__ import annotations

import json
import threading
from collections.abc import Callable
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from typing import Any

REPLIES = {
    "prose": "Both assistants did well, I would say.",
    "half": "8",
    "empty": "",
    "comma": "8, 9\nWith a comma.",
}


class OpenAiServer:
    """Answers /chat/completions. `requests` holds the bodies, `keys` the Authorization headers."""

    def __init__(self, answer: Callable[[dict[str, Any]], str]) -> None:
        self.answer = answer
        self.faults: list[int | str] = []
        self.die_after: int | None = None
        self.requests: list[dict[str, Any]] = []
        self.keys: list[str] = []
        self.usage = True
        self.lock = threading.Lock()
        self._server = ThreadingHTTPServer(("127.0.0.1", 0), _handler(self))
        self._server.daemon_threads = True

    @property
    def url(self) -> str:
        return f"http://127.0.0.1:{self._server.server_address[1]}/v1"

    def __enter__(self) -> OpenAiServer:
        threading.Thread(target=self._server.serve_forever, args=(0.02,), daemon=True).start()
        return self

    def __exit__(self, *exc: object) -> None:
        self._server.shutdown()
        self._server.server_close()

    def completion(self, text: str | None) -> dict[str, Any]:
        message = {"role": "assistant", "content": text}
        data: dict[str, Any] = {"id": "1", "object": "chat.completion", "created": 0, "model": "m"}
        data["choices"] = [{"index": 0, "finish_reason": "stop", "message": message}]
        if self.usage:
            data["usage"] = {"prompt_tokens": 100, "completion_tokens": 10, "total_tokens": 110}
        return data


def _handler(server: OpenAiServer) -> type[BaseHTTPRequestHandler]:
    class Handler(BaseHTTPRequestHandler):
        protocol_version = "HTTP/1.1"

        def do_POST(self) -> None:
            body = json.loads(self.rfile.read(int(self.headers["Content-Length"])))
            with server.lock:
                server.requests.append(body)
                server.keys.append(self.headers.get("Authorization", ""))
                fault = server.faults.pop(0) if server.faults else None
                if server.die_after is not None and len(server.requests) > server.die_after:
                    fault = "hang up"
            if fault == "hang up":
                self.close_connection = True
            elif fault == "html":
                self.reply(200, b"<html>busy</html>", "text/html")
            elif isinstance(fault, int):
                self.reply(fault, json.dumps({"error": {"message": f"fault {fault}", "type": "fault"}}).encode())
            elif fault == "torn":
                self.reply(200, json.dumps(server.completion("8 9")).encode(), keep=20)
            elif fault == "no choices":
                self.reply(200, json.dumps(server.completion("") | {"choices": []}).encode())
            elif fault == "null":
                self.reply(200, json.dumps(server.completion(None)).encode())
            else:
                text = REPLIES[fault] if isinstance(fault, str) else server.answer(body)
                self.reply(200, json.dumps(server.completion(text)).encode())

        def reply(self, status: int, body: bytes, kind: str = "application/json", keep: int | None = None) -> None:
            self.send_response(status)
            self.send_header("Content-Type", kind)
            self.send_header("Content-Length", str(len(body)))
            self.send_header("retry-after-ms", "1")  # so that tests of retries take no time
            self.end_headers()
            self.wfile.write(body[:keep])
            if keep is not None:
                self.wfile.flush()
                self.close_connection = True

        def log_message(self, format: str, *args: object) -> None:
            """Nothing on stderr."""

    return Handler
