"""What the relay adds to a question: the same one, to the scripted Messages API and through the relay to it, in turns.

    .venv/bin/python -m tests.bench.relay

The scripted API answers at once, so the ratio is the worst there can be. Each question is asked as the CLI asks it: a
streamed answer on a new connection, with a body as long as the CLI's own.
"""

from __future__ import annotations

import time

import requests

from pokestrator.demo.messages_api import MessagesApi
from tests.bench.stand import percentiles
from tests.integration.agent_runs import KEY
from tests.integration.relaying import admitted, question, relaying

ROUNDS = 300
BODY_CHARACTERS = 60_000  # the CLI's first question, tools and system prompt included


def ask(url: str, key: str, body: dict[str, object]) -> float:
    """Milliseconds from a question to the end of its answer."""
    started = time.perf_counter()
    with requests.post(f"{url}/v1/messages?beta=true", json=body, headers={"x-api-key": key}, timeout=10) as answer:
        assert answer.ok, answer.text
    return 1000 * (time.perf_counter() - started)


def main() -> None:
    body = question({"text": "A scripted answer."}, stream=True, system="x " * (BODY_CHARACTERS // 2))
    direct, relayed = [], []
    with MessagesApi() as api, relaying(api.url) as relay, admitted(relay) as run:
        for measured in range(-20, ROUNDS):  # the first ones warm up
            pair = ask(api.url, KEY, body), ask(run.url, run.token, body)
            if measured >= 0:
                direct.append(pair[0])
                relayed.append(pair[1])
    added = [through - straight for straight, through in zip(direct, relayed, strict=True)]
    print(f"{ROUNDS} questions each way, in turns, ms    p50     p99")
    for name, values in (("direct", direct), ("through the relay", relayed), ("added", added)):
        middle, late = percentiles(values)
        print(f"{name:<36}{middle:7.2f} {late:7.2f}")
    print(f"ratio of the medians                {percentiles(relayed)[0] / percentiles(direct)[0]:7.2f}")


if __name__ == "__main__":
    main()
