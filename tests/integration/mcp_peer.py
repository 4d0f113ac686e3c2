"""Both ends that the MCP tests need: our endpoint and the SDK's own server on loopback, and a plain HTTP client."""

from __future__ import annotations

import http.client
import json
import socket
import threading
import uuid
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from typing import Any
from urllib.parse import urlsplit

import flask
import mcp_types as types
import uvicorn
from mcp.server.lowlevel.server import Server
from mcp.shared.exceptions import MCPError
from werkzeug.datastructures import Headers
from werkzeug.serving import make_server

from pokestrator import __version__
from pokestrator.errors import InvalidTask, TryAgainLater
from pokestrator.intake import Question
from pokestrator.jobs import Acknowledgement, JobState, JobStatus, NewJob
from pokestrator.web import tool
from pokestrator.web.guard import Guard
from pokestrator.web.mcp import mcp_blueprint

LEGACY = "2025-06-18"
MODERN = "2026-07-28"
REQUEST_ID = uuid.UUID("0b0f6c3e-8d5c-4a55-9d5e-2f4a3c1b7a90")

HeaderList = Sequence[tuple[str, str | bytes]]
JSON_HEADERS: HeaderList = (
    ("Content-Type", "application/json"),
    ("Accept", "application/json, text/event-stream"),
)


def job_status(state: JobState = JobState.QUEUED, **fields: Any) -> JobStatus:
    """A job as its caller may know it: sent 12 seconds ago, and nothing has happened to it but what `fields` say."""
    quiet: dict[str, Any] = {
        "request_id": REQUEST_ID,
        "task": "Write a limerick about zebra stripes",
        "age_seconds": 12.0,
        "cancel_requested": False,
        "waits_seconds": 0.0,
        "latest": None,
        "result": None,
        "delivery": None,
    }
    return JobStatus(state=state, **{**quiet, **fields})


@dataclass
class FakeService:
    """Stands where the application stands: keeps jobs and questions, answers as told, remembers what came after
    the ack."""

    jobs: list[NewJob] = field(default_factory=list)
    questions: list[Question] = field(default_factory=list)
    durable: bool = True
    duplicate: bool = False
    error: Exception | None = None
    request_id: uuid.UUID | None = None  # None: each job's own
    status: JobStatus = field(default_factory=job_status)
    after_ack_ids: list[uuid.UUID] = field(default_factory=list)
    after_ack_may_run: threading.Event = field(default_factory=threading.Event)
    after_ack_ran: threading.Event = field(default_factory=threading.Event)

    def __post_init__(self) -> None:
        self.after_ack_may_run.set()

    def accept(self, job: NewJob) -> Acknowledgement:
        if self.error is not None:
            raise self.error
        self.jobs.append(job)
        request_id = self.request_id or job.id
        return Acknowledgement(request_id, self.durable, "On it. The answer comes as a message.", self.duplicate)

    def ask(self, question: Question) -> JobStatus:
        self.questions.append(question)
        if self.error is not None:
            raise self.error
        return self.status

    def after_ack(self, request_id: uuid.UUID) -> None:
        self.after_ack_may_run.wait(10)
        self.after_ack_ids.append(request_id)
        self.after_ack_ran.set()


@dataclass(frozen=True)
class Answer:
    status: int
    headers: http.client.HTTPMessage
    body: bytes

    @property
    def json(self) -> Any:
        return json.loads(self.body)


CALLBACK_HOSTS = ("poke.example", "127.0.0.1")


@contextmanager
def our_server(service: FakeService, api_key: str | None = None) -> Iterator[str]:
    """Our blueprint in a Flask application behind a threaded HTTP server; gives the endpoint's URL."""
    app = flask.Flask(__name__)
    app.register_blueprint(
        mcp_blueprint(
            service.accept,
            service.ask,
            path="/mcp",
            guard=Guard(api_key),
            callback_hosts=CALLBACK_HOSTS,
            after_ack=service.after_ack,
        )
    )
    server = make_server("127.0.0.1", 0, app, threaded=True)
    thread = threading.Thread(target=server.serve_forever, kwargs={"poll_interval": 0.05})
    thread.start()
    try:
        yield f"http://127.0.0.1:{server.server_port}/mcp"
    finally:
        server.shutdown()
        thread.join()
        server.server_close()


