"""How long the search for a task's subagent takes, from a thousand subagents to a hundred thousand.

    .venv/bin/python -m tests.bench.routing [SIZE …]

Each knows five examples. Their words are made up, and as common and rare as words are (Zipf's law); a third of a text
is from ten words that are its subagent's own, and so is a third of each task. Stop words, stemming and the index are
PostgreSQL's, embedded, in a temporary folder. Beside the search, a single rare word is looked up in the same index: the
floor for anything that asks the database.
"""

from __future__ import annotations

import random
import statistics
import sys
import tempfile
import time
from collections.abc import Callable, Sequence
from itertools import accumulate
from pathlib import Path
from typing import Any

from psycopg.sql import SQL

from pokestrator.store.embedded import EmbeddedPostgres
from pokestrator.store.examples import refresh_search
from pokestrator.store.migrate import migrate
from pokestrator.store.pool import Connection, Database
from pokestrator.store.shortlist import Shortlists
from pokestrator.store.statistics import Statistics

SIZES = (1_000, 10_000, 100_000)
TASKS = 400
WORDS = 40_000
OWN_SHARE, STOP_SHARE = 0.35, 0.3
STOP = ["the", "a", "of", "to", "in", "for", "my", "is", "what", "can", "you", "i", "me", "please", "and", "on", "with"]
LOAD_SECONDS = 1_200

RAW = "CREATE TEMP TABLE raw (name text, description text, examples text[])"
LOAD = (
    "INSERT INTO subagents (name, origin, version, search) SELECT name, 'built', 1, findable(name, description, "
    "array_to_string(examples, ' ')) FROM raw",
    "INSERT INTO subagent_versions (subagent_id, version, author, description, system_prompt, tools, credentials, "
    "hosts, digest) SELECT id, 1, 'owner', description, '', '{}', '{}', '{}', '' FROM raw JOIN subagents USING (name)",
    "INSERT INTO subagent_examples (subagent_id, task, source) SELECT id, task, 'person' FROM raw "
    "JOIN subagents USING (name), unnest(examples) task ON CONFLICT DO NOTHING",
)


class Language:
    """A made-up vocabulary, the same in each run."""

    def __init__(self) -> None:
        self.random = random.Random(20_26)
        syllables = [c + v for c in "bcdfghklmnprstvw" for v in "aeiou"]
        made = ("".join(self.random.choices(syllables, k=self.random.randint(2, 4))) for _ in range(2 * WORDS))
        self.words = list(dict.fromkeys(made))[:WORDS]
        self._weights = list(accumulate(1 / (rank + 3) for rank in range(len(self.words))))

    def common(self, count: int) -> list[str]:
        return self.random.choices(self.words, cum_weights=self._weights, k=count)

    def topic(self) -> list[str]:
        """A subagent's own words: some common, some rare."""
        return [*self.common(6), *self.random.choices(self.words, k=4)]

    def text(self, topic: Sequence[str], length: int) -> str:
        def word() -> str:
            kind = self.random.random()
            if kind < OWN_SHARE:
                return self.random.choice(topic)
            return self.random.choice(STOP) if kind < OWN_SHARE + STOP_SHARE else self.common(1)[0]

        return " ".join(word() for _ in range(length))


def load(connection: Connection, language: Language, topics: Sequence[Sequence[str]]) -> None:
    """Store a subagent for each topic."""
    connection.execute(f"SET statement_timeout = '{LOAD_SECONDS}s'".encode())
    with connection.transaction():
        connection.execute(RAW)
        with connection.cursor().copy("COPY raw FROM STDIN") as copy:
            for number, topic in enumerate(topics):
                examples = [language.text(topic, 12) for _ in range(5)]
                copy.write_row((name_of(number), language.text(topic, 20), examples))
        for step in LOAD:
            connection.execute(step.encode())
    for table in ("subagents", "subagent_versions", "subagent_examples"):
        connection.execute(f"VACUUM ANALYZE {table}".encode())


def name_of(number: int) -> str:
    return f"subagent_{number}"


def milliseconds(work: Callable[[Any], object], items: Sequence[Any]) -> list[float]:
    """How long each took, sorted; the first few, which warm the caches, are not counted."""
    for item in items[:20]:
        work(item)
    taken = []
    for item in items:
        started = time.perf_counter()
        work(item)
        taken.append(1_000 * (time.perf_counter() - started))
    return sorted(taken)


def p95(taken: Sequence[float]) -> float:
    return taken[int(0.95 * (len(taken) - 1))]


def measure(postgres: EmbeddedPostgres, size: int, language: Language) -> tuple[float, ...]:
    """p50 and p95 of the search, p50 of the floor, the share found, seconds of the count, milliseconds of a refresh."""
    owner = Database(postgres.url)
    with owner.connect() as connection:
        connection.execute(f"CREATE DATABASE of_{size}".encode())
    database = Database(postgres.url.replace("/postgres?", f"/of_{size}?"), min_size=1, max_size=1)
    migrate(database)
    database.open()
    topics = [language.topic() for _ in range(size)]
    with database.connect(operation_seconds=LOAD_SECONDS) as connection:
        load(connection, language, topics)
    started = time.perf_counter()
    Statistics(database).count()
    counted = time.perf_counter() - started
    asked = [(number, language.text(topics[number], 15)) for number in language.random.sample(range(size), TASKS)]
    shortlists = Shortlists(database)
    found = [
        any(each.name == name_of(number) for each in shortlists.find(task, ()).candidates) for number, task in asked
    ]
    taken = milliseconds(lambda each: shortlists.find(each[1], ()), asked)
    with database.connect() as connection:
        rare = SQL("SELECT id FROM subagents WHERE search @@ exactly(%s) LIMIT 32")
        floor = milliseconds(lambda number: connection.execute(rare, [topics[number][9]]).fetchall(), range(TASKS))
        refresh = milliseconds(lambda number: refresh_search(connection, number), range(1, 101))
    database.close()
    return statistics.median(taken), p95(taken), statistics.median(floor), sum(found) / TASKS, counted, refresh[50]


def main(sizes: Sequence[int]) -> None:
    language = Language()
    print("subagents    p50 ms   p95 ms   to the first   to one word   found   count s   refresh ms")
    first: float | None = None
    with tempfile.TemporaryDirectory(prefix="pokestrator-bench-", ignore_cleanup_errors=True) as folder:
        postgres = EmbeddedPostgres(Path(folder))
        try:
            for size in sizes:
                p50, late, floor, found, counted, refresh = measure(postgres, size, language)
                first = first or p50
                print(
                    f"{size:>9,}  {p50:>8.1f} {late:>8.1f} {p50 / first:>14.1f} {p50 / floor:>13.1f} "
                    f"{100 * found:>6.0f}% {counted:>9.1f} {refresh:>12.1f}",
                    flush=True,
                )
        finally:
            postgres.leave()


if __name__ == "__main__":
    main([int(size) for size in sys.argv[1:]] or SIZES)
