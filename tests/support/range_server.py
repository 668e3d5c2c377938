"""A web server that sends ranges of files, which Python's own does not; and one that fails or ignores ranges."""

import http.server
import re
import threading
from collections.abc import Generator
from contextlib import contextmanager
from functools import partial
from pathlib import Path


class RangeHandler(http.server.SimpleHTTPRequestHandler):
    """Sends `Range: bytes=a-b`. The first `failures` requests get an error; `ranges` false sends whole files."""

    failures, ranges, requests = 0, True, 0

    def do_GET(self) -> None:
        cls = type(self)
        cls.requests += 1
        path = Path(self.translate_path(self.path))
        if cls.failures:
            cls.failures -= 1
            self.send_error(503)
            return
        if not path.is_file():
            self.send_error(404)
            return
        first, last, status = 0, path.stat().st_size - 1, 200
        match = re.fullmatch(r"bytes=(\d+)-(\d*)", self.headers.get("Range", ""))
        if match and cls.ranges:
            first, last, status = int(match[1]), min(last, int(match[2] or last)), 206
        with path.open("rb") as file:
            file.seek(first)
            content = file.read(max(0, last + 1 - first))
        self.send_response(status)
        self.send_header("Content-Length", str(len(content)))
        self.end_headers()
        self.wfile.write(content)

    def log_message(self, *_) -> None:
        pass


@contextmanager
def serve(folder: Path) -> Generator[tuple[str, type[RangeHandler]]]:
    """Serve a folder; yield its URL and the handler, whose settings may be changed."""
    handler = type("Handler", (RangeHandler,), {})
    server = http.server.ThreadingHTTPServer(("127.0.0.1", 0), partial(handler, directory=str(folder)))
    threading.Thread(target=server.serve_forever, daemon=True).start()
    try:
        yield f"http://127.0.0.1:{server.server_port}", handler
    finally:
        server.shutdown()
        server.server_close()
