"""Counts what a run's answers cost while they stream past: a Meter for each answer, a Ledger for the run.

Only the API's own `usage` is exact. Of an answer that broke off it says too little: then what came is counted, at four
characters a token, and of one that never began the question.
"""

from __future__ import annotations

import json
import threading
from collections.abc import Mapping
from typing import Any

from pokestrator.claude.prices import MILLION, Used, cost_usd, price_of, used_of
from pokestrator.runs import Usage

CHARACTERS_A_TOKEN = 4
_LONGEST = 16 * 2**20  # bytes of a line, or of an answer in one piece, that are kept to be read
_WRITTEN = ("text", "partial_json", "thinking")  # what a delta adds to, of all that is paid as output


class Meter:
    """What one answer has used so far. Fed by one thread."""

    def __init__(self, model: str, question_characters: int) -> None:
        self._model = model
        self._question_characters = question_characters
        self._kept = bytearray()
        self._usage: dict[str, Any] = {}
        self._written_characters = 0
        self.is_whole = False  # its last word about usage has come

    def feed_events(self, data: bytes) -> None:
        """Server-sent events, in pieces of any length."""
        self._kept += data
        *lines, rest = self._kept.split(b"\n")
        self._kept = bytearray() if len(rest) > _LONGEST else bytearray(rest)
        for line in lines:
            if line.startswith(b"data:"):
                self._take(_json(line[5:]))

    def feed_whole(self, data: bytes) -> None:
        """A JSON answer, in pieces; read once its last one has come."""
        if len(self._kept) <= _LONGEST:
            self._kept += data
        if data.endswith(b"}") and (message := _json(self._kept)):
            self._begin(message)
            self.is_whole = True

    def used(self) -> Used:
        if not self._usage:
            return Used(self._model, input_tokens=self._question_characters // CHARACTERS_A_TOKEN)
        used = used_of(self._model, self._usage)
        if self.is_whole:
            return used
        written = max(used.output_tokens, self._written_characters // CHARACTERS_A_TOKEN)
        return Used(**{**vars(used), "output_tokens": written})

    def _take(self, event: Mapping[str, Any]) -> None:
        kind = event.get("type")
        if kind == "message_start" and isinstance(event.get("message"), Mapping):
            self._begin(event["message"])
        elif kind == "content_block_delta" and isinstance(event.get("delta"), Mapping):
            self._written_characters += sum(len(str(event["delta"].get(name, ""))) for name in _WRITTEN)
        elif kind == "message_delta" and isinstance(event.get("usage"), Mapping):
            # Cumulative; older APIs repeat the output tokens alone.
            self._usage |= {name: value for name, value in event["usage"].items() if value is not None}
            self.is_whole = True

    def _begin(self, message: Mapping[str, Any]) -> None:
        self._model = str(message.get("model") or self._model)  # what has answered, whatever was asked for
        usage = message.get("usage")
        self._usage = dict(usage) if isinstance(usage, Mapping) else {}


class Ledger:
    """What a run has cost, its answers that are under way included. Thread-safe."""

    def __init__(self, budget_usd: float) -> None:
        self.budget_usd = budget_usd
        self._lock = threading.Lock()
        self._open: set[Meter] = set()
        self._closed: list[Used] = []
        self._closed_usd = 0.0

    def open(self, meter: Meter) -> None:
        """From now on what this meter shows counts."""
        with self._lock:
            self._open.add(meter)

    def close(self, meter: Meter, *, counts: bool) -> None:
        """The answer has ended; one that the API refused to give does not count."""
        with self._lock:
            if meter in self._open:
                self._open.remove(meter)
                if counts:
                    self._closed.append(meter.used())
                    self._closed_usd += cost_usd(self._closed[-1])

    def spent_usd(self) -> float:
        with self._lock:
            return self._closed_usd + sum(cost_usd(meter.used()) for meter in self._open)

    def can_pay(self, model: str, output_tokens: int) -> bool:
        """Whether the budget has something left, and enough for so much output of this model."""
        spent = self.spent_usd()
        return spent < self.budget_usd and spent + output_tokens * price_of(model).output / MILLION <= self.budget_usd

    def output_tokens_left(self, model: str, prompt_tokens: int) -> int:
        """Tokens of output that the budget can pay after a prompt of so many, of this model."""
        price = price_of(model, prompt_tokens)
        left_usd = self.budget_usd - self.spent_usd() - prompt_tokens * price.input / MILLION
        return max(0, int(left_usd * MILLION / price.output))

    def usage(self, by_cli: Usage) -> Usage:
        """The run's, where anything was counted; else what the CLI said."""
        with self._lock:
            answers = [*self._closed, *(meter.used() for meter in self._open)]
        if not answers:
            return by_cli
        return Usage(
            cost_usd=sum(map(cost_usd, answers)),
            input_tokens=sum(used.all_input_tokens for used in answers),
            output_tokens=sum(used.output_tokens for used in answers),
            turns=by_cli.turns or len(answers),
        )


def _json(data: bytes | bytearray) -> Mapping[str, Any]:
    try:
        value = json.loads(data)
    except (ValueError, RecursionError):
        return {}
    return value if isinstance(value, Mapping) else {}
