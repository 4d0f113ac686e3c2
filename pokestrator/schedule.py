"""When a callback that failed is tried again, on which channel, and when it is given up."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

from pokestrator.jobs import Channel

# After the try whose number is the index + 1: 5 s, 30 s, 2 min, 10 min, 30 min, 2 h, 5 h, 10 h, 14 h, 20 h, 24 h.
WAITS = (5, 30, 120, 600, 1_800, 7_200, 18_000, 36_000, 50_400, 72_000, 86_400)
LONGEST_ASKED_WAIT = 3_600.0  # of Retry-After and retryAfterMs
FALL_BACK_SECONDS = 600.0  # how long a callback URL may fail before the message API takes over
RETRIED_STATUSES = frozenset({408, 425, 429})
DEAD_TOKEN_STATUSES = frozenset({401, 403, 404, 410})


@dataclass(frozen=True)
class NextTry:
    """When a failed callback is tried again, and where."""

    wait_seconds: float
    channel: Channel


def wait_after(tries: int, asked: float | None = None, jitter: float = 1.0) -> float | None:
    """Seconds to wait after failed try number `tries`; None when it was the last.

    `asked` is what the receiver wants us to wait at least; `jitter` (0.8 to 1.2) spreads the schedule.

    >>> wait_after(1), wait_after(3, jitter=0.8), wait_after(12)
    (5.0, 96.0, None)
    >>> wait_after(1, asked=40.0), wait_after(1, asked=1e9)
    (40.0, 3600.0)
    """
    if tries > len(WAITS):
        return None
    return max(WAITS[tries - 1] * jitter, min(asked or 0.0, LONGEST_ASKED_WAIT))


def is_worth_retrying(status: int | None, channel: Channel) -> bool:
    """No answer (None), a server's fault, or "not now": yes. Any other refusal will be refused again.

    A callback URL that redirects is one that fails; the message API that does has another address now.

    >>> [is_worth_retrying(status, Channel.API_MESSAGE) for status in (503, 400)]
    [True, False]
    >>> [is_worth_retrying(307, channel) for channel in (Channel.CALLBACK, Channel.API_MESSAGE)]
    [True, False]
    """
    if status is None or status >= 500 or status in RETRIED_STATUSES:
        return True
    return channel is Channel.CALLBACK and 300 <= status < 400


def next_try(
    status: int | None,
    asked: float | None = None,
    *,
    channel: Channel,
    tries: int,
    age_seconds: float,
    channels: Sequence[Channel],
    jitter: float = 1.0,
    is_refused: bool = False,
) -> NextTry | None:
    """What follows from failed try number `tries`, made `age_seconds` after the schedule began; None: a dead letter.

    `status` and `asked` (seconds) are the receiver's; `channels` are those that can be used now. `is_refused`: nothing
    was sent, because the address is not one that we may send to.

    >>> both = (Channel.CALLBACK, Channel.API_MESSAGE)
    >>> next_try(503, channel=Channel.CALLBACK, tries=1, age_seconds=0, channels=both).wait_seconds
    5.0
    >>> next_try(503, channel=Channel.CALLBACK, tries=4, age_seconds=160, channels=both)
    NextTry(wait_seconds=440.0, channel=<Channel.API_MESSAGE: 'api_message'>)
    >>> next_try(401, channel=Channel.CALLBACK, tries=1, age_seconds=0, channels=both)
    NextTry(wait_seconds=0.0, channel=<Channel.API_MESSAGE: 'api_message'>)
    >>> next_try(400, channel=Channel.CALLBACK, tries=1, age_seconds=0, channels=both) is None
    True
    """
    if channel is Channel.CALLBACK and (is_refused or status in DEAD_TOKEN_STATUSES):
        return NextTry(0.0, Channel.API_MESSAGE)  # also without a key: there may be one in the days to come
    if is_refused or not is_worth_retrying(status, channel):
        return None
    wait = wait_after(tries, asked, jitter)
    if channel is Channel.CALLBACK and Channel.API_MESSAGE in channels:
        left = max(0.0, FALL_BACK_SECONDS - max(0.0, age_seconds))
        if wait is None or wait >= left:
            return NextTry(left, Channel.API_MESSAGE)
    return None if wait is None else NextTry(wait, channel)
