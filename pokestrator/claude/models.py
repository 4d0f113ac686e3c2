"""Which model a short name means, for questions that do not go through the CLI. Pure.

As CLI 2.1.330 asked for them on 28 November 2026 with an API key; `test_direct_questions.py` compares them with the
CLI that is installed. Its other names ("default", "opusplan", "sonnet[1m]") are its own matter.
"""

from __future__ import annotations

import re

_MEANT = {
    "haiku": "claude-haiku-5-5",
    "sonnet": "claude-sonnet-5-5",
    "opus": "claude-opus-5-5",
    "fable": "claude-fable-5-2",
}
_ID = re.compile(r"claude-[a-z0-9.-]+", re.IGNORECASE)


def model_of(name: str) -> str | None:
    """The id of a model, by its short name or by itself; None for what only the CLI understands.

    >>> model_of("haiku"), model_of("claude-haiku-4-5-20251001"), model_of("sonnet[1m]")
    ('claude-haiku-5-5', 'claude-haiku-4-5-20251001', None)
    """
    return _MEANT.get(name) or (name if _ID.fullmatch(name) else None)


def effort_of(model: str) -> str | None:
    """How much the CLI lets a model think about an answer; None where it says nothing, as older models refuse it."""
    return "medium" if model in _MEANT.values() else None
