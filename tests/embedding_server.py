"""A real embedding service on loopback, whose every misbehaviour a test can order."""

from __future__ import annotations

import base64
import json
import socket
import threading
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from typing import Any

import numpy as np

from everos_engine.testing import FakeEmbedder
from patience import HANG_SECONDS

Handler = BaseHTTPRequestHandler
Misbehaviour = Callable[[Handler, dict[str, Any]], bool]
"""Answers a request its own way and says True, or leaves it to the good service with False."""


class Service(ThreadingHTTPServer):
    """OpenAI-compatible; vectors are those of ``model``. A text with POISON gets 400, with HANG no answer."""

    daemon_threads = True
    request_queue_size = 128

    def __init__(self, port: int = 0) -> None:
        super().__init__(("127.0.0.1", port), _Handler)
        self.model = FakeEmbedder(model="served")
        self.misbehave: Misbehaviour | None = None
        self.base64 = True
        self.requests: list[dict[str, Any]] = []
        self.headers: list[dict[str, str]] = []
        self.connections = 0
        self.peak = 0
        self.running = 0
        self.full_at: int | None = None
        """Answers nobody before so many calls are in flight at once."""
        self.full = threading.Event()
        self.lock = threading.Lock()
        self.closing = threading.Event()
        self.open_sockets: set[socket.socket] = set()

    @property
    def url(self) -> str:
        return f"http://127.0.0.1:{self.server_address[1]}/v1"

    def handle_error(self, request: object, client_address: object) -> None:
        """A client that goes away is no news."""

    def embed(self, texts: list[str], *, as_base64: bool) -> list[dict[str, Any]]:
        vectors = [self.model.vector(text) for text in texts]
        shown = [base64.b64encode(v.astype("<f4").tobytes()).decode() if as_base64 else v.tolist() for v in vectors]
        data = [{"object": "embedding", "index": index, "embedding": vector} for index, vector in enumerate(shown)]
        return data[::-1]  # the order of the answer means nothing, its indexes do


class _Handler(BaseHTTPRequestHandler):
    protocol_version = "HTTP/1.1"
    server: Service

    def setup(self) -> None:
        super().setup()
        with self.server.lock:
            self.server.connections += 1
            self.server.open_sockets.add(self.connection)

    def finish(self) -> None:
        with self.server.lock:
            self.server.open_sockets.discard(self.connection)
        super().finish()

    def log_message(self, *_args: object) -> None:
        """Quiet."""

    def do_POST(self) -> None:
        body = json.loads(self.rfile.read(int(self.headers["Content-Length"])))
        service = self.server
        with service.lock:
            service.requests.append(body)
            service.headers.append(dict(self.headers))
            service.running += 1
            service.peak = max(service.peak, service.running)
            if service.running == service.full_at:
                service.full.set()
        try:
            self._answer(service, body)
        finally:
            with service.lock:
                service.running -= 1

    def _answer(self, service: Service, body: dict[str, Any]) -> None:
        if service.full_at is not None:
            service.full.wait(HANG_SECONDS)
        if service.misbehave is not None and service.misbehave(self, body):
            return
        if self.path != "/v1/embeddings":
            reply(self, 404, {"error": "no such route"})
        elif any("HANG" in text for text in body["input"]):
            service.closing.wait()
        elif any("POISON" in text for text in body["input"]):
            reply(self, 400, {"error": "this input is refused"})
        else:
            data = service.embed(body["input"], as_base64=service.base64 and body.get("encoding_format") == "base64")
            reply(self, 200, {"object": "list", "data": data, "model": body["model"]})


def reply(handler: Handler, status: int, content: object, **headers: str) -> None:
    """Send an answer: bytes as they are, anything else as JSON; ``Retry_After="1"`` is a header."""
    data = content if isinstance(content, bytes) else json.dumps(content).encode()
    handler.send_response(status)
    for name, value in headers.items():
        handler.send_header(name.replace("_", "-"), value)
    handler.send_header("Content-Length", str(len(data)))
    handler.end_headers()
    handler.wfile.write(data)


def always(status: int, content: object = b"", **headers: str) -> Misbehaviour:
    """The same answer to everything."""

    def misbehave(handler: Handler, _body: dict[str, Any]) -> bool:
        reply(handler, status, content, **headers)
        return True

    return misbehave


def vectors(*rows: object, indexes: list[int] | None = None) -> dict[str, Any]:
    """A body with these embeddings."""
    chosen = indexes if indexes is not None else list(range(len(rows)))
    return {"data": [{"index": index, "embedding": row} for index, row in zip(chosen, rows, strict=True)]}


def b64(*numbers: float) -> str:
    return base64.b64encode(np.array(numbers, dtype="<f4").tobytes()).decode()


@contextmanager
def reserved_port() -> Iterator[int]:
    """A port of loopback where nobody listens, and that no other socket can be given; ``serving(port)`` may listen there.

    A port that is merely free may be taken meanwhile, even by the very client that looks for a service there.
    """
    with socket.socket(socket.AF_INET, socket.SOCK_STREAM) as holder:
        holder.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)  # shared with the service's, which sets it too
        holder.bind(("127.0.0.1", 0))
        yield int(holder.getsockname()[1])


@contextmanager
def serving(port: int = 0) -> Iterator[Service]:
    """The service for the length of the block; at its end every connection is cut."""
    service = Service(port)
    thread = threading.Thread(target=service.serve_forever, kwargs={"poll_interval": 0.01})
    thread.start()
    try:
        yield service
    finally:
        service.closing.set()
        service.shutdown()
        service.server_close()
        with service.lock:
            left = list(service.open_sockets)
        for connection in left:
            try:
                connection.shutdown(socket.SHUT_RDWR)
            except OSError:
                continue
        thread.join()
