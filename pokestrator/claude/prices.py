"""What Claude's answers cost: the published prices, and the sum for what an answer has used. Pure.

Prices of 28 November 2026 in US dollars per million tokens, from platform.claude.com/docs/en/about-claude/pricing (to
Fable 5.1 and Haiku 5.5) and, for the 5.2 models, from the table in CLI 2.1.330. They are an estimate for budgets: no
discount is known here, and a model that is not listed costs what the dearest one does.
"""

from __future__ import annotations

import re
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

MILLION = 1_000_000
WEB_SEARCH_USD = 0.01  # each
IN_ONE_COUNTRY = 1.1  # times, where `inference_geo` is not "global"
FAST_MODE = 6.0  # times: the highest of what fast modes cost

CACHE_WRITE, CACHE_WRITE_1H = 1.25, 2.0  # times the input price, for every model


@dataclass(frozen=True)
class Price:
    """Dollars per million tokens."""

    input: float
    output: float
    cache_read: float


_LONG_HAIKU_TOKENS = 100_000
_LONG_HAIKU = Price(0.5, 2.5, 0.05)
_DEAREST = Price(15, 75, 1.5)

# By what stands between `claude-` and the end of the model's id, or a date, or what its host adds.
_PRICES = tuple(
    (re.compile(rf"(^|[./])claude-({family})($|-20[0-9]{{6}}|-latest|-v[0-9]|[@\[])", re.IGNORECASE), price)
    for family, price in (
        (r"(fable|mythos)-5-2", Price(8, 40, 0.2)),
        (r"(fable|mythos)-5-1", Price(10, 50, 0.25)),
        (r"(fable|mythos)-5", Price(10, 50, 1)),
        (r"opus-5-5", Price(4, 20, 0.2)),
        (r"opus-(5|4-[5-8])", Price(5, 25, 0.5)),
        (r"opus-4(-[01])?|3-opus", _DEAREST),
        (r"sonnet-5-5", Price(2, 10, 0.1)),
        (r"sonnet-5", Price(2, 10, 0.2)),
        (r"sonnet-4(-[056])?|3-[57]-sonnet", Price(3, 15, 0.3)),
        (r"haiku-5-5", Price(0.1, 0.5, 0.01)),
        (r"haiku-4-5", Price(1, 5, 0.1)),
        (r"3-5-haiku", Price(0.8, 4, 0.08)),
    )
)


@dataclass(frozen=True)
class Used:
    """What one answer has used. `input_tokens` are those that came from no cache and went to none."""

    model: str
    input_tokens: int = 0
    output_tokens: int = 0
    cache_write_tokens: int = 0
    cache_write_1h_tokens: int = 0  # of those written
    cache_read_tokens: int = 0
    web_searches: int = 0
    factor: float = 1.0

    @property
    def all_input_tokens(self) -> int:
        return self.input_tokens + self.cache_write_tokens + self.cache_read_tokens


def price_of(model: str, prompt_tokens: int = 0) -> Price:
    """What a model costs, for a prompt of this length.

    >>> price_of("claude-sonnet-5-5-20260928")
    Price(input=2, output=10, cache_read=0.1)
    >>> price_of("a-model-that-nobody-knows") == price_of("claude-opus-4-1")
    True
    """
    price = next((price for pattern, price in _PRICES if pattern.search(model)), _DEAREST)
    if price.input == 0.1 and prompt_tokens > _LONG_HAIKU_TOKENS:
        return _LONG_HAIKU
    return price


def cost_usd(used: Used) -> float:
    price = price_of(used.model, used.all_input_tokens)
    write_1h = min(used.cache_write_1h_tokens, used.cache_write_tokens)
    write_5m = used.cache_write_tokens - write_1h
    dollars = (
        used.input_tokens * price.input
        + write_5m * price.input * CACHE_WRITE
        + write_1h * price.input * CACHE_WRITE_1H
        + used.cache_read_tokens * price.cache_read
        + used.output_tokens * price.output
    ) / MILLION
    return dollars * used.factor + used.web_searches * WEB_SEARCH_USD


def used_of(model: str, usage: Mapping[str, Any]) -> Used:
    """The `usage` object of the Messages API; what it does not say, or says in another form, counts as none."""

    def count(value: object) -> int:
        return max(0, value) if isinstance(value, int) else 0

    def part(name: str) -> Mapping[str, Any]:
        value = usage.get(name)
        return value if isinstance(value, Mapping) else {}

    factor = FAST_MODE if usage.get("speed") == "fast" else 1.0
    if usage.get("inference_geo") not in (None, "", "global", "not_available"):
        factor *= IN_ONE_COUNTRY
    return Used(
        model=model,
        input_tokens=count(usage.get("input_tokens")),
        output_tokens=count(usage.get("output_tokens")),
        cache_write_tokens=count(usage.get("cache_creation_input_tokens")),
        cache_write_1h_tokens=count(part("cache_creation").get("ephemeral_1h_input_tokens")),
        cache_read_tokens=count(usage.get("cache_read_input_tokens")),
        web_searches=count(part("server_tool_use").get("web_search_requests")),
        factor=factor,
    )
