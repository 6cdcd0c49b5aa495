"""A chat model as judge on this machine: an HTTP server that scores a response by its first number."""

from __future__ import annotations

import json
import re
import threading
import time
from collections import Counter
from collections.abc import Callable
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from typing import Any

Reply = tuple[int, dict[str, str], bytes]


def completion(content: object, finish_reason: str | None = "stop", **message: str) -> Reply:
    said = {"role": "assistant", "content": content, **message}
    body = {"choices": [{"message": said, "finish_reason": finish_reason}]}
    return 200, {}, json.dumps(body).encode()


def error(status: int, text: str = "no", **headers: str) -> Reply:
    return status, headers, json.dumps({"error": {"message": text}}).encode()


class JudgeServer:
    """Serves until it is left.

    Args:
        reply: (question's text, how often it has been asked, this time included) -> reply; ``None``: the first number
            of the response, as score.
        delay: seconds before each reply.

    Attributes:
        asked: question's text -> times.
        requests: bodies, with the headers under ``headers``.
        most_at_once: requests that were under way together.
    """

    def __init__(self, reply: Callable[[str, int], Reply] | None = None, delay: float = 0.0) -> None:
        self.reply, self.delay = reply or by_number, delay
        self.asked: Counter[str] = Counter()
        self.requests: list[dict[str, Any]] = []
        self.most_at_once = self._at_once = 0
        self._lock = threading.Lock()
        judge = self

        class Handler(BaseHTTPRequestHandler):
            protocol_version = "HTTP/1.1"

            def do_POST(self) -> None:
                body = json.loads(self.rfile.read(int(self.headers["Content-Length"])))
                text = body["messages"][-1]["content"]
                with judge._lock:
                    judge.asked[text] += 1
                    judge.requests.append(body | {"headers": dict(self.headers), "path": self.path})
                    judge._at_once += 1
                    judge.most_at_once = max(judge.most_at_once, judge._at_once)
                    times = judge.asked[text]
                try:
                    time.sleep(judge.delay)
                    status, headers, payload = judge.reply(text, times)
                finally:
                    with judge._lock:
                        judge._at_once -= 1
                try:
                    self.send_response(status)
                    for name, value in headers.items():
                        self.send_header(name.replace("_", "-"), value)
                    self.send_header("Content-Length", str(len(payload)))
                    self.end_headers()
                    self.wfile.write(payload)
                except OSError:  # whoever asked has gone
                    self.close_connection = True

            def log_message(self, *_: Any) -> None:
                pass

        class Server(ThreadingHTTPServer):
            daemon_threads = True
            request_queue_size = 128

            def handle_error(self, *_: Any) -> None:  # whoever asked has gone
                pass

        self._server = Server(("127.0.0.1", 0), Handler)
        self.url = f"http://127.0.0.1:{self._server.server_port}/v1"

    def __enter__(self) -> JudgeServer:
        threading.Thread(target=self._server.serve_forever, args=(0.05,), daemon=True).start()
        return self

    def __exit__(self, *_: Any) -> None:
        self._server.shutdown()
        self._server.server_close()


def by_number(text: str, _: int) -> Reply:
    found = re.search(r"<response>.*?(\d+)", text, re.DOTALL)
    return completion(f"It says so.\nScore: {found[1] if found else 'none'}")
