"""Stores of this machine: a web server that can fail, and an S3-compatible server."""

from __future__ import annotations

import http.server
import threading
from collections.abc import Iterator
from dataclasses import dataclass, field

import numpy as np
import pytest

from genlip_megatron import storage

CONTENT = np.random.default_rng(0).integers(0, 256, 300_000, np.uint8).tobytes()


@dataclass
class Web:
    """A local web server that can be made to fail."""

    url: str = ""
    files: dict[str, bytes] = field(default_factory=lambda: {"/s.tar": CONTENT})
    requests: list[tuple[str, str]] = field(default_factory=list)
    shard: str = ""  # URL of CONTENT
    fail: int = 0  # how many of the next answers are errors
    cut: int = 0  # how many of the next answers end early
    hang: int = 0  # how many of the next requests get no answer
    release: threading.Event = field(default_factory=threading.Event)


@pytest.fixture
def web() -> Iterator[Web]:
    """Serves ``files`` with range requests. /404 is answered with that status; /hang never."""
    state = Web()

    class Handler(http.server.BaseHTTPRequestHandler):
        def log_message(self, *args: object) -> None:
            pass

        def do_HEAD(self) -> None:
            self.do_GET()

        def do_GET(self) -> None:
            content = state.files.get(self.path)
            span = self.headers.get("Range", "")
            state.requests.append((self.command, span))
            if (span and state.hang) or self.path.startswith("/hang"):
                state.hang -= 1
                state.release.wait(30)
                return
            if content is None:
                self.send_error(int(self.path[1:4]) if self.path[1:4].isdigit() else 404)
                return
            if span and state.fail:
                state.fail -= 1
                self.send_error(503)
                return
            first, last = 0, len(content) - 1
            if span:
                first, last = (int(part) for part in span.removeprefix("bytes=").split("-"))
                self.send_response(206)
                self.send_header("Content-Range", f"bytes {first}-{last}/{len(content)}")
            else:
                self.send_response(200)
            part = content[first : last + 1]
            self.send_header("Content-Length", str(len(part)))
            self.send_header("Accept-Ranges", "bytes")
            self.send_header("ETag", f'"{len(content)}"')
            self.end_headers()
            if self.command == "GET":
                if span and state.cut:
                    state.cut -= 1
                    part = part[: len(part) // 2]
                self.wfile.write(part)

    server = http.server.ThreadingHTTPServer(("127.0.0.1", 0), Handler)
    threading.Thread(target=server.serve_forever, daemon=True).start()
    state.url = f"http://127.0.0.1:{server.server_port}"
    state.shard = f"{state.url}/s.tar"
    yield state
    state.release.set()
    server.shutdown()
    server.server_close()


@pytest.fixture
def bucket(monkeypatch: pytest.MonkeyPatch) -> Iterator[str]:
    """A bucket on an S3-compatible server of this machine."""
    s3fs = pytest.importorskip("s3fs")
    server_module = pytest.importorskip("moto.server")
    server = server_module.ThreadedMotoServer(ip_address="127.0.0.1", port=0, verbose=False)
    server.start()
    host, port = server.get_host_and_port()
    for name, value in {
        "AWS_ENDPOINT_URL": f"http://{host}:{port}", "AWS_ACCESS_KEY_ID": "x", "AWS_SECRET_ACCESS_KEY": "x",
        "AWS_DEFAULT_REGION": "us-east-1",
    }.items():  # fmt: skip
        monkeypatch.setenv(name, value)
    storage._filesystem.cache_clear()
    s3fs.S3FileSystem.clear_instance_cache()
    s3fs.S3FileSystem().makedirs("bucket", exist_ok=True)  # moto keeps buckets for the next server
    yield "s3://bucket/data"
    server.stop()
    storage._filesystem.cache_clear()
    s3fs.S3FileSystem.clear_instance_cache()
