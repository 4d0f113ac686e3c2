"""The MCP endpoint: Streamable HTTP without sessions or streams, one synchronous view.

Two eras share it. Clients up to 2025-11-25 shake hands (`initialize`) and then name their version in a header; those
of 2026-07-28 describe themselves in every request. Which statuses and codes each era expects is held against the
SDK's own server by tests/integration/test_mcp_differential.py.
"""

from __future__ import annotations

import uuid
from collections.abc import Callable, Collection, Mapping
from functools import partial
from typing import Any, cast

import flask
import mcp_types as types
from flask import Response, request
from mcp.shared.exceptions import MCPError
from mcp.shared.inbound import (
    ERROR_CODE_HTTP_STATUS,
    InboundLadderRejection,
    classify_inbound_request,
    unsupported_protocol_version_rejection,
)
from mcp_types.jsonrpc import (
    JSONRPCMessage,
    JSONRPCNotification,
    JSONRPCRequest,
    RequestId,
    jsonrpc_message_adapter,
)
from mcp_types.methods import SPEC_CLIENT_METHODS, serialize_server_result, validate_client_request
from mcp_types.version import HANDSHAKE_PROTOCOL_VERSIONS, LATEST_HANDSHAKE_VERSION, MODERN_PROTOCOL_VERSIONS
from pydantic import ValidationError
from werkzeug.exceptions import HTTPException

from pokestrator import __version__
from pokestrator.errors import InvalidTask, TooManyTasks, TryAgainLater
from pokestrator.intake import Question
from pokestrator.jobs import Acknowledgement, JobStatus, NewJob
from pokestrator.telemetry import get_logger, one_line
from pokestrator.web import tool
from pokestrator.web.answers import VERSION_HEADER, envelope, json_answer, rejected
from pokestrator.web.guard import Guard
from pokestrator.web.strict_json import parse_json

log = get_logger(__name__)

# The largest call we accept is 20,000 characters and 16 KB of metadata. JSON may spell a character in twelve bytes
# (an escaped surrogate pair), which makes 240 KB and 96 KB; the rest is room for the envelope.
MAX_BODY_BYTES = 512 * 1024

ASSUMED_VERSION = "2025-03-26"  # what the specification lets a missing header mean

SERVER_INFO = types.Implementation(name="pokestrator", title="Pokestrator", version=__version__)
CAPABILITIES = types.ServerCapabilities(tools=types.ToolsCapability(list_changed=False))
_SERVER_INFO_WIRE = SERVER_INFO.model_dump(by_alias=True, mode="json", exclude_none=True)

Accept = Callable[[NewJob], Acknowledgement]
Ask = Callable[[Question], JobStatus]
AfterAck = Callable[[uuid.UUID], None]
Params = Mapping[str, Any]


def mcp_blueprint(
    accept: Accept,
    ask: Ask,
    *,
    path: str,
    guard: Guard,
    callback_hosts: Collection[str] = (),
    after_ack: AfterAck | None = None,
) -> flask.Blueprint:
    """The MCP endpoint at `path`.

    `accept` stores a checked job and answers with its acknowledgement, or raises InvalidTask or TryAgainLater.
    `ask` answers a question about an earlier job (or does what it asks) with how that job stands, or raises the same.
    `after_ack` is called with the request_id of each durable job once the acknowledgement has been sent.
    `callback_hosts` are those that a call's answer may be sent to (addresses.may_be_called_back).
    Nobody whom `guard` turns away comes as far as any of them.
    """
    endpoint = _Endpoint(accept, ask, callback_hosts, after_ack)
    blueprint = flask.Blueprint("mcp", __name__)
    blueprint.before_request(guard.turn_away)
    blueprint.after_request(guard.open_to_page)
    blueprint.register_error_handler(HTTPException, _http_error)
    route = partial(blueprint.add_url_rule, path, strict_slashes=False, provide_automatic_options=False)
    route(endpoint="post", view_func=endpoint.post, methods=["POST"])
    route(endpoint="other", view_func=_only_post, methods=["GET", "HEAD", "DELETE", "PUT", "PATCH", "OPTIONS"])
    return blueprint


