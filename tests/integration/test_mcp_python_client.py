"""Python's `mcp.Client`, of both eras, against our endpoint with a key."""

from __future__ import annotations

import asyncio
import json
from collections.abc import Awaitable, Callable, Iterator
from typing import TypeVar

import httpx2
import pytest
from mcp import Client, MCPError
from mcp.client.streamable_http import streamable_http_client

from pokestrator.intake import Action, Question
from pokestrator.jobs import CallbackState, CallbackTarget, JobState
from tests.integration.mcp_peer import FakeService, job_status, our_server

KEY = "a-long-random-key"
HEADERS = {
    "Authorization": f"Bearer {KEY}",
    "X-Poke-User-Id": "user-1",
    "X-Poke-Callback-Url": "https://poke.example/cb",
    "X-Poke-Callback-Token": "token-1",
}
TASK = {"task_description": "Write a limerick about zebra stripes", "metadata": {"zone": "Europe/Madrid"}}

# How the client is asked to connect, and the version it then speaks.
MODES = [("legacy", "2025-11-25"), ("auto", "2026-07-28"), ("2026-07-28", "2026-07-28")]

Result = TypeVar("Result")


@pytest.fixture
def service() -> FakeService:
    return FakeService()


@pytest.fixture
def url(service: FakeService) -> Iterator[str]:
    with our_server(service, api_key=KEY) as address:
        yield address


def connected(
    url: str, mode: str, use: Callable[[Client], Awaitable[Result]], headers: dict[str, str] | None = None
) -> Result:
    """What `use` returns, given a connected client."""

    async def run() -> Result:
        # trust_env=False: a proxy in the environment must not come between the test and this machine.
        async with (
            httpx2.AsyncClient(headers=headers or HEADERS, trust_env=False, timeout=20) as http_client,
            Client(streamable_http_client(url, http_client=http_client), mode=mode) as client,
        ):
            return await use(client)

    return asyncio.run(run())


@pytest.mark.parametrize(("mode", "version"), MODES)
def test_client_learns_version_name_and_instructions(url: str, mode: str, version: str) -> None:
    async def use(client: Client) -> tuple[str | None, str | None]:
        return client.protocol_version, client.instructions

    spoken, instructions = connected(url, mode, use)
    assert spoken == version
    if mode != "2026-07-28":  # pinned to a version, the client asks nothing of the server beforehand
        assert instructions is not None
        assert "orchestrate" in instructions


@pytest.mark.parametrize(("mode", "version"), MODES)
def test_client_lists_the_tool_and_gets_a_structured_ack(
    url: str, service: FakeService, mode: str, version: str
) -> None:
    async def use(client: Client) -> tuple[list[str], object]:
        tools = (await client.list_tools()).tools  # the client checks answers against the schemas it lists
        return [tool.name for tool in tools], await client.call_tool("orchestrate", TASK)

    names, result = connected(url, mode, use)
    assert names == ["orchestrate"]
    assert result.is_error is False
    [job] = service.jobs
    assert result.structured_content["status"] == "accepted"
    assert result.structured_content["request_id"] == str(job.id)
    assert json.loads(result.content[0].text) == result.structured_content
    assert (job.caller, job.metadata) == ("user-1", {"zone": "Europe/Madrid"})
    assert job.callback == CallbackTarget("https://poke.example/cb", "token-1")


ANSWERS = [
    job_status(),
    job_status(JobState.RUNNING, cancel_requested=True),
    job_status(JobState.SUCCEEDED, result="There once was a zebra …", delivery=CallbackState.DELIVERED),
    job_status(JobState.FAILED, result="I couldn't do this.", delivery=CallbackState.DEAD),
    job_status(JobState.CANCELLED, result="The task was cancelled, as you asked.", delivery=CallbackState.PENDING),
]


@pytest.mark.parametrize(("mode", "version"), MODES)
def test_answers_to_questions_fit_the_schema_that_the_client_holds_them_against(
    url: str, service: FakeService, mode: str, version: str
) -> None:
    async def use(client: Client) -> list[object]:
        await client.list_tools()
        answers = []
        for status in ANSWERS:
            service.status = status
            answers.append(await client.call_tool("orchestrate", {**TASK, "metadata": {"action": "status"}}))
        return answers

    results = connected(url, mode, use)
    assert not any(result.is_error for result in results)
    words = [result.structured_content["status"] for result in results]
    assert words == ["queued", "cancelling", "succeeded", "failed", "cancelled"]
    assert all(json.loads(result.content[0].text) == result.structured_content for result in results)
    assert service.questions == [Question(Action.STATUS, None, "user-1")] * len(ANSWERS)
    assert service.jobs == []


@pytest.mark.parametrize(("mode", "version"), MODES)
def test_client_learns_that_its_call_was_a_repetition(url: str, service: FakeService, mode: str, version: str) -> None:
    async def use(client: Client) -> object:
        await client.list_tools()
        return await client.call_tool("orchestrate", TASK)

    service.duplicate = True
    assert connected(url, mode, use).structured_content["duplicate"] is True


@pytest.mark.parametrize(("mode", "version"), MODES)
def test_bad_arguments_surface_as_a_tool_error(url: str, service: FakeService, mode: str, version: str) -> None:
    async def use(client: Client) -> object:
        await client.list_tools()
        return await client.call_tool("orchestrate", {"task_description": " "})

    result = connected(url, mode, use)
    assert result.is_error is True
    assert result.content[0].text.startswith("task_description: is empty")
    assert service.jobs == []


@pytest.mark.parametrize(("mode", "version"), MODES)
def test_unknown_tool_surfaces_with_its_code(url: str, mode: str, version: str) -> None:
    async def use(client: Client) -> int:
        with pytest.raises(MCPError) as caught:
            await client.call_tool("no_such_tool", {})
        return caught.value.code

    assert connected(url, mode, use) == -32602


def test_legacy_client_can_ping(url: str) -> None:
    async def use(client: Client) -> object:
        with pytest.warns(match="ping is removed"):
            return await client.send_ping()

    assert connected(url, "legacy", use) is not None


@pytest.mark.parametrize("mode", [mode for mode, _ in MODES])
def test_client_with_a_wrong_key_gets_nothing_accepted(url: str, service: FakeService, mode: str) -> None:
    async def use(client: Client) -> None:
        await client.call_tool("orchestrate", TASK)

    with pytest.RaisesGroup(MCPError, flatten_subgroups=True):
        connected(url, mode, use, headers={"Authorization": "Bearer wrong"})
    assert service.jobs == []
