"""One run: the Claude Agent SDK, its settings and its deadline. The only file with asyncio.

It runs in a slot's process or, inline, in the caller's thread; which of them decides how its processes are ended.
"""

from __future__ import annotations

import asyncio
import json
import time
from collections.abc import Callable, Mapping
from contextlib import aclosing
from dataclasses import replace
from pathlib import Path
from typing import Any

import claude_agent_sdk
from claude_agent_sdk import (
    AssistantMessage,
    ClaudeAgentOptions,
    ClaudeSDKError,
    Message,
    ProcessError,
    ResultMessage,
    ServerToolUseBlock,
    SystemMessage,
    TextBlock,
    ToolUseBlock,
    query,
)

from pokestrator.claude.confinement import FOLDERS, Confinement, launcher
from pokestrator.claude.outcomes import Ending, failure, result_of, usage_of
from pokestrator.claude.processes import MARK
from pokestrator.environ import environment
from pokestrator.redaction import Redactor
from pokestrator.runs import ErrorKind, RunEvent, RunRequest, RunResult
from pokestrator.settings import secret_names
from pokestrator.telemetry import one_line

# One request a run in place of three, one of them paid; no background work that outlives the answer.
_QUIET = {
    "CLAUDE_CODE_DISABLE_NONESSENTIAL_TRAFFIC": "1",
    "DISABLE_TELEMETRY": "1",
    "DISABLE_ERROR_REPORTING": "1",
    "DISABLE_AUTOUPDATER": "1",
    "CLAUDE_CODE_DISABLE_BACKGROUND_TASKS": "1",
    "CLAUDE_CODE_MAX_RETRIES": "2",
    # Or Bash, whose input is a socket here, takes itself for a remote login and reads the machine's start files.
    "SHLVL": "1",
}
# Without this WebFetch asks api.anthropic.com about each page's host before it fetches the page.
_CLI_SETTINGS = json.dumps({"skipWebFetchPreflight": True})
_LOOPBACK = ("127.0.0.1", "localhost")  # where the relay is: asked for Claude, it is no proxy
CLI = Path(claude_agent_sdk.__file__).parent / "_bundled" / "claude"
NOTICE_SECONDS = 0.3  # for asyncio to hear of the end of a process that was killed
_MAIN_INPUTS = ("command", "file_path", "pattern", "url", "query")


def run(
    request: RunRequest,
    allowed: Mapping[str, str],
    confinement: Confinement,
    folder: Path,
    deadline: float,
    kill_processes: Callable[[], object],
    on_event: Callable[[RunEvent], None],
    must_end: Callable[[], bool],
) -> RunResult:
    """Run `request` to its end or to `deadline` (time.monotonic()); returns with its processes killed, not reaped.

    `allowed` is what every agent may see of the environment, beside the `variables` of its request; `folder` an empty
    one of its own whose name marks its processes. `kill_processes` ends them at once, the CLI included. Who ends the
    run that way from outside makes `must_end` true before: the kill may come when the CLI is only just being started,
    and miss it. A run that cannot be confined as `confinement` says ends without having begun.
    """
    request = _within_ceiling(request, confinement, on_event)
    seen = _environment(allowed, request.variables, folder, deadline)
    left = max(0.0, deadline - time.monotonic())
    try:
        with launcher(confinement, folder, CLI, seen, left) as (program, variables), environment(variables):
            censor = Redactor(_secrets(allowed, request))
            conversation = _Conversation(request, program, folder, deadline, kill_processes, censor, on_event, must_end)
            try:
                return asyncio.run(conversation.hold())
            finally:
                kill_processes()
    except (OSError, ValueError) as error:
        return failure(ErrorKind.AGENT_CRASHED, f"the agent could not be confined: {error}")


def _within_ceiling(request: RunRequest, confinement: Confinement, on_event: Callable[[RunEvent], None]) -> RunRequest:
    """The request with the tools that it may have, whatever has asked for more."""
    tools = confinement.allowed(request.tools)
    if refused := [tool for tool in request.tools if tool not in tools]:
        on_event(RunEvent("tools", one_line(f"without {', '.join(refused)}: {confinement}")))
    return replace(request, tools=tools)


