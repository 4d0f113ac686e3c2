"""The server for stepping: one process, without gunicorn."""

from __future__ import annotations

import flask
from werkzeug.serving import BaseWSGIServer, make_server


def listen(app: flask.Flask, host: str, port: int) -> tuple[BaseWSGIServer, str]:
    """A server that listens (port 0 takes a free one) and answers once it is told to serve, and its address."""
    server = make_server(host, port, app, threaded=True)
    name = f"[{host}]" if ":" in host else host
    return server, f"http://{name}:{server.server_port}"