@contextmanager
def sdk_server(service: FakeService) -> Iterator[str]:
    """The SDK's own Streamable HTTP server with the same tool, stateless and answering in JSON, run by uvicorn."""
    app = _sdk_tool_server(service).streamable_http_app(
        json_response=True, stateless_http=True, max_request_body_size=512 * 1024
    )
    server = uvicorn.Server(uvicorn.Config(app, log_level="critical", lifespan="on", ws="none"))
    listener = socket.create_server(("127.0.0.1", 0))  # connections queue here until uvicorn is up
    thread = threading.Thread(target=server.run, kwargs={"sockets": [listener]})
    thread.start()
    try:
        yield f"http://127.0.0.1:{listener.getsockname()[1]}/mcp"
    finally:
        server.should_exit = True
        thread.join()
        listener.close()


def _sdk_tool_server(service: FakeService) -> Server[Any]:
    async def list_tools(context: Any, params: Any) -> types.ListToolsResult:
        return types.ListToolsResult(tools=[tool.TOOL])

    async def call_tool(context: Any, params: types.CallToolRequestParams) -> types.CallToolResult:
        if params.name != tool.TOOL.name:
            raise MCPError(types.INVALID_PARAMS, f"Unknown tool: {params.name!r}")
        try:
            called = tool.read_call(params.arguments or {}, Headers(), ())
            if isinstance(called, Question):
                return tool.answered(called.action, service.ask(called))
            return tool.accepted(service.accept(called))
        except (InvalidTask, TryAgainLater) as error:
            return tool.refused(str(error))

    return Server(
        "pokestrator",
        title="Pokestrator",
        version=__version__,
        instructions=tool.INSTRUCTIONS,
        on_list_tools=list_tools,
        on_call_tool=call_tool,
    )


def ask(url: str, body: bytes | str, headers: HeaderList = JSON_HEADERS, method: str = "POST") -> Answer:
    """One HTTP request with exactly these headers (Host and Content-Length are added where they are missing)."""
    parts = urlsplit(url)
    data = body.encode() if isinstance(body, str) else body
    names = {name.lower() for name, _ in headers}
    connection = http.client.HTTPConnection(parts.hostname or "", parts.port, timeout=20)
    try:
        connection.putrequest(method, parts.path, skip_host="host" in names, skip_accept_encoding=True)
        for name, value in headers:
            connection.putheader(name, value)
        if "content-length" not in names:
            connection.putheader("Content-Length", str(len(data)))
        connection.endheaders(data)
        response = connection.getresponse()
        return Answer(response.status, response.headers, response.read())
    finally:
        connection.close()


def rpc(method: str, params: object = None, id: object = 1) -> str:
    """A JSON-RPC request as text; `params=None` leaves them out."""
    return json.dumps({"jsonrpc": "2.0", "id": id, "method": method, **({} if params is None else {"params": params})})


def version_header(version: str = LEGACY) -> HeaderList:
    return (*JSON_HEADERS, ("MCP-Protocol-Version", version))


def modern_params(version: str = MODERN, **params: object) -> dict[str, object]:
    """`params` with the envelope that each request of the modern era carries."""
    envelope = {
        types.PROTOCOL_VERSION_META_KEY: version,
        types.CLIENT_INFO_META_KEY: {"name": "test", "version": "1"},
        types.CLIENT_CAPABILITIES_META_KEY: {},
    }
    return {**params, "_meta": envelope}


def modern_headers(method: str, name: str | None = None, version: str = MODERN) -> HeaderList:
    named = () if name is None else (("Mcp-Name", name),)
    return (*version_header(version), ("Mcp-Method", method), *named)


def call(arguments: object, id: object = 1) -> str:
    """An `orchestrate` call of the handshake era as text."""
    return rpc("tools/call", {"name": "orchestrate", "arguments": arguments}, id)