class _Conversation:
    """What is known of a run while it goes on."""

    def __init__(
        self,
        request: RunRequest,
        program: Path,
        folder: Path,
        deadline: float,
        kill_processes: Callable[[], object],
        censor: Redactor,
        on_event: Callable[[RunEvent], None],
        must_end: Callable[[], bool],
    ) -> None:
        self._request = request
        self._program = program
        self._folder = folder
        self._deadline = deadline
        self._kill_processes = kill_processes
        self._censor = censor
        self._on_event = on_event
        self._must_end = must_end
        self._result: ResultMessage | None = None
        self._message_error: str | None = None
        self._last_retry = ""
        self._stderr: list[str] = []

    async def hold(self) -> RunResult:
        """Ask, listen until the result, leave."""
        self._expire_at(self._deadline)
        transports = _recorded_subprocesses(self._started)
        trouble: Exception | None = None
        try:
            async with asyncio.timeout_at(self._deadline):
                await self._listen()
        except Exception as error:  # noqa: BLE001 - the SDK raises bare Exceptions too; all of them end in a result
            trouble = error
        await _close(transports)
        return self._outcome(trouble)

    async def _listen(self) -> None:
        options = _options(self._request, self._program, self._folder, self._stderr.append)
        async with aclosing(_messages(self._request.prompt, options)) as messages:
            try:
                async for message in messages:
                    self._take(message)
                    if isinstance(message, ResultMessage):
                        return  # what else the CLI has running could hold the stream open for minutes
            finally:
                self._kill_processes()  # or closing would wait five seconds for the CLI to leave

    def _expire_at(self, when: float) -> None:
        """Kill the run's processes at `when`, and again shortly after: the CLI may only just be starting."""
        loop = asyncio.get_running_loop()  # its clock is time.monotonic()

        def expire() -> None:
            self._kill_processes()
            self._expire_at(loop.time() + 0.05)

        loop.call_at(when, expire)

    def _started(self) -> None:
        if self._must_end():  # the kill has come too early to find this process
            self._kill_processes()

    def _take(self, message: Message) -> None:
        if isinstance(message, ResultMessage):
            self._result = message
        elif isinstance(message, AssistantMessage):
            self._message_error = message.error
            if not message.error:
                for block in message.content:
                    self._tell(block)
        elif isinstance(message, SystemMessage) and message.subtype == "api_retry":
            self._last_retry = _retry(message.data)
            self._emit("retry", self._last_retry)

    def _tell(self, block: object) -> None:
        if isinstance(block, TextBlock) and block.text.strip():
            self._emit("text", block.text)
        elif isinstance(block, (ToolUseBlock, ServerToolUseBlock)) and block.name != "StructuredOutput":
            self._emit("tool", f"{block.name}: {_main_input(block.input)}")

    def _emit(self, kind: str, text: str) -> None:
        self._on_event(RunEvent(kind, one_line(self._censor(text))))

    def _outcome(self, trouble: Exception | None) -> RunResult:
        if self._result is not None:
            return result_of(self._ending(self._result), structured_wanted=self._request.output_schema is not None)
        if time.monotonic() >= self._deadline:
            retried = f"; last API retry: {self._last_retry}" if self._last_retry else ""
            return failure(ErrorKind.TIMEOUT, f"no result after {self._request.timeout_seconds:g} s{retried}")
        said = self._censor(" / ".join(self._stderr[-5:]))
        if trouble is None or isinstance(trouble, ProcessError):
            code = trouble.exit_code if trouble else 0
            return failure(ErrorKind.AGENT_CRASHED, f"the CLI ended without a result, exit code {code}; stderr: {said}")
        kind = ErrorKind.AGENT_CRASHED if isinstance(trouble, ClaudeSDKError) else ErrorKind.INTERNAL
        return failure(kind, self._censor(f"{type(trouble).__name__}: {trouble}; stderr: {said}"))

    def _ending(self, result: ResultMessage) -> Ending:
        return Ending(
            is_error=result.is_error,
            subtype=result.subtype,
            status=result.api_error_status,
            stop_reason=result.stop_reason,
            text=self._censor(result.result or ""),
            structured=result.structured_output,
            errors=tuple(self._censor(error) for error in result.errors or ()),
            message_error=self._message_error,
            usage=usage_of(result.total_cost_usd, result.usage, result.num_turns),
        )