class _Endpoint:
    def __init__(self, accept: Accept, ask: Ask, callback_hosts: Collection[str], after_ack: AfterAck | None) -> None:
        self._callback_hosts = callback_hosts
        self._accept = accept
        self._ask = ask
        self._after_ack = after_ack
        self._handlers: dict[str, Callable[[Params], types.Result]] = {
            "initialize": _initialize,
            "ping": lambda params: types.EmptyResult(),
            "server/discover": _discover,
            "tools/list": lambda params: types.ListToolsResult(tools=[tool.TOOL]),
            "tools/call": self._call_tool,
        }

    def post(self) -> Response:
        """One JSON-RPC message in, its answer out; 202 for messages that need none."""
        if not request.accept_mimetypes.quality("application/json"):
            return rejected(406, types.INVALID_REQUEST, "Not Acceptable: Client must accept application/json")
        if request.mimetype != "application/json":
            return rejected(415, types.INVALID_REQUEST, "Content-Type must be application/json")
        request.max_content_length = MAX_BODY_BYTES
        try:
            body = parse_json(request.get_data(cache=False))
        except ValueError:
            return rejected(400, types.PARSE_ERROR, "Parse error")
        message = _message(body)
        if message is None:
            return rejected(400, types.INVALID_REQUEST, "Body must be a single JSON-RPC message")
        version = request.headers.get(VERSION_HEADER, ASSUMED_VERSION)
        if version in HANDSHAKE_PROTOCOL_VERSIONS:
            return self._answer_handshake_era(message, version)
        return self._answer_modern_era(message, cast(dict[str, Any], body), version)

    def _answer_handshake_era(self, message: JSONRPCMessage, version: str) -> Response:
        if not isinstance(message, JSONRPCRequest):
            return Response(status=202)
        try:
            return json_answer(envelope(message.id, result=self._dispatch(message, version)))
        except MCPError as error:
            # Always 200: clients of this era do not look for a JSON-RPC error under another status.
            return _failed(message, error, 200)

    def _answer_modern_era(self, message: JSONRPCMessage, body: dict[str, Any], version: str) -> Response:
        if isinstance(message, JSONRPCNotification):
            unsupported = unsupported_protocol_version_rejection(version)
            return _rejected_by(unsupported, None) if unsupported else Response(status=202)
        if not isinstance(message, JSONRPCRequest):
            return rejected(400, types.INVALID_REQUEST, "Body must be a JSON-RPC request or notification")
        # WSGI joins repeated headers with a comma, so a repeated routing header fails here as a mismatch.
        verdict = classify_inbound_request(body, headers={name.lower(): value for name, value in request.headers})
        if isinstance(verdict, InboundLadderRejection):
            return _rejected_by(verdict, message.id)
        try:
            return json_answer(envelope(message.id, result=self._dispatch(message, verdict.protocol_version)))
        except MCPError as error:
            return _failed(message, error, ERROR_CODE_HTTP_STATUS.get(error.code, 200))

    def _dispatch(self, message: JSONRPCRequest, version: str) -> dict[str, Any]:
        """The result of one request in the shape that `version` knows. Raises MCPError, and nothing else."""
        handler = self._handler(message, version)
        try:
            result = handler(message.params or {}).model_dump(by_alias=True, mode="json", exclude_none=True)
            return _stamped(serialize_server_result(message.method, version, result), version)
        except MCPError:
            raise
        except Exception:
            log.exception("mcp_request_failed")
            raise MCPError(types.INTERNAL_ERROR, "Internal server error") from None

    def _handler(self, message: JSONRPCRequest, version: str) -> Callable[[Params], types.Result]:
        try:
            if message.method in SPEC_CLIENT_METHODS:
                validate_client_request(message.method, version, message.params)  # KeyError: not in this version
            return self._handlers[message.method]
        except KeyError:
            raise MCPError(types.METHOD_NOT_FOUND, "Method not found", message.method) from None
        except ValidationError:
            raise MCPError(types.INVALID_PARAMS, "Invalid request parameters", "") from None

    def _call_tool(self, params: Params) -> types.CallToolResult:
        if params["name"] != tool.TOOL.name:
            raise MCPError(types.INVALID_PARAMS, f"Unknown tool: {tool.quoted(params['name'])}")
        try:
            called = tool.read_call(params.get("arguments") or {}, request.headers, self._callback_hosts)
            if isinstance(called, Question):
                return self._answer(called)
            ack = self._accept(called)
        except TooManyTasks as error:
            log.info("task_refused", reason=str(error))
            return tool.refused(tool.too_many(error))
        except (InvalidTask, TryAgainLater) as error:
            log.info("task_refused", reason=one_line(str(error)))
            return tool.refused(str(error))
        if ack.durable and self._after_ack is not None:
            _when_sent(partial(self._after_ack, ack.request_id))
        return tool.accepted(ack)

    def _answer(self, question: Question) -> types.CallToolResult:
        request_id = str(question.request_id or "latest")
        try:
            status = self._ask(question)
        except (InvalidTask, TryAgainLater) as error:
            log.info("question", action=question.action, request_id=request_id, outcome=one_line(str(error)))
            return tool.refused(str(error))
        log.info("question", action=question.action, request_id=str(status.request_id), outcome=status.state)
        return tool.answered(question.action, status)


