"""What is answered to requests that were not read to their end, as bytes: no application ever sees them."""

from __future__ import annotations

import http
import json

from pokestrator.web.app import SECURITY_HEADERS

CONTINUE = b"HTTP/1.1 100 Continue\r\n\r\n"
INVALID_REQUEST = -32_600  # JSON-RPC's code


def refusal(status: int) -> bytes:
    """The whole answer, after which the connection ends."""
    reason = http.HTTPStatus(status).phrase
    body = json.dumps({"jsonrpc": "2.0", "id": None, "error": {"code": INVALID_REQUEST, "message": reason}})
    headers = {
        "Connection": "close",
        "Content-Type": "application/json",
        "Content-Length": str(len(body)),
        **SECURITY_HEADERS,
    }
    lines = [f"HTTP/1.1 {status} {reason}", *(f"{name}: {value}" for name, value in headers.items()), "", body]
    return "\r\n".join(lines).encode()
