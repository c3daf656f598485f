"""As much of the hub as reading a data set asks for, served from a folder on this machine."""

import hashlib
import json
import re
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from urllib.parse import parse_qs, unquote, urlparse

COMMIT = "0123456789abcdef0123456789abcdef01234567"


def serve(folder: Path, repository: str) -> ThreadingHTTPServer:
    """A server of one data set, to be started by the caller; `server.fetched` lists the files that were asked for."""

    class Hub(BaseHTTPRequestHandler):
        def do_GET(self):
            path = unquote(urlparse(self.path).path)
            if match := re.fullmatch(f"/datasets/{repository}/resolve/[^/]+/(.+)", path):
                return self.send_file(folder / match[1])
            if match := re.fullmatch(f"/api/datasets/{repository}(/(revision|tree|paths-info).*)?", path):
                return self.send_listing(match[2])
            return self.send(404, b"{}")

        do_HEAD = do_GET  # noqa: N815

        def do_POST(self):
            self.body = self.rfile.read(int(self.headers.get("Content-Length", 0)))
            self.do_GET()

        def send_listing(self, kind):
            files = [path for path in sorted(folder.rglob("*")) if path.is_file()]
            about = [
                {"type": "file", "oid": digest(path), "size": path.stat().st_size, "path": name(path)} for path in files
            ]
            if kind == "paths-info":
                paths = (
                    parse_qs(self.body.decode())["paths"] if self.body[:1] != b"{" else json.loads(self.body)["paths"]
                )
                about = [entry for entry in about if entry["path"] in paths]
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
    return server
