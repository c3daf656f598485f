"""As much of the hub as reading a data set asks for, served from a folder on this machine."""

import hashlib
import json
import re
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from urllib.parse import unquote, urlparse

COMMIT = "0123456789abcdef0123456789abcdef01234567"


@contextmanager
def serving(folder: Path, repository: str) -> Iterator[ThreadingHTTPServer]:
    """A server of one data set, until the block ends; `server.fetched` lists the files that were asked for."""

    class Hub(BaseHTTPRequestHandler):
        def do_GET(self):
            path = unquote(urlparse(self.path).path)
            if match := re.fullmatch(f"/datasets/{repository}/resolve/[^/]+/(.+)", path):
                return self.send_file(folder / match[1])
            if match := re.fullmatch(f"/api/datasets/{repository}(/(revision|tree).*)?", path):
                return self.send_listing(match[2])
            return self.send(404, b"{}")

        do_HEAD = do_GET  # noqa: N815

        def send_listing(self, kind):
            files = [path for path in sorted(folder.rglob("*")) if path.is_file()]
            about = [
                {"type": "file", "oid": digest(path), "size": path.stat().st_size, "path": name(path)} for path in files
            ]
            if kind in (None, "revision"):
                about = {"id": repository, "sha": COMMIT, "siblings": [{"rfilename": name(path)} for path in files]}
            self.send(200, json.dumps(about).encode())

        def send_file(self, path):
            if not path.is_file():
                return self.send(404, b"{}", **{"X-Error-Code": "EntryNotFound"})
            if self.command == "GET":
                self.server.fetched.append(name(path))
            return self.send(200, path.read_bytes(), **{"ETag": f'"{digest(path)}"', "X-Repo-Commit": COMMIT})

        def send(self, code, content, **headers):
            self.send_response(code)
            for key, value in {"Content-Length": str(len(content)), **headers}.items():
                self.send_header(key, value)
            self.end_headers()
            if self.command != "HEAD":
                self.wfile.write(content)

        def log_message(self, *_):
            """Not on the console."""

    def name(path):
        return path.relative_to(folder).as_posix()

    def digest(path):
        return hashlib.sha1(path.read_bytes()).hexdigest()

    server = ThreadingHTTPServer(("127.0.0.1", 0), Hub)
    server.fetched = []
    threading.Thread(target=server.serve_forever, daemon=True).start()
    try:
        yield server
    finally:
        server.shutdown()
        server.server_close()
