"""What attacks need: an inbox that plays Poke."""

from __future__ import annotations

from collections.abc import Iterator

import pytest

from pokestrator.demo.inbox import Inbox


@pytest.fixture
def inbox() -> Iterator[Inbox]:
    with Inbox() as opened:
        yield opened