def _secrets(allowed: Mapping[str, str], request: RunRequest) -> list[str]:
    """Every secret value that this run's agent has: it can print its own environment."""
    return [*(value for name, value in allowed.items() if name in secret_names()), *request.variables.values()]


def _recorded_subprocesses(started: Callable[[], None]) -> list[asyncio.SubprocessTransport]:
    """Where the running loop will put each subprocess that is started: the SDK lets go of its own before they end.

    `started` is called each time.
    """
    loop: Any = asyncio.get_running_loop()
    start = loop.subprocess_exec
    transports: list[asyncio.SubprocessTransport] = []

    async def subprocess_exec(*args: Any, **kwargs: Any) -> Any:
        transport, protocol = await start(*args, **kwargs)
        transports.append(transport)
        started()
        return transport, protocol

    loop.subprocess_exec = subprocess_exec
    return transports


async def _close(transports: list[asyncio.SubprocessTransport]) -> None:
    """Let killed subprocesses be noticed as ended before the loop closes, or asyncio complains when it is gone."""
    loop = asyncio.get_running_loop()
    late = loop.time() + NOTICE_SECONDS
    for transport in transports:
        while transport.get_returncode() is None and loop.time() < late:
            await asyncio.sleep(0.005)
        transport.close()
    await asyncio.sleep(0)  # the pipes' last callbacks


def _messages(prompt: str, options: ClaudeAgentOptions) -> Any:
    # Declared as an iterator, but it is a generator and must be closed like one.
    return query(prompt=prompt, options=options)


def _options(request: RunRequest, program: Path, folder: Path, on_stderr: Callable[[str], None]) -> ClaudeAgentOptions:
    return ClaudeAgentOptions(
        cli_path=program,
        model=request.model,
        system_prompt=request.system_prompt,
        tools=list(request.tools),
        allowed_tools=list(request.tools),
        permission_mode="dontAsk",  # deny what is not allowed; the other modes ask, or refuse to run as root
        max_turns=request.max_turns,
        max_budget_usd=request.max_budget_usd,
        output_format=None
        if request.output_schema is None
        else {"type": "json_schema", "schema": dict(request.output_schema)},
        verbatim_prompts=True,  # else "@/etc/passwd" in a task sends that file
        setting_sources=[],
        settings=_CLI_SETTINGS,
        strict_mcp_config=True,
        skills=[],
        extra_args={"no-session-persistence": None},
        cwd=folder / "work",
        stderr=on_stderr,
        max_buffer_size=8 * 2**20,
    )


def _environment(
    allowed: Mapping[str, str], variables: Mapping[str, str], folder: Path, deadline: float
) -> dict[str, str]:
    """Everything the CLI and its commands see. Makes the folders it names."""
    for name in FOLDERS:
        (folder / name).mkdir(mode=0o700)
    # A command that takes nearly all the time would leave none to answer.
    command_ms = max(1_000, int((deadline - time.monotonic()) * 750))
    no_proxy = ",".join([*(allowed[name] for name in ("NO_PROXY", "no_proxy") if allowed.get(name)), *_LOOPBACK])
    return {
        **variables,  # first: none of them can take the place of one of ours
        **allowed,
        **_QUIET,
        "NO_PROXY": no_proxy,
        "no_proxy": no_proxy,
        "HOME": str(folder / "home"),
        "CLAUDE_CONFIG_DIR": str(folder / "config"),
        "CLAUDE_CODE_TMPDIR": str(folder / "tmp"),
        "TMPDIR": str(folder / "tmp"),
        "BASH_DEFAULT_TIMEOUT_MS": str(command_ms),
        "BASH_MAX_TIMEOUT_MS": str(command_ms),
        MARK: folder.name,
    }


def _main_input(given: Mapping[str, Any]) -> str:
    return next((str(given[name]) for name in _MAIN_INPUTS if name in given), json.dumps(given))


def _retry(data: Mapping[str, Any]) -> str:
    reason = data.get("error_status") or "no answer"
    return f"{reason} ({data.get('error')}), attempt {data.get('attempt')} of {data.get('max_retries')}"
