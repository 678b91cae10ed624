"""A web server of shards, on this machine only: the remote side of tests."""

import threading
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from typing import Self


class Server(ThreadingHTTPServer):
    """Serves a folder at `url` with ranges, lists nothing, and keeps the requests.

    Args:
        root: the folder.
        knows_ranges: False: the whole file is sent, whatever was asked for.
        failures: so many requests are answered with 503 first.
    """

    daemon_threads = True

    def __init__(self, root: Path, knows_ranges: bool = True, failures: int = 0) -> None:
        super().__init__(("127.0.0.1", 0), _Handler)
        self.root, self.knows_ranges, self.failures = root, knows_ranges, failures
        self.requests: list[tuple[str, str | None]] = []
        self.url = f"http://127.0.0.1:{self.server_port}/data"

    def __enter__(self) -> Self:
        threading.Thread(target=self.serve_forever, daemon=True).start()
        return self

    def __exit__(self, *_: object) -> None:
        self.shutdown()
        self.server_close()


class _Handler(BaseHTTPRequestHandler):
    server: Server

    def do_GET(self) -> None:
        """Answer a request for a file, or for a part of it."""
        span = self.headers.get("Range")
        self.server.requests.append((self.path.rpartition("/")[2], span))
        path = self.server.root / self.path.removeprefix("/data/")
        if self.server.failures:
            self.server.failures -= 1
            return self.send_error(503)
        if not path.is_file():
            return self.send_error(404)
        data = path.read_bytes()
        if span and self.server.knows_ranges:
            begin, end = map(int, span.removeprefix("bytes=").split("-"))
            if begin >= len(data):  # RFC 9110, 15.5.17
                self.send_response(416)
                self.send_header("Content-Range", f"bytes */{len(data)}")
                return self.end_headers()
            data = data[begin : end + 1]
            self.send_response(206)
            self.send_header("Content-Range", f"bytes {begin}-{begin + len(data) - 1}/{path.stat().st_size}")
        else:
            self.send_response(200)
        self.send_header("Content-Length", str(len(data)))
        self.end_headers()
        self.wfile.write(data)

    def log_message(self, *_: object) -> None:
        """Print nothing."""