def _message(body: object) -> JSONRPCMessage | None:
    try:
        message = jsonrpc_message_adapter.validate_python(body, by_name=False)
    except ValidationError:
        return None
    if isinstance(message, JSONRPCNotification) and isinstance(body, dict) and "id" in body:
        return None  # a request whose id is malformed is owed an error, not the silence of a notification
    return message


def _initialize(params: Params) -> types.Result:
    asked = params["protocolVersion"]
    return types.InitializeResult(
        protocol_version=asked if asked in HANDSHAKE_PROTOCOL_VERSIONS else LATEST_HANDSHAKE_VERSION,
        capabilities=CAPABILITIES,
        server_info=SERVER_INFO,
        instructions=tool.INSTRUCTIONS,
    )


def _discover(params: Params) -> types.Result:
    return types.DiscoverResult(
        supported_versions=list(MODERN_PROTOCOL_VERSIONS), capabilities=CAPABILITIES, instructions=tool.INSTRUCTIONS
    )


def _stamped(result: dict[str, Any], version: str) -> dict[str, Any]:
    """`result` with what every result of the modern era carries."""
    if version not in MODERN_PROTOCOL_VERSIONS:
        return result
    return {"resultType": "complete", **result, "_meta": {types.SERVER_INFO_META_KEY: _SERVER_INFO_WIRE}}


def _when_sent(action: Callable[[], None]) -> None:
    """Run `action` once the answer to the current request has left."""

    def attach(response: Response) -> Response:
        response.call_on_close(action)
        return response

    flask.after_this_request(attach)


def _only_post() -> Response:
    # No warning: every client asks once for a stream with GET when it has connected, and goes on without one.
    log.info("mcp_rejected", status=405, reason=f"{request.method} is not POST")
    return json_answer(
        envelope(None, error={"code": types.INVALID_REQUEST, "message": "Use POST"}), 405, {"Allow": "POST"}
    )


def _http_error(error: HTTPException) -> Response:
    return rejected(error.code or 400, types.INVALID_REQUEST, error.name)


def _rejected_by(verdict: InboundLadderRejection, request_id: RequestId | None) -> Response:
    status = ERROR_CODE_HTTP_STATUS.get(verdict.code, 400)
    return rejected(status, verdict.code, verdict.message, request_id=request_id, data=verdict.data)


def _failed(message: JSONRPCRequest, error: MCPError, status: int) -> Response:
    return rejected(status, error.code, error.message, request_id=message.id, data=error.data)
