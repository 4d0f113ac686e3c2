"""JSON from strangers: UTF-8, finite numbers, bounded nesting."""

from __future__ import annotations

import json
import math
from typing import NoReturn

# json.loads gives up near a depth of 1,000, and what it lets through must also survive being written again.
MAX_DEPTH = 100


def parse_json(data: bytes) -> object:
    """The JSON value in `data`. Raises ValueError for what is not JSON in UTF-8, holds NaN, Infinity, a number too
    large for a float or an integer of more than 4,300 digits, or nests more than MAX_DEPTH levels.

    Strings may still hold NUL and lone surrogates, as JSON's escapes can spell both.
    """
    try:
        value: object = json.loads(data.decode(), parse_constant=_refuse_number, parse_float=_finite)
    except RecursionError:
        raise ValueError("nested too deeply") from None
    level = [value]
    for _ in range(MAX_DEPTH):
        level = [child for item in level for child in _children(item)]
        if not level:
            return value
    raise ValueError("nested too deeply")


def _children(value: object) -> list[object]:
    if isinstance(value, dict):
        return list(value.values())
    return value if isinstance(value, list) else []


def _finite(literal: str) -> float:
    number = float(literal)
    return number if math.isfinite(number) else _refuse_number(literal)


def _refuse_number(literal: str) -> NoReturn:
    raise ValueError("a number that is not finite")
