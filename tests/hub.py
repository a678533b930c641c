"""A small server on loopback that speaks the Hugging Face Hub's protocol, with the faults that a test asks for."""

import hashlib
import json
import re
import threading
from collections.abc import Callable
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from typing import Any
from urllib.parse import parse_qs, unquote, urlsplit

COMMIT = "0123456789abcdef0123456789abcdef01234567"
PAGE = 2
"""Entries of a page of a listing."""


class Hub:
    """Serves one repository of data sets under `url`.

    Args:
        files: {path: content}. Those of more than 1,000 bytes are LFS files: listed with their sha256, and served from
            another path, to which the Hub redirects.

    Attributes that tests change:
        token: what a request must bring as its bearer; None: nothing.
        breaks: called with (path, first byte, content from there): how many bytes to send before the connection breaks;
            None: all.
        listed: {path: keys of its entry in the listing that are not true}.
        ranges: whether ranges are answered with a part.
        requests: [(method, path, Range)] of those for contents.
    """

    def __init__(self, repository: str, files: dict[str, bytes]) -> None:
        self.repository, self.files = repository, files
        self.commit = COMMIT
        self.token: str | None = None
        self.breaks: Callable[[str, int, bytes], int | None] = lambda path, begin, content: None
        self.listed: dict[str, dict[str, Any]] = {}
        self.ranges = True
        self.requests: list[tuple[str, str, str | None]] = []
        self.error: tuple[int, str] | None = None

        class Handler(_Handler):
            hub = self

        self._server = ThreadingHTTPServer(("127.0.0.1", 0), Handler)
        self._server.daemon_threads = True
        self.url = f"http://127.0.0.1:{self._server.server_port}"
        threading.Thread(target=self._server.serve_forever, daemon=True).start()

    def close(self) -> None:
        self._server.shutdown()
        self._server.server_close()


class _Handler(BaseHTTPRequestHandler):
    hub: Hub
    protocol_version = "HTTP/1.1"

    def log_message(self, format: str, *arguments: Any) -> None:
        pass

    def do_HEAD(self) -> None:
        self.do_GET()

    def do_GET(self) -> None:
        hub, url = self.hub, urlsplit(self.path)
        path = unquote(url.path)
        if match := re.fullmatch(r"/cdn/(.*)", path):
            self._content(match[1])
            return
        if hub.token is not None and self.headers.get("Authorization") != f"Bearer {hub.token}":
            self._json(401, {"error": "Invalid username or password."}, {"X-Error-Code": "RepoNotFound"})
        elif hub.error is not None:
            self._json(hub.error[0], {"error": hub.error[1]}, {"X-Error-Code": hub.error[1]})
        elif match := re.fullmatch(rf"/api/datasets/{hub.repository}(?:/revision/(\w+))?", path):
            self._info(match[1] or "main")
        elif match := re.fullmatch(rf"/api/datasets/{hub.repository}/tree/{hub.commit}/?(.*)", path):
            self._tree(match[1], parse_qs(url.query))
        elif match := re.fullmatch(rf"/datasets/{hub.repository}/resolve/(?:main|{hub.commit})/(.*)", path):
            self._resolve(match[1])
        else:
            self._json(404, {"error": "Repository not found"}, {"X-Error-Code": "RepoNotFound"})

    def _json(self, status: int, value: Any, headers: dict[str, str] | None = None) -> None:
        content = json.dumps(value).encode()
        self.send_response(status)
        for name, header in {"Content-Length": str(len(content)), **(headers or {})}.items():
            self.send_header(name, header)
        self.end_headers()
        if self.command != "HEAD":
            self.wfile.write(content)

    def _info(self, revision: str) -> None:
        if revision not in ("main", self.hub.commit):
            self._json(404, {"error": "Invalid rev id"}, {"X-Error-Code": "RevisionNotFound"})
            return
        siblings = [{"rfilename": path} for path in sorted(self.hub.files)]
        self._json(200, {"id": self.hub.repository, "sha": self.hub.commit, "siblings": siblings})

    def _tree(self, folder: str, query: dict[str, list[str]]) -> None:
        paths = [path for path in sorted(self.hub.files) if path.startswith(f"{folder}/" if folder else "")]
        begin = int(query.get("cursor", ["0"])[0])
        headers = {}
        if begin + PAGE < len(paths):
            following = f"{self.hub.url}{urlsplit(self.path).path}?recursive=true&cursor={begin + PAGE}"
            headers["Link"] = f'<{following}>; rel="next"'
        self._json(200, [self._entry(path) for path in paths[begin : begin + PAGE]], headers)

    def _entry(self, path: str) -> dict[str, Any]:
        content = self.hub.files[path]
        git = hashlib.sha1(b"blob %d\0" % len(content) + content).hexdigest()
        entry: dict[str, Any] = {"type": "file", "path": path, "size": len(content), "oid": git}
        if is_lfs(content):
            sha256 = hashlib.sha256(content).hexdigest()
            entry["lfs"] = {"oid": sha256, "size": len(content), "pointerSize": 134}
        changes = self.hub.listed.get(path, {})
        if "lfs" in entry and "lfs" in changes:
            entry["lfs"] |= changes["lfs"]
        return entry | {key: value for key, value in changes.items() if key != "lfs"}

    def _resolve(self, path: str) -> None:
        content = self.hub.files.get(path)
        if content is None:
            self._json(404, {"error": "Entry not found"}, {"X-Error-Code": "EntryNotFound"})
        elif is_lfs(content):
            self.send_response(302)
            self.send_header("Location", f"{self.hub.url}/cdn/{path}")
            self.send_header("X-Repo-Commit", self.hub.commit)
            self.send_header("X-Linked-Size", str(len(content)))
            self.send_header("X-Linked-ETag", f'"{hashlib.sha256(content).hexdigest()}"')
            self.send_header("Content-Length", "0")
            self.end_headers()
        else:
            self._content(path)

    def _content(self, path: str) -> None:
        content, asked = self.hub.files[path], self.headers.get("Range")
        self.hub.requests.append((self.command, path, asked))
        begin = int(re.fullmatch(r"bytes=(\d+)-", asked)[1]) if asked and self.hub.ranges else 0  # type: ignore[index]
        self.send_response(206 if begin else 200)
        if begin:
            self.send_header("Content-Range", f"bytes {begin}-{len(content) - 1}/{len(content)}")
        self.send_header("Content-Length", str(len(content) - begin))
        self.send_header("X-Repo-Commit", self.hub.commit)
        self.send_header("ETag", f'"{hashlib.sha1(content).hexdigest()}"')
        self.end_headers()
        if self.command == "HEAD":
            return
        sent = self.hub.breaks(path, begin, content[begin:])
        self.wfile.write(content[begin:] if sent is None else content[begin : begin + sent])
        if sent is not None:
            self.wfile.flush()
            self.close_connection = True


def is_lfs(content: bytes) -> bool:
    return len(content) > 1_000
