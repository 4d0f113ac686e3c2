"""How long the search for a task's subagent takes, from a thousand subagents to a hundred thousand.

    .venv/bin/python -m tests.bench.routing [SIZE …]

Each knows five examples. Their words are made up, and as common and rare as words are (Zipf's law); a third of a text
is from ten words that are its subagent's own, and so is a third of each task. Stop words, stemming and the index are
PostgreSQL's, embedded, in a temporary folder. The templates that the service ships are among those to choose from.

`common`: tasks of one to four of the most common words, which tell nobody apart. Two floors stand beside: one rare word
looked up in the same index, and `SELECT 1`. `refresh`: making a subagent's text anew when it knows 5 examples, or 50.
"""

from __future__ import annotations

import random
import statistics
import sys
import tempfile
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from itertools import accumulate
from pathlib import Path
from typing import Any

from pokestrator.store.embedded import EmbeddedPostgres
from pokestrator.store.examples import INSERT_EXAMPLE, MAX_EXAMPLES, refresh_search
from pokestrator.store.migrate import migrate
from pokestrator.store.pool import Connection, Database
from pokestrator.store.shortlist import Shortlists
from pokestrator.store.statistics import Statistics
from pokestrator.store.templates import TEMPLATES_FOLDER, load_templates

SIZES = (1_000, 2_000, 10_000, 100_000)
TASKS = 400
REFRESHED = 100
WORDS = 40_000
OWN_SHARE, STOP_SHARE = 0.35, 0.3
STOP = ["the", "a", "of", "to", "in", "for", "my", "is", "what", "can", "you", "i", "me", "please", "and", "on", "with"]
LOAD_SECONDS = 1_200
RARE = "SELECT id FROM subagents WHERE search @@ exactly(%s) LIMIT 32"
TEMPLATES, _ = load_templates(TEMPLATES_FOLDER)

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


@dataclass(frozen=True)
class Measured:
    """Sorted milliseconds, the share of tasks whose subagent was found, and the seconds of the count."""

    search: list[float]
    common: list[float]
    one_word: list[float]
    nothing: list[float]
    refresh: list[float]
    refresh_of_many: list[float]
    found: float
    counted: float

    def row(self, size: int, first: float) -> str:
        p50, one_word, nothing = (statistics.median(each) for each in (self.search, self.one_word, self.nothing))
        return (
            f"{size:>9,} {p50:>7.1f} {p95(self.search):>7.1f} {p95(self.common):>11.1f} {p50 / first:>9.1f} "
            f"{p50 / one_word:>12.0f} {p50 / nothing:>12.0f} {100 * self.found:>5.0f}% {self.counted:>8.1f} "
            f"{statistics.median(self.refresh):>13.1f} {statistics.median(self.refresh_of_many):>6.1f}"
        )


HEAD = "subagents  p50 ms  p95 ms  common p95  to first  to one word  to SELECT 1  found  count s  refresh 5 ms  50 ms"


def database_of(postgres: EmbeddedPostgres, size: int) -> Database:
    with Database(postgres.url).connect() as connection:
        connection.execute(f"CREATE DATABASE of_{size}".encode())
    database = Database(postgres.url.replace("/postgres?", f"/of_{size}?"), min_size=1, max_size=1)
    migrate(database)
    database.open()
    return database


def measure(postgres: EmbeddedPostgres, size: int, language: Language) -> Measured:
    database = database_of(postgres, size)
    topics = [language.topic() for _ in range(size)]
    with database.connect(operation_seconds=LOAD_SECONDS) as connection:
        load(connection, language, topics)
    started = time.perf_counter()
    Statistics(database).count()
    counted = time.perf_counter() - started
    asked = [(number, language.text(topics[number], 15)) for number in language.random.sample(range(size), TASKS)]
    common = [" ".join(language.words[at : at + 1 + at % 4]) for at in range(TASKS // 4)]
    shortlists = Shortlists(database)

    def names(task: str) -> list[str]:
        return [candidate.name for candidate in shortlists.find(task, TEMPLATES).candidates]

    found = sum(name_of(number) in names(task) for number, task in asked) / TASKS
    with database.connect() as connection:
        connection.execute("SET jit = off")
        measured = Measured(
            search=milliseconds(names, [task for _, task in asked]),
            common=milliseconds(names, common),
            one_word=milliseconds(lambda each: connection.execute(RARE, [topics[each[0]][9]]).fetchall(), asked),
            nothing=milliseconds(lambda _: connection.execute("SELECT 1").fetchall(), asked),
            refresh=milliseconds(lambda number: refresh_search(connection, number), range(1, REFRESHED + 1)),
            refresh_of_many=refreshes_of_many(connection, language, topics),
            found=found,
            counted=counted,
        )
    database.close()
    return measured


def refreshes_of_many(connection: Connection, language: Language, topics: Sequence[Sequence[str]]) -> list[float]:
    for number in range(1, REFRESHED + 1):
        for _ in range(MAX_EXAMPLES - 5):
            task = language.text(topics[number - 1], 12)
            values = {"subagent_id": number, "task": task, "source": "person", "job_id": None}
            connection.execute(INSERT_EXAMPLE, values)
    return milliseconds(lambda number: refresh_search(connection, number), range(1, REFRESHED + 1))


def main(sizes: Sequence[int]) -> None:
    language = Language()
    print(HEAD)
    first: float | None = None
    with tempfile.TemporaryDirectory(prefix="pokestrator-bench-", ignore_cleanup_errors=True) as folder:
        postgres = EmbeddedPostgres(Path(folder))
        try:
            for size in sizes:
                measured = measure(postgres, size, language)
                first = first or statistics.median(measured.search)
                print(measured.row(size, first), flush=True)
        finally:
            postgres.leave()


if __name__ == "__main__":
    main([int(size) for size in sys.argv[1:]] or SIZES)
