"""What the tests of the relay share: one of its own, runs admitted to it, and questions as the CLI asks them."""

from __future__ import annotations

import json
import uuid
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass, field
from typing import Any
from urllib.parse import urlsplit

import requests

from pokestrator.claude.admission import Admission
from pokestrator.claude.egress import Egress
from pokestrator.claude.relay import Relay
from pokestrator.claude.upstream import Upstream
from pokestrator.runs import RunEvent, RunRequest
from tests.integration.agent_runs import agent_environment, scripted


@dataclass
class Run:
    """A run that was let in, without an agent: the test asks in its place."""

    admission: Admission
    variables: Mapping[str, str]
    events: list[RunEvent] = field(default_factory=list)

    @property
    def url(self) -> str:
        return self.variables["ANTHROPIC_BASE_URL"]

    @property
    def port(self) -> int:
        return urlsplit(self.url).port or 0

    @property
    def token(self) -> str:
        return self.admission.token

    def ask(
        self, *steps: Mapping[str, Any], headers: Mapping[str, str] | None = None, **changes: Any
    ) -> requests.Response:
        """One question, answered by `steps`; `changes` are fields of its body. Streams its answer if the body does."""
        given = {"x-api-key": self.token} if headers is None else headers
        url = f"{self.url}/v1/messages?beta=true"
        body = question(*steps, **changes)
        return requests.post(url, json=body, headers=given, stream=bool(body.get("stream")), timeout=10)


def question(*steps: Mapping[str, Any], **changes: Any) -> dict[str, Any]:
    text = f"Question {uuid.uuid4()}. SCRIPT: {json.dumps(steps)}"
    asked = {"model": "claude-haiku-4-5", "max_tokens": 100, "messages": [{"role": "user", "content": text}]}
    return {**asked, **changes}


@contextmanager
def relaying(url: str, egress: Egress | None = None, **environment: str) -> Iterator[Relay]:
    """A relay to the API at `url`; an empty value leaves a variable of the owner's out."""
    given = {name: value for name, value in agent_environment(url, **environment).items() if value}
    relay = Relay(Upstream(given), egress or Egress())
    relay.start()
    try:
        yield relay
    finally:
        relay.close()


@contextmanager
def admitted(relay: Relay, request: RunRequest | None = None, **changes: Any) -> Iterator[Run]:
    events: list[RunEvent] = []
    with relay.admit(request or scripted({"text": "Done."}, **changes), events.append) as (admission, given):
        yield Run(admission, given.variables, events)
