"""What models cost, and what becomes of usage that is said in odd ways."""

from __future__ import annotations

import pytest

from pokestrator.claude.counting import Ledger, Meter
from pokestrator.claude.prices import Price, Used, cost_usd, price_of, used_of

DEAREST = Price(15, 75, 1.5)


@pytest.mark.parametrize(
    ("model", "price"),
    [
        ("claude-haiku-4-5-20251001", Price(1, 5, 0.1)),
        ("claude-sonnet-5-5", Price(2, 10, 0.1)),
        ("claude-sonnet-4-5-20250929", Price(3, 15, 0.3)),
        ("claude-opus-5-5", Price(4, 20, 0.2)),
        ("claude-opus-4-1-20250805", DEAREST),
        ("us.anthropic.claude-opus-4-6-v1:0", Price(5, 25, 0.5)),
        ("claude-3-5-haiku@20241022", Price(0.8, 4, 0.08)),
        ("claude-mythos-5-2", Price(8, 40, 0.2)),
        ("claude-haiku-4-7", DEAREST),  # not known, although its family is
        ("claude-haiku-4-5-but-another", DEAREST),
        ("", DEAREST),
    ],
)
def test_a_model_costs_what_is_published_and_an_unknown_one_what_the_dearest_does(model: str, price: Price) -> None:
    assert price_of(model) == price


def test_nothing_listed_is_dearer_than_the_dearest() -> None:
    known = [price_of(f"claude-{name}") for name in ("opus-4", "fable-5", "opus-5", "sonnet-4", "haiku-4-5")]
    assert max(price.output for price in known) == DEAREST.output


def test_a_long_question_to_haiku_5_5_costs_five_times_as_much() -> None:
    short, long = (cost_usd(Used("claude-haiku-5-5", input_tokens=tokens)) for tokens in (100_000, 100_001))
    assert long == pytest.approx(5 * short, rel=1e-4)


def test_cache_searches_and_modes_are_in_the_sum() -> None:
    usage = {
        "input_tokens": 1_000_000,
        "cache_creation_input_tokens": 3_000_000,
        "cache_creation": {"ephemeral_1h_input_tokens": 1_000_000},
        "server_tool_use": {"web_search_requests": 5},
    }
    plain = 1 + 2 * 1.25 + 2
    assert cost_usd(used_of("claude-haiku-4-5", usage)) == pytest.approx(plain + 0.05)
    assert cost_usd(used_of("claude-haiku-4-5", {**usage, "speed": "fast"})) == pytest.approx(6 * plain + 0.05)
    assert cost_usd(used_of("claude-haiku-4-5", {**usage, "inference_geo": "us"})) == pytest.approx(1.1 * plain + 0.05)


@pytest.mark.parametrize("odd", ["many", None, -5, [], {}, 1.5])
def test_usage_in_odd_words_counts_as_none(odd: object) -> None:
    usage = {"input_tokens": odd, "output_tokens": 3, "cache_creation": odd, "server_tool_use": odd}
    assert used_of("m", usage) == Used("m", output_tokens=3)


STREAM = (
    b'event: message_start\ndata: {"type": "message_start", "message": {"model": "claude-haiku-4-5", "usage": '
    b'{"input_tokens": 100, "output_tokens": 1}}}\n\n'
    b'event: content_block_delta\ndata: {"type": "content_block_delta", "delta": {"text": "' + b"x" * 400 + b'"}}\n\n'
    b'event: message_delta\ndata: {"type": "message_delta", "usage": {"output_tokens": 7}}\n\n'
)


@pytest.mark.parametrize("size", [1, 7, 10_000])
def test_a_stream_is_counted_whatever_its_pieces(size: int) -> None:
    meter = Meter("asked-for", 0)
    for at in range(0, len(STREAM), size):
        meter.feed_events(STREAM[at : at + size])
    assert meter.used() == Used("claude-haiku-4-5", input_tokens=100, output_tokens=7)
    assert meter.is_whole


def test_before_its_last_word_an_answer_counts_by_its_length() -> None:
    meter = Meter("asked-for", 0)
    meter.feed_events(STREAM[: STREAM.index(b"event: message_delta")])
    assert meter.used() == Used("claude-haiku-4-5", input_tokens=100, output_tokens=100)


def test_an_answer_under_way_counts_and_one_that_never_began_costs_its_question() -> None:
    ledger = Ledger(1.0)
    meter = Meter("claude-haiku-4-5", 4_000_000)
    ledger.open(meter)
    assert ledger.spent_usd() == pytest.approx(1.0)
    assert not ledger.can_pay("claude-haiku-4-5", 0)
    ledger.close(meter, counts=False)
    assert ledger.spent_usd() == 0
