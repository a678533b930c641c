"""An object store on this machine that speaks as much of S3 as s3fs asks for, and fails when it is told to."""

import random
import threading
import time
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from typing import Any

FAULTS = ("drop", "truncate", "delay", "corrupt", "refuse")


class ObjectServer:
    """Serves the folders under a root as buckets, over loopback. A context manager.

    faults: kinds that answers have by chance; chance: of each answer. asked: (method, path, bytes sent) of each answer.
    """

    def __init__(self, root: Path, faults: tuple[str, ...] = (), chance: float = 0.4, seed: int = 0) -> None:
        self.faults, self.chance, self.asked = faults, chance, list[tuple[str, str, int]]()
        dice, lock, server = random.Random(seed), threading.Lock(), self

        class Handler(BaseHTTPRequestHandler):
            protocol_version = "HTTP/1.1"

            def log_message(self, *arguments: Any) -> None:
                pass

            def do_HEAD(self) -> None:
                self.answer(with_body=False)

            def do_GET(self) -> None:
                self.answer(with_body=True)

            def answer(self, with_body: bool) -> None:
                path = root / self.path.partition("?")[0].lstrip("/")
                with lock:
                    fault = dice.choice(server.faults) if server.faults and dice.random() < server.chance else ""
                if fault == "drop":
                    self.close_connection = True
                    return
                if fault == "refuse" or not path.is_file():
                    status, code = (503, "SlowDown") if fault == "refuse" else (404, "NoSuchKey")
                    self.send(status, f"<Error><Code>{code}</Code></Error>".encode(), with_body)
                    return
                content, status, headers = path.read_bytes(), 200, {}
                if asked := self.headers.get("Range"):
                    first, last = (int(number) for number in asked.removeprefix("bytes=").split("-"))
                    headers["Content-Range"] = f"bytes {first}-{last}/{len(content)}"
                    content, status = content[first : last + 1], 206
                if fault == "delay":
                    time.sleep(0.2)
                if fault == "corrupt" and with_body and path.suffix in (".bin", ".model"):
                    content = bytes([content[0] ^ 1]) + content[1:]
                with lock:
                    server.asked.append((self.command, self.path, len(content) if with_body else 0))
                self.send(status, content, with_body, cut=fault == "truncate", **headers)

            def send(self, status: int, content: bytes, with_body: bool, cut: bool = False, **headers: str) -> None:
                self.send_response(status)
                headers |= {"Content-Length": str(len(content)), "Last-Modified": "Sun, 01 Jan 2023 00:00:00 GMT"}
                for name, value in (headers | {"ETag": '"0"'}).items():
                    self.send_header(name, value)
                self.end_headers()
                if with_body:
                    self.wfile.write(content[: len(content) // 2] if cut else content)
                if cut:
                    self.close_connection = True

        self._server = ThreadingHTTPServer(("127.0.0.1", 0), Handler)
        self.url = f"http://127.0.0.1:{self._server.server_address[1]}"

    @property
    def environment(self) -> dict[str, str]:
        """The variables by which S3's programs find it."""
        names = ("AWS_ACCESS_KEY_ID", "AWS_SECRET_ACCESS_KEY", "AWS_DEFAULT_REGION")
        return dict.fromkeys(names, "test") | {"AWS_ENDPOINT_URL": self.url}

    def sent(self, suffix: str = ".bin") -> int:
        """Bytes of files with this ending that were sent."""
        return sum(size for _, path, size in self.asked if path.endswith(suffix))

    def __enter__(self) -> "ObjectServer":
        threading.Thread(target=self._server.serve_forever, daemon=True).start()
        return self

    def __exit__(self, *error: object) -> None:
        self._server.shutdown()
        self._server.server_close()
