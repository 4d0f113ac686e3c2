"""Settings for tests that send more than any caller may."""

from __future__ import annotations

NO_LIMITS = {
    "POKESTRATOR_REQUESTS_PER_MINUTE": "1000000",
    "POKESTRATOR_TASKS_PER_MINUTE": "100000",
    "POKESTRATOR_TASKS_PER_DAY": "1000000",
    "POKESTRATOR_UNFINISHED_TASKS": "100000",
}
