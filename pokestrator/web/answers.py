"""How the MCP endpoint answers, and what it logs of those whom it turns away."""

from __future__ import annotations

import json
from collections.abc import Mapping

from flask import Response, request
from mcp_types.jsonrpc import RequestId

from pokestrator.telemetry import get_logger
from pokestrator.web import tool

log = get_logger(__name__)

VERSION_HEADER = "MCP-Protocol-Version"


def json_answer(body: Mapping[str, object], status: int = 200, headers: Mapping[str, str] | None = None) -> Response:
    # Escaped to ASCII: an echoed id or method may hold a lone surrogate, which UTF-8 cannot carry.
    return Response(json.dumps(body, separators=(",", ":")), status, headers, mimetype="application/json")


def envelope(request_id: RequestId | None, **outcome: object) -> dict[str, object]:
    return {"jsonrpc": "2.0", "id": request_id, **outcome}


def rejected(
    status: int,
    code: int,
    reason: str,
    *,
    request_id: RequestId | None = None,
    data: object = None,
    headers: Mapping[str, str] | None = None,
) -> Response:
    """A JSON-RPC error, which is logged."""
    log_rejection(status, reason)
    error = {"code": code, "message": reason} | ({} if data is None else {"data": data})
    return json_answer(envelope(request_id, error=error), status, headers)


def log_rejection(status: int, reason: str) -> None:
    # Clients meet a 4xx by trying the old SSE transport and report that failure instead, so the log must tell.
    version = request.headers.get(VERSION_HEADER)
    write = log.warning if status >= 400 else log.info
    write("mcp_rejected", status=status, reason=reason, version=version and tool.quoted(version))
