"""Lets a browser that knows no token see a page that asks for one, on the loopback address."""

from __future__ import annotations

import threading
import urllib.error
import urllib.request
from collections.abc import Iterator
from contextlib import contextmanager
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from typing import Any


@contextmanager
def with_token(url: str, token: str) -> Iterator[str]:
    """Address under which everything of `url` is read with the token added."""

    class Handler(BaseHTTPRequestHandler):
        def do_GET(self) -> None:
            asked = urllib.request.Request(f"{url}{self.path}")
            asked.add_header("Authorization", f"Bearer {token}")
            try:
                with urllib.request.urlopen(asked, timeout=60) as page:
                    self.answer(page.status, page.headers.get("Content-Type"), page.read())
            except urllib.error.HTTPError as error:
                self.answer(error.code, "text/plain", error.read())

        def answer(self, status: int, kind: str | None, content: bytes) -> None:
            self.send_response(status)
            self.send_header("Content-Type", kind or "application/octet-stream")
            self.send_header("Content-Length", str(len(content)))
            self.end_headers()
            self.wfile.write(content)

        def log_message(self, format: str, *words: Any) -> None:
            """Says nothing."""

    with ThreadingHTTPServer(("127.0.0.1", 0), Handler) as server:
        thread = threading.Thread(target=server.serve_forever, daemon=True)
        thread.start()
        try:
            yield f"http://127.0.0.1:{server.server_port}"
        finally:
            server.shutdown()
            thread.join()
