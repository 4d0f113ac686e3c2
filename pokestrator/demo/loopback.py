"""What the demo's two servers share: a threaded HTTP server on 127.0.0.1 that keeps its address and ends at once."""

from __future__ import annotations

import sys
import threading
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from types import TracebackType
from typing import Any, Self


class HttpServer(ThreadingHTTPServer):
    """Serves for `owner`; handlers wait on `stopping` instead of sleeping."""

    daemon_threads = True
    request_queue_size = 128

    def __init__(self, owner: Any, port: int, handler: type[BaseHTTPRequestHandler]) -> None:
        self.owner = owner
        self.stopping = threading.Event()
        super().__init__(("127.0.0.1", port), handler)

    def handle_error(self, request: Any, client_address: Any) -> None:
        # Clients that are killed or give up waiting are expected here.
        if not isinstance(sys.exc_info()[1], ConnectionError):
            super().handle_error(request, client_address)


class Handler(BaseHTTPRequestHandler):
    """One connection carries one request, so that nothing is left open when the server stops."""

    protocol_version = "HTTP/1.1"
    server: HttpServer

    def log_message(self, format: str, *args: Any) -> None:
        """Silent: what came is kept and can be looked at."""


class LoopbackServer:
    """`with …:` or start() and stop(); it keeps its address. Port 0: a free one at the first start."""

    handler: type[Handler]

    def __init__(self, port: int = 0) -> None:
        self._port = port
        self._server: HttpServer | None = None

    @property
    def url(self) -> str:
        """`http://127.0.0.1:PORT`."""
        if not self._port:
            raise RuntimeError(f"the {type(self).__name__} was never started")
        return f"http://127.0.0.1:{self._port}"

    def start(self) -> None:
        self._server = HttpServer(self, self._port, self.handler)
        self._port = self._server.server_address[1]
        # A short poll: stop() waits for it.
        name = type(self).__name__
        threading.Thread(target=self._server.serve_forever, args=(0.05,), name=name, daemon=True).start()

    def stop(self) -> None:
        """End at once: what is delayed or hangs is cut short and not answered."""
        if self._server is not None:
            self._server.stopping.set()
            self._server.shutdown()
            self._server.server_close()
            self._server = None

    def __enter__(self) -> Self:
        self.start()
        return self

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, tb: TracebackType | None) -> None:
        self.stop()
